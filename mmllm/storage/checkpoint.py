"""Training state on disk, so that a run goes on bit for bit where it stopped.

    outputs/NAME/checkpoint-epoch-1-step-100/   the model directory that sample.py and transformers load, and
        training/optimizer.safetensors          <parameter>.exp_avg, <parameter>.exp_avg_sq
        training/state.json                     where in which stage, and what the run was told
        training/experiment.json                its configuration
        manifest.json                           sizes and checksums of all files, written last
    outputs/NAME/best_model -> checkpoint-...

The surprising fact: no format notices a flipped byte. safetensors loads it without a word, so "the newest checkpoint" is
the newest whose checksums agree. No random states are kept: the order of samples and the seed of each step are functions
of the step. Nothing here is a pickle. Next: saving.py (who writes the numbers, and when).
"""

import hashlib
import os
import re
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from mmllm.errors import CheckpointError, RunError
from mmllm.layers.quantized import count_parameters, count_weights
from mmllm.runtime.console import print_rank0
from mmllm.runtime.distributed import World, local, rows_for
from mmllm.runtime.files import read_json, write_json
from mmllm.storage.atomic import new_directory, publish, removed_on_error, reported
from mmllm.storage.sharded_file import Layout, create
from mmllm.storage.weights import read_safetensors

FORMAT = 1
NAME = re.compile(r"checkpoint-epoch-(\d+)-step-(\d+)")
BEST = "best_model"
MOMENTS = ("exp_avg", "exp_avg_sq")
MENDS = {"missing": "this checkpoint was not written to its end", "damaged": "the file is damaged"}


def checkpoint_name(epoch: int, step: int) -> str:
    return f"checkpoint-epoch-{epoch}-step-{step}"


def step_of(checkpoint: Path) -> int:
    match = NAME.fullmatch(checkpoint.name)
    if not match:
        raise CheckpointError(f"{checkpoint}: not the name of a checkpoint; it is called {checkpoint_name(1, 100)}")
    return int(match[2])


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, whole or not."""
    return sorted((path for path in directory.glob("checkpoint-*") if NAME.fullmatch(path.name)), key=step_of)


# Write ----------------------------------------------------------------------------------------------------------------


Files = dict[
    str, tuple[dict[str, Tensor], dict[str, str]]
]  # of a checkpoint: its name, its tensors, what it says of itself


def tensor_files(model: nn.Module, optimizer: torch.optim.Optimizer) -> Files:
    """All tensors of a checkpoint: those of the model's own files, and AdamW's moments by the names of the parameters."""
    states = {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}
    moments = {f"{name}.{moment}": state[moment] for name, state in states.items() for moment in MOMENTS}
    files = {name: (tensors, {"format": "pt"}) for name, tensors in model.tensor_files().items()}
    return files | {"training/optimizer.safetensors": (moments, {})}


def updates_of(optimizer: torch.optim.Optimizer) -> int:
    """How many updates AdamW has made."""
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)


def begin_checkpoint(folder: Path, model: nn.Module, layouts: dict[str, Layout], state: dict) -> Path:
    """A new directory under a temporary name, whole but for the numbers of its tensors; RunError leaves nothing behind.

    `state` is JSON; its "config" becomes experiment.json as well.
    """
    refuse_full_disk(folder.parent, model)
    with reported(folder), removed_on_error(new_directory(folder)) as temporary:
        (temporary / "training").mkdir()
        model.write_small_files(temporary)
        write_json(temporary / "training" / "state.json", state | {"format": FORMAT})
        write_json(temporary / "training" / "experiment.json", state["config"])
        for name, plan in layouts.items():
            create(temporary / name, plan)
    return temporary


def end_checkpoint(temporary: Path, folder: Path) -> None:
    """The manifest last, then everything to disk, then the name: until then nobody takes it for a checkpoint."""
    with reported(folder), removed_on_error(temporary):
        files = {str(path.relative_to(temporary)): _fingerprint(path) for path in _files(temporary)}
        write_json(temporary / "manifest.json", {"format": FORMAT, "files": files})
        publish(temporary, folder)


def refuse_full_disk(directory: Path, model: nn.Module) -> None:
    """RunError when the disk cannot take one more checkpoint (float32 weights, two moments) and a fifth more."""
    needed = 1.2 * 4 * (count_weights(model) + 2 * count_parameters(model, only_trainable=True))
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise RunError(
            f"no space left on {directory}: a checkpoint needs {needed / 1e9:.1f} GB, has {free / 1e9:.1f} GB"
        )


def _fingerprint(path: Path) -> dict:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def point_best(directory: Path, checkpoint: str) -> None:
    """Make best_model name `checkpoint`, in one step that a reader never sees half done."""
    temporary = directory / f".{BEST}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(checkpoint)
    os.replace(temporary, directory / BEST)


def prune(directory: Path, keep: int, best: str | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    for checkpoint in checkpoints(directory)[:-keep]:
        if checkpoint.name != best:
            _remove(checkpoint)


def clean(directory: Path) -> None:
    """Remove what a run that was killed left half written or half removed."""
    for path in directory.glob(".checkpoint-*"):
        shutil.rmtree(path)


def remove_all(directory: Path) -> None:
    """Remove every checkpoint of a run."""
    (directory / BEST).unlink(missing_ok=True)
    for checkpoint in checkpoints(directory):
        _remove(checkpoint)


def set_aside_later(directory: Path, step: int) -> None:
    """Rename the checkpoints after `step`, where a resumed run starts: they are of a future that it leaves."""
    for checkpoint in checkpoints(directory):
        if step_of(checkpoint) > step:
            target = checkpoint.with_name(f"set-aside-{checkpoint.name}")
            shutil.rmtree(target, ignore_errors=True)
            checkpoint.rename(target)
            print_rank0(f"{checkpoint} is later than the start of this run: renamed to {target.name}")


def _remove(checkpoint: Path) -> None:
    """Rename first: a checkpoint that is half removed must not look like one."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


# Read -----------------------------------------------------------------------------------------------------------------


def verify(checkpoint: Path) -> None:
    """CheckpointError naming the first file that is missing or is not as it was written."""
    manifest = read_json(checkpoint / "manifest.json", **MENDS)
    if manifest.get("format") != FORMAT or not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"{checkpoint / 'manifest.json'}: not a manifest of this version")
    for name, written in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, but the manifest lists it")
        size = path.stat().st_size
        if size != written["bytes"]:
            raise CheckpointError(f"{path}: {size:,} bytes, {written['bytes']:,} were written")
        if _fingerprint(path) != written:
            raise CheckpointError(f"{path}: its checksum is not the one that was written; the file is damaged")


def newest(directory: Path) -> Path | None:
    """The newest checkpoint that is whole; a line names each newer one and why it is not used."""
    for checkpoint in reversed(checkpoints(directory)):
        try:
            verify(checkpoint)
            return checkpoint
        except CheckpointError as error:
            print_rank0(f"warning: {error}; trying the checkpoint before it")
    return None


def read_state(checkpoint: Path) -> dict:
    """The state that `save_checkpoint` was given, and the number of updates."""
    return read_json(checkpoint / "training" / "state.json", **MENDS)


def load_optimizer_(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, updates: int, world: World
) -> None:
    """Give `optimizer` the moments of the checkpoint, by the names of the parameters; of each this process's rows."""
    file = checkpoint / "training" / "optimizer.safetensors"
    tensors = read_safetensors(file)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name in sorted({key.rpartition(".")[0] for key in tensors}):
        if name not in trained:
            raise CheckpointError(f"{file}: moments of {name}, which this run does not train")
        parameter = trained[name]
        moments = {moment: torch.empty_like(parameter) for moment in MOMENTS}
        for moment, value in moments.items():
            found = tensors[f"{name}.{moment}"]
            if found.shape != parameter.shape:
                shapes = f"{list(found.shape)} where {list(parameter.shape)} is needed"
                raise CheckpointError(f"{file}: {name} is {shapes}")
            local(value).copy_(rows_for(value, found, world))
        step = torch.tensor(float(updates), device=parameter.device)  # on its device: what the fused form asks for
        optimizer.state[parameter] = {"step": step, **moments}
