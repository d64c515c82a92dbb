"""Predicted and measured peak memory of a training step, side by side: is `--dry-run` right?

Memory, unlike time, can be measured on a busy machine. Each case is a process of its own that takes three steps on random
weights; in between, its frozen weights change precision as for a validation.
"""

import torch

from benchmarks.random_model import sizes
from benchmarks.runner import Work, compete
from benchmarks.train import BY_NAME, OURS, TARGETS, TOKENS, configuration, forget_peak, own_model, steps_of
from mmllm.runtime.console import print_rank0
from mmllm.runtime.device import choose_device
from mmllm.runtime.memory import peak_memory
from mmllm.training.prepare import cast_
from mmllm.training.step_memory import SampleSize, stage_memory

CASES = ("stage 1", "stage 2, full", "stage 2, LoRA", "stage 2, LoRA on int8")
VARIANTS = tuple((bf16, checkpointing) for bf16 in (True, False) for checkpointing in (False, True))


def label(case: str, bf16: bool, checkpointing: bool) -> str:
    return f"{case}, {'bfloat16' if bf16 else 'float32'}{', checkpointing' if checkpointing else ''}"


def measure(names: list[str], spec: dict, variants: tuple[tuple[bool, bool], ...] = VARIANTS) -> list[dict]:
    """A row for each case and each of `variants` (bfloat16, checkpointing); `spec` says size, layers, rows and device."""
    rows = []
    for case in names:
        for bf16, checkpointing in variants:
            name = label(case, bf16, checkpointing)
            settings = [f"training.gradient_checkpointing={'true' if checkpointing else 'false'}"]
            mine = spec | {"bench": "memory", "case": case, "contestant": OURS, "bf16": bf16, "settings": settings}
            (row,) = compete([mine | {"turns": [{"case": name}]}], rounds=2)
            predicted = predicted_bytes(mine)
            row |= {"predicted_bytes": predicted, "error": predicted / row["peak_bytes"] - 1}
            print_rank0(
                f"  {name}: {predicted / 1e9:.2f} GB predicted, {row['peak_bytes'] / 1e9:.2f} measured ({row['error']:+.0%})"
            )
            rows.append(row)
    return rows


def predicted_bytes(spec: dict) -> float:
    """What `--dry-run` predicts for this step."""
    config = configuration(spec)
    stage = config.stages()[BY_NAME[spec["case"]].stage - 1]
    kind, shape = torch.device(spec["device"]).type, sizes(spec["size"], spec["layers"])
    return stage_memory(shape, config, stage, kind, SampleSize(TOKENS, TARGETS)).total


def build(spec: dict) -> tuple[dict, Work]:
    config, device = configuration(spec), choose_device(spec["device"])
    model, stage = own_model(spec, config)
    step, held = steps_of(spec, config, model, stage), [p for p in model.parameters() if p.dtype == torch.bfloat16]
    forget_peak(device)  # that of loading

    def turn(asked: dict) -> dict:
        step()
        for dtype in (torch.float32, torch.bfloat16):  # as before and after a validation
            cast_(held, dtype)
        return {"peak_bytes": peak_memory(device)}

    return {"rows": spec["rows"]}, turn
