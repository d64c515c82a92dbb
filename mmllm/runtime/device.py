"""Where the numbers live: CUDA, then Apple's MPS, then the CPU."""

from contextlib import AbstractContextManager, nullcontext

import torch

from mmllm.errors import UserError


def choose_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" takes the best one there is. A device that was asked for is never replaced."""
    here = ["cpu"]
    if torch.backends.mps.is_available():
        here.insert(0, "mps")
    if torch.cuda.is_available():
        here.insert(0, "cuda")
    if name == "auto":
        return torch.device(here[0])
    if name.partition(":")[0] not in here:
        raise UserError(f"device {name!r} is not available here; this machine has {', '.join(here)}")
    return torch.device(name)


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager:
    """Low-precision products inside the block: bfloat16, or none at all when `bf16` is False."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given: before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
