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
    tries = [
        " ".join(f"{name}={value}" for name, value in family[0].items()) + f" ({effect})"
        for family, effect in changes(config, number)
        if not {"model.load_in_8bit", "training.optimizer"} & family[0].keys()
    ]
    if not any("gradient" in text for text in tries):
        tries.insert(0, f"data.max_length={max(1, config.data.max_length // 2)}")
    return ", or ".join(tries)


def changes(config: ExperimentConfig, number: int) -> Iterator[tuple[list[dict[str, str]], str]]:
    """Ways to need less memory in stage `number`, with their effect: first those that keep the gradient.

    Each is a list of settings to choose from, from the smallest change to the largest.
    """
    stage, names = config.stages()[number - 1], batch_names(config, number)
    samples, size, halves = stage.batch_size * stage.gradient_accumulation_steps, stage.batch_size, []
    while size > 1:
        size //= 2
        halves.append({names[0]: str(size), names[1]: str(-(-samples // size))})
    if halves:
        yield halves, "the gradient is the same"
    if not config.training.gradient_checkpointing:
        yield [{"training.gradient_checkpointing": "true"}], "slower, the gradient is the same"
    if "language_model" in stage.train:
        if config.training.optimizer == "adamw" and not config.model.use_lora:
            yield [{"training.optimizer": "adamw8bit"}], "moments of 8 bits"
        if not config.model.use_lora:
            yield [{"model.use_lora": "true"}], "adapters instead of all weights, at about ten times the rate"
        if not (config.model.load_in_8bit or config.model.load_in_4bit):
            yield [{"model.use_lora": "true", "model.load_in_8bit": "true"}], "adapters beside int8 weights"


def batch_names(config: ExperimentConfig, number: int) -> tuple[str, str]:
    """The settings that stage `number` takes its batch size and accumulation from."""
    own = (f"training.stage{number}.batch_size", f"training.stage{number}.gradient_accumulation_steps")
    if all(config.get(name) is None for name in own):
        return "data.batch_size", "training.gradient_accumulation_steps"
    return own
