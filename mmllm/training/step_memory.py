"""The peak memory of a training step, found by running the step on tensors that have shapes but no contents.

No formula goes out of date this way: the model's own forward and backward pass run, with its adapters, precision and
recomputation, while a dispatch mode counts every tensor that is created and freed. A step of 583 million parameters takes
seconds on a laptop. What a kernel needs internally, and what an allocator wastes, is not counted.

Fake tensors: https://pytorch.org/docs/stable/torch.compiler_fake_tensor.html.
B rows, T tokens, D hidden size, N images of Q tokens, M targets.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mmllm.config.schema import ExperimentConfig, RewardConfig, StageConfig
from mmllm.models.config import MultimodalConfig
from mmllm.models.multimodal import MultimodalLLM
from mmllm.runtime.device import autocast
from mmllm.training.adamw8bit import empty_moments
from mmllm.training.prepare import cast_, prepare, train_only_, trained_parts
from mmllm.training.reward import has_reference

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


# A whole stage

# Memory of a process beside its tensors: Python, torch, what they load at the first step, scratch space of the kernels.
CUDA_LIBRARIES = 500_000_000 if torch.version.cuda else 0  # where the build of torch has them, on a CPU too
PROCESS_BYTES = {"cpu": 540_000_000 + CUDA_LIBRARIES, "cuda": 70_000_000, "mps": 0}
GAPS = {"cpu": 1.1, "cuda": 1.0, "mps": 1.0}  # of a step: what the allocator wastes, see runtime/memory.py


@dataclass(frozen=True)
class SampleSize:
    """What a sample takes at most: tokens of a row, targets in all of its rows, images, rows."""

    length: int
    targets: int
    images: int = 1
    rows: int = 1


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a stage: weights as they are held, optimizer moments, what a step adds, the process itself."""

    weights: float
    moments: float
    step: float
    process: float

    @property
    def total(self) -> float:
        return self.weights + self.moments + self.step + self.process

    def __str__(self) -> str:
        parts = {"weights": self.weights, "moments": self.moments, "the step": self.step, "the process": self.process}
        return " + ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size >= 5e7)


def stage_memory(
    shape: MultimodalConfig, config: ExperimentConfig, stage: StageConfig, kind: str, size: SampleSize | None = None
) -> Memory:
    """Predicted peak of one process that trains `stage` on a device of `kind` ("cpu", "cuda", "mps").

    `size` is that of the largest samples; None: rows of `data.max_length` tokens, all targets but those of an image.
    """
    size = size or SampleSize(config.data.max_length, max(1, config.data.max_length - shape.num_image_tokens))
    if isinstance(stage, RewardConfig):  # whose captions may all be as long as allowed, in one row beside the prompt
        said = stage.num_captions * stage.max_new_tokens
        size = replace(size, length=min(config.data.max_length, size.length + said), targets=said, rows=1)
    held, is_8bit = {}, config.training.optimizer == "adamw8bit"

    def build() -> MultimodalLLM:
        model = MultimodalLLM(shape)
        model.planned_for = kind
        prepare(model, uncompiled(config))
        train_only_(model, trained_parts(stage))
        held["float32"] = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
        if config.training.bf16:
            cast_(halved_weights(model), torch.bfloat16)
        held["weights"] = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
        trained = [p for p in model.parameters() if p.requires_grad]
        moments = {p: empty_moments(p).values() if is_8bit else (p, p) for p in trained}
        held["moments"] = sum(tensor.nbytes for pair in moments.values() for tensor in pair)
        held["moments"] += sum(p.nbytes for p in trained) * has_reference(stage)
        return model

    step = step_peak(
        build,
        rows=stage.batch_size * size.rows,
        length=size.length,
        targets=stage.batch_size * size.targets,
        images=stage.batch_size * size.images,
        bf16=config.training.bf16,
        micro_batches=min(2, stage.gradient_accumulation_steps),
    )
    # for validation and checkpoints, after a step has freed its tensors, all weights are float32 again
    step = max(GAPS[kind] * step, held["float32"] - held["weights"])
    return Memory(held["weights"], held["moments"], step, PROCESS_BYTES[kind])


def uncompiled(config: ExperimentConfig) -> ExperimentConfig:
    """The same without `training.compile`: compiled code takes no more memory, and needs contents to run."""
    return config.model_copy(update={"training": config.training.model_copy(update={"compile": False})})


def halved_weights(model: MultimodalLLM) -> list[nn.Parameter]:
    """The frozen weights that a run holds in bfloat16 where the language model's file is bfloat16, as Qwen2.5's is."""
    layers = [layer for layer in model.language_model.modules() if isinstance(layer, nn.Linear | nn.Embedding)]
    return list({id(p): p for layer in layers if not (p := layer.weight).requires_grad}.values())
