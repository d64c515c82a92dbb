"""Whether a run may begin, and from where: what is refused before a weight is read.

A run that silently continues with other data or another model looks healthy. So the data files are compared by checksum,
and every setting that has changed since the checkpoint is refused or printed.
"""

import hashlib
import shutil
from contextlib import ExitStack
from pathlib import Path

from mmllm.config.schema import ExperimentConfig, flat
from mmllm.config.sources import load
from mmllm.data.formats import content_files
from mmllm.errors import CheckpointError, ConfigError, DataError, UserError
from mmllm.models.multimodal import MultimodalLLM
from mmllm.runtime.console import print_rank0
from mmllm.runtime.files import locked, sha256_of
from mmllm.storage import checkpoint as disk
from mmllm.training.prepare import trained_parts
from mmllm.training.reward import has_reference
from mmllm.training.run import Position, TrainingData, is_stale
from mmllm.training.stage import steps_per_epoch

DATA_FILES = {"train": "data.train_data_path", "val": "data.val_data_path", "features": "data.features_path"}


def data_sha256(config: ExperimentConfig) -> dict[str, str]:
    """The checksums of the data files, by "train" and, where they are set, "val" and "features".

    VQAv2's annotations beside the questions are part of them, and the texts of a folder.
    """
    paths = {split: config.get(name) for split, name in DATA_FILES.items()}
    if paths["train"] is None:
        raise ConfigError("data.train_data_path is not set; name a data file: data.train_data_path=FILE")
    sums = {}
    for split, path in paths.items():
        if path is not None:
            try:
                parts = [sha256_of(part) for part in content_files(path)]
                digest = "+".join(parts)
                sums[split] = digest if len(parts) <= 8 else hashlib.sha256(digest.encode()).hexdigest()
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror}); it is {DATA_FILES[split]}") from error
    return sums


def open_directory(config: ExperimentConfig, at_end: ExitStack) -> Path:
    """The directory of the run, locked until `at_end`; UserError where another run holds it or nothing can be written."""
    directory = Path(config.output_dir).expanduser() / config.experiment_name
    try:
        directory.mkdir(parents=True, exist_ok=True)
        at_end.enter_context(locked(directory))
    except OSError as error:
        raise UserError(f"{directory}: cannot be written to ({error.strerror}); choose another output_dir") from error
    disk.clean(directory)
    return directory


def find_checkpoint(directory: Path, resume: str | None, overwrite: bool) -> Path | None:
    """The checkpoint to resume from, None for a new run; UserError where that would overwrite another run unasked."""
    existing = disk.checkpoints(directory)
    if resume == "auto":
        found = disk.newest(directory)
        if existing and not found:
            raise CheckpointError(f"{directory}: none of its checkpoints is whole; start over with --overwrite")
        if not found:
            pruned = (
                ", whose checkpoints are gone; its logs are replaced" if (directory / "metrics.jsonl").exists() else ""
            )
            print_rank0(f"nothing to resume in {directory}{pruned}: a new run begins")
        return found
    found = None
    if resume is not None:
        found = chosen_checkpoint(Path(resume))
        if found.parent.resolve() == directory.resolve():
            return found
    if existing and not overwrite:
        raise UserError(
            f"{directory}: holds a run already ({existing[-1].name}); go on with --resume auto, start over with "
            "--overwrite, or choose another experiment_name"
        )
    return found


def chosen_checkpoint(path: Path) -> Path:
    """The checkpoint at `path`, verified, or the newest whole one where `path` is the directory of a run."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint; name one, or use --resume auto")
    path = path.resolve() if path.is_symlink() else path
    if disk.NAME.fullmatch(path.name):
        disk.verify(path)
        return path
    found = disk.newest(path)
    if found is None:
        what = "none of its checkpoints is whole" if disk.checkpoints(path) else "holds no checkpoint"
        raise CheckpointError(f"{path}: {what}; begin the run anew, without --resume")
    return found


def refuse_changes(
    config: ExperimentConfig,
    checkpoint: Path,
    state: dict,
    sha256: dict[str, str],
    allow_data_change: bool,
    processes: int = 1,
) -> None:
    """UserError for a setting that a resumed run cannot change; a line for each that it may."""
    old = load(checkpoint / "training" / "experiment.json")
    was, now = flat(old), flat(config)
    changed = {
        name: f"{name}: {was[name]!r} at the checkpoint, {now[name]!r} now" for name in now if was[name] != now[name]
    }
    fixed_names = (
        "seed",
        "training.optimizer",
        "data.share_images",
        "data.val_fraction",
        f"training.stage{state['stage']}.train",
        *(("training.stage3.kl_weight",) if state["stage"] == 3 else ()),
    )
    fixed = [line for name, line in changed.items() if name.startswith("model.") or name in fixed_names]
    stages = [c.stages()[state["stage"] - 1] for c in (old, config)]
    counts = (state.get("processes", 1), processes)
    sizes = [s.batch_size * s.gradient_accumulation_steps * n for s, n in zip(stages, counts, strict=True)]
    if sizes[0] != sizes[1]:
        what = "samples of a step (batch_size x gradient_accumulation_steps x processes)"
        fixed.append(f"{what}: {sizes[0]} then, {sizes[1]} now")
    if fixed:
        raise CheckpointError(f"{checkpoint} cannot be resumed with another {'; '.join(fixed)}")
    for split in sha256.keys() & state["data_sha256"].keys():
        if sha256[split] != state["data_sha256"][split] and not allow_data_change:
            path = config.get(DATA_FILES[split])
            raise DataError(f"{path}: not the file of the checkpoint any more; go on anyway with --allow-data-change")
    if counts[0] != counts[1]:
        print_rank0(f"changed: processes: {counts[0]} at the checkpoint, {counts[1]} now")
    for name, line in sorted(changed.items()):
        if name not in ("output_dir", "experiment_name"):
            print_rank0(f"changed: {line}")


def refuse_other_count(config: ExperimentConfig, state: dict, num_samples: int) -> None:
    """DataError where another number of samples of the same file is used: their order would differ."""
    if state["num_samples"] != num_samples:
        raise DataError(
            f"{config.data.train_data_path}: {num_samples} samples are used, {state['num_samples']} were at the "
            "checkpoint; undo what changed their number, or go on with --allow-data-change"
        )


def stage_positions(
    config: ExperimentConfig, num_samples: int, checkpoint: Path | None, state: dict, processes: int = 1
) -> tuple[list[Position], int]:
    """Where each stage that is left begins, and the number of steps of the whole run. `state` {}: a new run."""
    stages = config.stages()
    for number, stage in enumerate(stages, 1):
        if stage.epochs and not stage.train:
            raise ConfigError(f"training.stage{number}.train is empty; name what it trains, or set its epochs to 0")
    steps = [stage.epochs and stage.epochs * steps_per_epoch(stage, num_samples, processes) for stage in stages]
    if not sum(steps):
        raise ConfigError("all stages have 0 epochs; set training.stage1.epochs or training.stage2.epochs")
    epochs = [sum(stage.epochs for stage in stages[:number]) for number in range(len(stages))]  # before each stage
    number, total, positions = 0, 0, []
    if state:
        number, done = state["stage"], state["stage_step"]
        before = (state["step"] - done, epochs[number - 1])
        positions = [Position(number, *before, done, state["updates"], state["is_pending"], checkpoint)]
        total = max(before[0] + steps[number - 1], state["step"])
    for later in range(number + 1, len(stages) + 1):
        positions += [Position(later, total, epochs[later - 1])] * bool(steps[later - 1])
        total += steps[later - 1]
    if not state:
        return positions, total
    is_over = state["step"] == total or is_stale(config, number, state.get("stale", 0))
    is_finished = is_over and not state["is_pending"]
    return [] if is_finished else positions, total


def refuse_small_disk(
    config: ExperimentConfig,
    model: MultimodalLLM,
    data: TrainingData,
    directory: Path,
    positions: list[Position],
    processes: int,
) -> None:
    """UserError where the checkpoints of the run do not fit: those that are kept, the best, and the one being written."""
    weights = sum(tensor.nbytes for file in model.tensor_files().values() for tensor in file.values())
    moments, saves, training = 0, 0, config.training
    for position in positions:
        stage = config.stages()[position.stage - 1]
        parts = trained_parts(stage)
        trained = [p.numel() for name, p in model.named_parameters() if p.requires_grad and name.split(".")[0] in parts]
        of_each = (2.03 if training.optimizer == "adamw8bit" else 8) + 4 * has_reference(stage)
        moments = max(moments, sum(trained) * of_each)
        per_epoch = steps_per_epoch(stage, len(data.train), processes)
        every = training.save_steps or per_epoch
        saves += -(-stage.epochs * per_epoch // every) - position.done // every
    existing = disk.checkpoints(directory)
    held = sum(path.stat().st_size for checkpoint in existing for path in checkpoint.rglob("*") if path.is_file())
    kept = len(existing) if positions[0].checkpoint in existing else 0
    most = min(training.keep_checkpoints + 1 + bool(data.val), kept + saves)
    needed, free = disk.ROOM * most * (weights + moments), held + shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(
            f"{directory}: too little space: up to {most} checkpoints of {(weights + moments) / 1e9:.1f} GB need "
            f"{needed / 1e9:.1f} GB, and there are {free / 1e9:.1f} GB; free some, lower training.keep_checkpoints, or "
            "choose another output_dir"
        )
