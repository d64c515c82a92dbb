"""Training state on disk, so that a run continues bit for bit where it stopped.

    outputs/NAME/checkpoint-epoch-1-step-100/   the model directory that sample.py and transformers load, and
        training/optimizer.safetensors          <parameter>.exp_avg, <parameter>.exp_avg_sq (and their scales, of 8 bits),
                                            in stage 3 <parameter>.reference, as it was before the stage
        training/state.json                     the stage, its step, and the settings of the run
        training/experiment.json                its configuration
        manifest.json                           sizes and checksums of all files, written last
    outputs/NAME/best_model -> checkpoint-...   a link, or a copy where there are none

No format notices a flipped byte, safetensors neither, so "the newest checkpoint" is the newest whose checksums agree.
No random states are kept: the order of samples and the seed of each step are functions of the step.
"""

import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from mmllm.errors import CheckpointError, RunError
from mmllm.runtime.console import print_rank0
from mmllm.runtime.distributed import World, local, rows_for
from mmllm.runtime.files import read_json, sha256_of, typed, write_json, writing
from mmllm.storage.atomic import new_directory, publish, removed_on_error
from mmllm.storage.sharded_file import Layout, create
from mmllm.storage.weights import read_safetensors

FORMAT = 1
NAME = re.compile(r"checkpoint-epoch-(\d+)-step-(\d+)")
BEST = "best_model"
OPTIMIZER = "training/optimizer.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")
ROOM = 1.05  # free space that a checkpoint needs, over the size of its tensors
MENDS = {"missing": "this checkpoint was not written to its end", "damaged": "the file is damaged"}


def checkpoint_name(epoch: int, step: int) -> str:
    return f"checkpoint-epoch-{epoch}-step-{step}"


def step_of(checkpoint: Path) -> int:
    return int(NAME.fullmatch(checkpoint.name)[2])


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, whole or not."""
    return sorted((path for path in directory.glob("checkpoint-*") if NAME.fullmatch(path.name)), key=step_of)


# Write


def moments_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's moments, by the names of the parameters; with their scales where they are of 8 bits."""
    states = {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}
    return {f"{name}.{key}": state[key] for name, state in states.items() for key in state if key != "step"}


def begin_checkpoint(folder: Path, model: nn.Module, layouts: dict[str, Layout], state: dict) -> Path:
    """A new directory under a temporary name that lacks only the numbers of its tensors; RunError leaves nothing behind.

    `state` is JSON; its "config" becomes experiment.json as well.
    """
    refuse_full_disk(folder.parent, sum(plan.size for plan in layouts.values()))
    with writing(folder), removed_on_error(new_directory(folder)) as temporary:
        (temporary / "training").mkdir()
        model.write_small_files(temporary)
        write_json(temporary / "training" / "state.json", state | {"format": FORMAT})
        write_json(temporary / "training" / "experiment.json", state["config"])
        for name, plan in layouts.items():
            create(temporary / name, plan)
    return temporary


def end_checkpoint(temporary: Path, folder: Path) -> None:
    """Write the manifest last, wait until everything is on disk, then rename: until then it is no checkpoint."""
    with writing(folder), removed_on_error(temporary):
        paths = sorted(path for path in temporary.rglob("*") if path.is_file())
        files = {str(path.relative_to(temporary)): asdict(_fingerprint(path)) for path in paths}
        write_json(temporary / "manifest.json", {"format": FORMAT, "files": files})
        publish(temporary, folder)


def refuse_full_disk(directory: Path, size: int) -> None:
    """RunError where the disk has no room for `size` bytes and a little more."""
    needed, free = ROOM * size, shutil.disk_usage(directory).free
    if free < needed:
        raise RunError(
            f"no space left on {directory}: a checkpoint needs {needed / 1e9:.1f} GB, has {free / 1e9:.1f} GB"
        )


@dataclass(frozen=True)
class _Fingerprint:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class _Manifest:
    format: Literal[FORMAT]
    files: dict[str, _Fingerprint]


def _fingerprint(path: Path) -> _Fingerprint:
    return _Fingerprint(path.stat().st_size, sha256_of(path))


# Rename and remove


def point_best(directory: Path, checkpoint: str) -> None:
    """Let best_model name `checkpoint`, atomically. Where a disk has no symbolic links it is a copy for inference."""
    best, temporary = directory / BEST, directory / f".{BEST}.tmp"
    remove(temporary)
    try:
        temporary.symlink_to(checkpoint)
    except OSError:
        if is_copy(best, directory / checkpoint):
            return
        ignore = shutil.ignore_patterns("training")
        shutil.copytree(directory / checkpoint, temporary, ignore=ignore, copy_function=link_or_copy)
    if not temporary.is_symlink() or not best.is_symlink():
        remove(best)  # a folder cannot be replaced
    os.replace(temporary, best)


def is_copy(best: Path, checkpoint: Path) -> bool:
    """Whether best_model is a copy of `checkpoint`: the manifests hold the checksums of all their files."""
    paths = [folder / "manifest.json" for folder in (best, checkpoint)]
    return all(path.is_file() for path in paths) and paths[0].read_bytes() == paths[1].read_bytes()


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def remove(path: Path) -> None:
    """Remove a folder, a link or a file, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def prune(directory: Path, keep: int, best: str | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    for checkpoint in checkpoints(directory)[: -keep or None]:
        if checkpoint.name != best:
            doomed = checkpoint.with_name(f".{checkpoint.name}.old")  # half removed, it must not look like a checkpoint
            shutil.rmtree(doomed, ignore_errors=True)
            checkpoint.rename(doomed)
            shutil.rmtree(doomed)


def clean(directory: Path) -> None:
    """Remove what a run that was killed left half written or half removed."""
    for path in (*directory.glob(".checkpoint-*"), directory / f".{BEST}.tmp"):
        remove(path)


def remove_all(directory: Path) -> None:
    """Remove every checkpoint of a run."""
    remove(directory / BEST)
    prune(directory, keep=0, best=None)


def set_aside_later(directory: Path, step: int) -> None:
    """Rename the checkpoints after `step`, where a resumed run starts: it will reach those steps again."""
    for checkpoint in checkpoints(directory):
        if step_of(checkpoint) > step:
            target = checkpoint.with_name(f"set-aside-{checkpoint.name}")
            shutil.rmtree(target, ignore_errors=True)
            checkpoint.rename(target)
            print_rank0(f"{checkpoint} is later than the start of this run: renamed to {target.name}")


# Read


def verify(checkpoint: Path) -> None:
    """CheckpointError naming the first file that is missing or differs from what was written."""
    file = checkpoint / "manifest.json"
    for name, written in typed(_Manifest, read_json(file, **MENDS), file).files.items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, but the manifest lists it")
        found = path.stat().st_size
        if found != written.bytes:
            raise CheckpointError(f"{path}: {found:,} bytes, {written.bytes:,} were written")
        if _fingerprint(path) != written:
            raise CheckpointError(f"{path}: its checksum is not the one that was written; the file is damaged")


def newest(directory: Path) -> Path | None:
    """The newest checkpoint that is whole; prints why each newer one is not used."""
    for checkpoint in reversed(checkpoints(directory)):
        try:
            verify(checkpoint)
            return checkpoint
        except CheckpointError as error:
            print_rank0(f"warning: {error}; trying the checkpoint before it")
    return None


def read_state(checkpoint: Path) -> dict:
    """The state that `CheckpointWriter.begin` was given, and the number of updates."""
    return read_json(checkpoint / "training" / "state.json", **MENDS)


def load_optimizer_(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, updates: int, world: World
) -> None:
    """Give `optimizer` the moments of the checkpoint, by the names of the parameters; this process's rows of each."""
    file = checkpoint / OPTIMIZER
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_safetensors(file).items():
        name, _, kind = key.rpartition(".")
        states.setdefault(name, {})[kind] = tensor
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, found in sorted(states.items()):
        if name not in trained:
            raise CheckpointError(f"{file}: moments of {name}, which this run does not train")
        parameter = trained[name]
        own = {}
        for kind, tensor in found.items():
            is_like_parameter = kind in (*MOMENTS, "reference")
            if is_like_parameter and tensor.shape != parameter.shape:
                wanted = list(parameter.shape)
                raise CheckpointError(f"{file}: {name} is {list(tensor.shape)} where {wanted} is needed")
            if is_like_parameter:
                own[kind] = torch.empty_like(parameter, dtype=tensor.dtype)
                local(own[kind]).copy_(rows_for(own[kind], tensor, world))
            else:  # the scales of 8-bit moments, which are never sharded
                own[kind] = tensor.to(parameter.device, copy=True)
        step = torch.tensor(float(updates), device=parameter.device)  # fused AdamW wants it on the device
        optimizer.state[parameter] = {"step": step, **own}
