"""Training state on disk, so that a run goes on bit for bit where it stopped.

    outputs/NAME/checkpoint-epoch-1-step-100/   the model directory that sample.py and transformers load, and
        training/optimizer.safetensors          <parameter>.exp_avg, <parameter>.exp_avg_sq
        training/state.json                     where in which stage, and what the run was told
        training/experiment.json                its configuration
        manifest.json                           sizes and checksums of all files, written last
    outputs/NAME/best_model -> checkpoint-...

The surprising fact: no format notices a flipped byte. safetensors loads it without a word, so "the newest checkpoint" is
the newest whose checksums agree. No random states are kept: the order of samples and the seed of each step are functions
of the step. Nothing here is a pickle. Next: trainer.py.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmllm.errors import CheckpointError, RunError
from mmllm.log import say
from mmllm.surgery import count_parameters, count_weights
from mmllm.weights import atomic_directory

FORMAT = 1
NAME = re.compile(r"checkpoint-epoch-(\d+)-step-(\d+)")
BEST = "best_model"
MOMENTS = ("exp_avg", "exp_avg_sq")


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


def save_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Write everything under a temporary name, force it to disk and rename it; RunError leaves nothing behind.

    `state` is JSON; its "config" becomes experiment.json as well.
    """
    refuse_full_disk(folder.parent, model)
    try:
        with atomic_directory(folder, replace=True) as temporary:
            model.write_files(temporary)
            training = temporary / "training"
            training.mkdir()
            tensors, updates = optimizer_tensors(model, optimizer)
            save_file(tensors, training / "optimizer.safetensors")
            _write_json(training / "state.json", state | {"format": FORMAT, "updates": updates})
            _write_json(training / "experiment.json", state["config"])
            files = {str(path.relative_to(temporary)): _fingerprint(path) for path in _files(temporary)}
            _write_json(temporary / "manifest.json", {"format": FORMAT, "files": files})
    except SafetensorError as error:  # a full disk, in the words of the library
        raise RunError(f"{folder}: cannot be written ({error}); nothing was left behind") from error


def refuse_full_disk(directory: Path, model: nn.Module) -> None:
    """RunError when the disk cannot take one more checkpoint (float32 weights, two moments) and a fifth more."""
    needed = 1.2 * 4 * (count_weights(model) + 2 * count_parameters(model, only_trainable=True))
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise RunError(
            f"no space left on {directory}: a checkpoint needs {needed / 1e9:.1f} GB, has {free / 1e9:.1f} GB"
        )


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], int]:
    """AdamW's moments by the names of the parameters, and how many updates it has made."""
    states = {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}
    tensors = {f"{name}.{moment}": state[moment] for name, state in states.items() for moment in MOMENTS}
    updates = {int(state["step"]) for state in states.values()} or {0}
    return tensors, max(updates)


def _fingerprint(path: Path) -> dict:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


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
            say(f"{checkpoint} is later than the start of this run: renamed to {target.name}")


def _remove(checkpoint: Path) -> None:
    """Rename first: a checkpoint that is half removed must not look like one."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


# Read -----------------------------------------------------------------------------------------------------------------


def verify(checkpoint: Path) -> None:
    """CheckpointError naming the first file that is missing or is not as it was written."""
    manifest = _read_json(checkpoint / "manifest.json")
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
            say(f"warning: {error}; trying the checkpoint before it")
    return None


def read_state(checkpoint: Path) -> dict:
    """The state that `save_checkpoint` was given, and the number of updates."""
    return _read_json(checkpoint / "training" / "state.json")


def load_optimizer_(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Give `optimizer` the moments of the checkpoint, by the names of the parameters."""
    file = checkpoint / "training" / "optimizer.safetensors"
    tensors = load_file(file)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name in sorted({key.rpartition(".")[0] for key in tensors}):
        if name not in trained:
            raise CheckpointError(f"{file}: moments of {name}, which this run does not train")
        parameter = trained[name]
        moments = {moment: tensors[f"{name}.{moment}"].to(parameter.device) for moment in MOMENTS}
        if any(value.shape != parameter.shape for value in moments.values()):
            found = list(moments["exp_avg"].shape)
            raise CheckpointError(f"{file}: {name} is {found} where {list(parameter.shape)} is needed")
        step = torch.tensor(float(updates), device=parameter.device)  # on its device: what the fused form asks for
        optimizer.state[parameter] = {"step": step, **moments}


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing; this checkpoint was not written to its end") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not JSON; the file is damaged") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object; the file is damaged")
    return content
