"""The peak memory of a training step, found by running the step on tensors that have shapes but no contents.

No formula goes out of date this way: the model's own forward and backward pass run, with its adapters, precision and
recomputation, while a dispatch mode counts every tensor that is created and freed. A step of 583 million parameters takes
seconds on a laptop. What a kernel needs internally, and what an allocator wastes, is not counted.

Fake tensors: https://pytorch.org/docs/stable/torch.compiler_fake_tensor.html.
B rows, T tokens, D hidden size, N images of Q tokens, M targets.
"""

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mmllm.models.multimodal import MultimodalLLM
from mmllm.runtime.device import autocast

CPU = torch.device("cpu")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors created under it that are alive (`now`), and the most there were (`peak`).

    `existing` are tensors created before, whose views do not count.
    """

    def __init__(self, existing: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in existing}

    def __torch_dispatch__(self, function, kinds, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:  # a sparse one consists of such
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        number = storage._cdata
        if number in self.known:
            return
        self.known.add(number)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, number, storage.nbytes())

    def _free(self, number: int, size: int) -> None:
        self.known.discard(number)
        self.now -= size


def step_peak(
    build: Callable[[], MultimodalLLM],
    *,
    rows: int,
    length: int,
    targets: int,
    images: int,
    bf16: bool,
    micro_batches: int = 1,
) -> int:
    """Peak bytes of the forward and backward passes of a step beside the model, gradients included.

    `build` makes the model, ready for its stage. More than two micro-batches take as much as two.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build()
        with LiveBytes([*model.parameters(), *model.buffers()]) as live:
            for _ in range(micro_batches):
                with autocast(CPU, bf16):
                    loss = summed_loss(model, torch.zeros(rows, length, dtype=torch.long), targets, images)
                loss.backward()
    return live.peak


def summed_loss(model: MultimodalLLM, ids_BT: Tensor, targets: int, images: int) -> Tensor:
    """`MultimodalLLM.forward` where only the number of image tokens and targets is known, not their positions."""
    side = model.config.vision.image_size
    x_BTD = model.language_model.embed(ids_BT)
    image_NQD = model.encode_images(torch.zeros(images, 3, side, side))
    x_BTD = x_BTD.masked_scatter((ids_BT == 0)[:, :, None], image_NQD.to(x_BTD.dtype))
    position_M = torch.arange(targets)
    x_MD = model.language_model(x_BTD, keep=(position_M // ids_BT.shape[1], position_M % ids_BT.shape[1]))
    return model.loss_sum(x_MD, torch.zeros(targets, dtype=torch.long))
