"""Where memory runs out in training: one line with the settings to try next."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from mmllm.config.schema import ExperimentConfig
from mmllm.errors import RunError
from mmllm.runtime.memory import peak_memory


@contextmanager
def named_out_of_memory(
    config: ExperimentConfig, number: int, device: torch.device, place: Callable[[], str] = lambda: "at its start"
) -> Iterator[None]:
    """Turn an out-of-memory error in stage `number` into a RunError with the settings to try; other errors pass.

    `place()` says where in the stage the run is.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        stage = config.stages()[number - 1]
        where = ", ".join([place(), *getattr(error, "__notes__", ())])
        raise RunError(
            f"out of memory at {peak_memory(device) / 1e9:.1f} GB in stage {number}, {where}, with batches of "
            f"{stage.batch_size} samples; try {smaller(config, number)}"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. Torch's allocator for the CPU raises a plain RuntimeError: only its message tells."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def smaller(config: ExperimentConfig, number: int) -> str:
    """The settings to try where stage `number` did not fit: first those that keep the gradient."""
    stage, own = config.stages()[number - 1], f"training.stage{number}"
    names = (f"{own}.batch_size", f"{own}.gradient_accumulation_steps")
    if all(config.get(name) is None for name in names):
        names = ("data.batch_size", "training.gradient_accumulation_steps")
    tries = []
    if stage.batch_size > 1:
        size = stage.batch_size // 2
        accumulation = -(-stage.batch_size * stage.gradient_accumulation_steps // size)
        tries.append(f"{names[0]}={size} {names[1]}={accumulation} (the gradient is the same)")
    if not config.training.gradient_checkpointing:
        tries.append("training.gradient_checkpointing=true (slower, the gradient is the same)")
    if not tries:
        tries.append(f"data.max_length={max(1, config.data.max_length // 2)}")
    if not config.model.use_lora and "language_model" in stage.train:
        tries.append("model.use_lora=true")
    return ", or ".join(tries)
