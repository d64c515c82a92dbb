"""The peak memory of a training step, found by taking the step with tensors that have shapes but no contents.

The surprising fact: no formula is needed, and none goes out of date. The model's own forward and backward pass run, with
whatever adapters, precision or recomputation it was given; a mode under the dispatcher hears of every tensor that is
made, and of its end. A step of 583 million parameters takes seconds this way, on any laptop.

What a kernel needs inside itself, and what an allocator wastes, is not seen. Fake tensors:
https://pytorch.org/docs/stable/torch.compiler_fake_tensor.html. B rows, T tokens, D hidden size,
N pictures of Q tokens and side S, M learnt tokens. Next: trainer.py.
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
    """Counts the bytes of all tensors made under it, for as long as somebody holds them; `peak` is the most there were.

    `there` are tensors made before, whose views do not count.
    """

    def __init__(self, there: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in there}

    def __torch_dispatch__(self, function, kinds, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:  # a sparse one is made of such
                self._hear_of(tensor.untyped_storage())
        return made

    def _hear_of(self, storage: torch.UntypedStorage) -> None:
        number = storage._cdata
        if number in self.known:
            return
        self.known.add(number)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._end_of, number, storage.nbytes())

    def _end_of(self, number: int, size: int) -> None:
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
    """Most bytes that the forward and backward passes of a step take, gradients included, beside the model.

    `build` makes it, ready for its stage. Further micro-batches than two take no more than two.
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
    """`MultimodalLLM.forward` where nobody knows which tokens are pictures or learnt, only how many."""
    side = model.config.vision.image_size
    x_BTD = model.language_model.embed(ids_BT)
    image_NQD = model.encode_images(torch.zeros(images, 3, side, side))
    x_BTD = x_BTD.masked_scatter((ids_BT == 0)[:, :, None], image_NQD.to(x_BTD.dtype))
    place = torch.arange(targets)
    x_MD = model.language_model(x_BTD, keep=(place // ids_BT.shape[1], place % ids_BT.shape[1]))
    return model.loss_sum(x_MD, torch.zeros(targets, dtype=torch.long))
