"""From a configuration to a finished run: what `train.py` does once its arguments are read.

The surprising fact: most of it is refusing early. Whatever can be wrong with settings, data, disk or checkpoint is found
before the first weight is read, because the alternative is finding it after the first epoch.
Next: trainer.py, resume.py.
"""

import os
import shutil
import signal
import time
from contextlib import closing
from pathlib import Path

import torch

from mmllm.config.schema import ExperimentConfig, explain
from mmllm.data.batches import sample_order
from mmllm.data.chat import marked
from mmllm.data.checks import checked_samples
from mmllm.data.features import FeatureCache, FeatureTable
from mmllm.data.packing import encode_shared
from mmllm.data.samples import Sample
from mmllm.errors import ConfigError
from mmllm.models.multimodal import MultimodalLLM
from mmllm.reporting.log import OtherLog, RunLog, record_start, start_wandb, write_report
from mmllm.runtime.console import duration, print_rank0, warned_of_disk
from mmllm.runtime.distributed import World
from mmllm.runtime.memory import keep_freed_memory
from mmllm.runtime.signals import StopSignal
from mmllm.storage import checkpoint as disk
from mmllm.storage.atomic import reported
from mmllm.storage.checkpoint_writer import CheckpointWriter
from mmllm.training.fsdp import is_wanted, shard_
from mmllm.training.out_of_memory import named_out_of_memory, peak_flops
from mmllm.training.prepare import prepare
from mmllm.training.resume import data_sha256, find_checkpoint, open_directory, refuse_changes, refuse_other_count
from mmllm.training.stage import Position, Run, run_stage, steps_per_epoch


def train(
    config: ExperimentConfig,
    origins: dict[str, str] | None = None,
    *,
    resume: str | None = None,
    overwrite: bool = False,
    allow_data_change: bool = False,
) -> int:
    """Run both stages. Returns the exit code: 0, or 128 + the number of the signal that stopped it (after saving).

    `resume` is "auto" (the newest whole checkpoint of this run, or a new run), a checkpoint, or the directory of a run.
    """
    with World.start(config.device, config.training.timeout_s) as world:
        return train_in(world, config, origins or {}, resume, overwrite, allow_data_change)


def train_in(
    world: World,
    config: ExperimentConfig,
    origins: dict[str, str],
    resume: str | None,
    overwrite: bool,
    allow_data_change: bool,
) -> int:
    """What `train` does in each of the processes."""
    device = world.device
    sha256 = data_sha256(config)
    directory = world.on_rank0(lambda: open_directory(config))
    checkpoint = world.on_rank0(lambda: find_checkpoint(directory, resume, overwrite))
    state = disk.read_state(checkpoint) if checkpoint else None
    if state:
        refuse_changes(config, checkpoint, state, sha256, allow_data_change, world.size)
    for line in explain(config, origins):
        print_rank0(f"  {line}")
    settle_precision(config, device)
    is_spread = is_wanted(config, world.size)
    model = load_model(config, origins, checkpoint, None if is_spread else device)
    prepare(model, config)
    if is_spread:
        shard_(model, world, reshard_after_forward=config.training.reshard_after_forward)
    keep_freed_memory(device)  # not what loading needed
    table = feature_table(config, model)
    train_samples, val_samples = load_data(config, model, directory if world.is_first else None, table)
    if state and not allow_data_change:
        refuse_other_count(config, state, len(train_samples))
    positions, total_steps = stage_positions(config, len(train_samples), checkpoint, state, world.size)
    if not positions:
        print_rank0(f"{checkpoint}: already at step {state['step']} of {total_steps}; nothing is left to train")
        return 0
    read_image = (
        fill_cache(config, model, [*train_samples, *val_samples], world) if config.data.cache_features else table
    )
    with (
        StopSignal() as stop,
        closing(begin(config, origins, directory, checkpoint, state, world)) as log,
        CheckpointWriter(world, checkpoint and checkpoint.name) as writer,
    ):
        run = Run(
            config,
            directory,
            train_samples,
            val_samples,
            log,
            stop,
            world,
            writer,
            data_sha256=sha256,
            total_steps=total_steps,
            best=best_of(directory, state, sha256),
            tokens=state.get("tokens", 0) if state else 0,
            flops=(peak_flops(device) or 0) * world.size or None,
            read_image=read_image,
        )
        for position in positions:
            with named_out_of_memory(config, position.stage, device, lambda: run.place):
                if run_stage(model, config.stages()[position.stage - 1], run, position):
                    break
    return world.on_rank0(lambda: conclude(run))


def begin(
    config: ExperimentConfig,
    origins: dict[str, str],
    directory: Path,
    checkpoint: Path | None,
    state: dict | None,
    world: World,
) -> RunLog | OtherLog:
    """Nothing is refused any more: clear the place, write down what begins, open the log."""
    if not world.is_first:
        return OtherLog()
    device = world.device
    if state:
        print_rank0(f"going on from {checkpoint}: step {state['step']}, stage {state['stage']}")
    if checkpoint and checkpoint.parent.resolve() == directory.resolve():
        disk.set_aside_later(directory, state["step"])
    else:
        disk.remove_all(directory)
        for name in ("metrics.jsonl", "run.json"):  # another run's
            (directory / name).unlink(missing_ok=True)
        shutil.rmtree(directory / "evaluation", ignore_errors=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    wandb_run = start_wandb("mmllm", config.experiment_name, config.to_dict()) if config.use_wandb else None
    with reported(directory):
        record_start(directory, device=name, origins=origins, resumed_from=checkpoint and str(checkpoint))
        config.save(directory / "experiment.json")
        return RunLog(directory, state["step"] if state else 0, wandb_run)


def best_of(directory: Path, state: dict | None, sha256: dict[str, str]) -> dict | None:
    """The best checkpoint so far, if it is still there and was measured on the same validation data."""
    best = state and state["best"]
    is_same = best and state["data_sha256"].get("val") == sha256.get("val") and (directory / best["name"]).is_dir()
    return best if is_same else None


def settle_precision(config: ExperimentConfig, device: torch.device) -> None:
    """Cards before Ampere only imitate bfloat16, slowly: say so and train in float32."""
    if config.training.bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        print_rank0("this card has no bfloat16: training in float32")
        config.training.bf16 = False


def conclude(run: Run) -> int:
    """The last lines of a run, and its exit code."""
    with warned_of_disk(run.directory / "report.md"):
        write_report(run.directory)
    if run.stopping:
        cause = signal.Signals(run.stopping).name
        print_rank0(f"stopped by {cause}; saved {run.directory / run.writer.last_saved}; go on with --resume auto")
        return 128 + run.stopping
    model = run.directory / disk.BEST
    which = f"{run.best['name']}, validation loss {run.best['val_loss']:.4f}" if run.best else run.writer.last_saved
    images = [path for sample in [*run.val_samples, *run.train_samples] for path in sample.images[:1]]
    print_rank0(f"done. Best model: {model} -> {which}")
    print_rank0(f"curves: {run.directory / 'loss.svg'}, report: {run.directory / 'report.md'}")
    print_rank0(f"try it: python sample.py --model {model} --image {images[0] if images else 'x.jpg'}")
    return 0


def load_model(
    config: ExperimentConfig, origins: dict[str, str], checkpoint: Path | None, device: torch.device | None
) -> MultimodalLLM:
    """The model of the checkpoint, of `model.pretrained`, or of the two towers; float32, in memory of its own.

    `device` None: as its files have it and still in them, for `shard_` to take what it needs.
    """
    settings = config.model
    source = checkpoint or settings.pretrained
    place, dtype = (torch.device("cpu"), None) if device is None else (device, torch.float32)
    if source:
        model = MultimodalLLM.from_pretrained(source, device=place, dtype=dtype)
        found = {"features": model.config.features, "system_prompt": model.processor.system}
        for name, value in found.items():
            if f"model.{name}" in origins and config.get(f"model.{name}") != value:
                raise ConfigError(f"model.{name} is {config.get(f'model.{name}')!r}, but {source} has {value!r}")
    else:
        model = MultimodalLLM.from_towers(
            settings.clip,
            settings.qwen,
            features=settings.features,
            system=settings.system_prompt,
            seed=config.seed,
            device=place,
            dtype=dtype,
        )
    for parameter in model.parameters() if device else []:
        # out of the mapped file: another alignment in memory may change the last bit of a sum
        parameter.data = parameter.data.clone()
    return model


def feature_table(config: ExperimentConfig, model: MultimodalLLM) -> FeatureTable | None:
    """The features that stand for the pictures, where the configuration names a file of them."""
    data = config.data
    if data.features_path is None:
        return None
    files = [Path(path) for path in (data.train_data_path, data.val_data_path) if path]
    folders = [Path(data.image_dir)] if data.image_dir else [file.parent for file in files]
    return FeatureTable(data.features_path, folders, model.config.feature_shape)


def fill_cache(config: ExperimentConfig, model: MultimodalLLM, samples: list[Sample], world: World) -> FeatureCache:
    """The features of all pictures, made where they are not kept already; each process makes its share."""
    begin = time.perf_counter()
    cache = FeatureCache(model, Path(config.output_dir) / "features", config.training.bf16)
    pictures = {path for sample in samples for path in sample.images}
    made = cache.fill(pictures, rank=world.rank, world_size=world.size, num_workers=config.data.num_workers)
    (made,) = world.sum([made])  # and nobody goes on before all are there
    print_rank0(
        f"features of {len(pictures)} pictures: {made:.0f} made in {duration(time.perf_counter() - begin)}, in {cache.folder}"
    )
    return cache


def load_data(
    config: ExperimentConfig, model: MultimodalLLM, directory: Path | None, table: FeatureTable | None = None
) -> tuple[list[Sample], list[Sample]]:
    """The checked samples for training and validation, the latter in a fixed mixed order; shows what will be learnt.

    `directory` takes the lists of the bad ones; None: another process writes them. With a `table` the pictures themselves
    need not be there.
    """
    data, process, fault = config.data, model.processor, table and table.fault
    report = directory / "bad_samples.jsonl" if directory else Path(os.devnull)
    train_samples = checked_samples(
        data.train_data_path, data, process, report, split=data.train_split, limit=data.max_train_samples, fault=fault
    )
    val_samples = []
    if data.val_data_path:
        report = directory / "bad_val_samples.jsonl" if directory else Path(os.devnull)
        val_samples = checked_samples(
            data.val_data_path, data, process, report, split=data.val_split, limit=data.max_val_samples, fault=fault
        )
    else:
        print_rank0("data.val_data_path is not set: no validation, best_model will be the last checkpoint")
    print_rank0(
        f"{told(train_samples)} to train on, {told(val_samples)} to validate. The first, what is learnt in [[ ]]:"
    )
    first, *_ = encode_shared(train_samples[0], process, data.max_length)
    print_rank0("  " + marked(first, process, "[[", "]]").strip().replace("\n", "\n  "))
    return train_samples, [val_samples[index] for index in sample_order(len(val_samples), 0, 0)]


def told(samples: list[Sample]) -> str:
    """The number of samples, and of the texts in them where these are more."""
    texts = len(samples) + sum(len(sample.shared) for sample in samples)
    return f"{len(samples)} samples" + (
        f" ({texts} texts, those of a picture in one row)" if texts > len(samples) else ""
    )


def stage_positions(
    config: ExperimentConfig, num_samples: int, checkpoint: Path | None, state: dict | None, processes: int = 1
) -> tuple[list[Position], int]:
    """Where each stage that is left begins, and the number of steps of the whole run."""
    stages = config.stages()
    for number, stage in enumerate(stages, 1):
        if stage.epochs and not stage.train:
            raise ConfigError(f"training.stage{number}.train is empty; name what it trains, or set its epochs to 0")
    steps = [stage.epochs and stage.epochs * steps_per_epoch(stage, num_samples, processes) for stage in stages]
    if not sum(steps):
        raise ConfigError("both stages have 0 epochs; set training.stage1.epochs or training.stage2.epochs")
    if state is None:
        positions = [Position(1), Position(2, steps[0], stages[0].epochs)]
        return [position for position in positions if steps[position.stage - 1]], sum(steps)
    number, done = state["stage"], state["stage_step"]
    epochs_before = 0 if number == 1 else stages[0].epochs
    resumed = Position(
        number, state["step"] - done, epochs_before, done, state["updates"], state["is_pending"], checkpoint
    )
    positions = [resumed]
    if number == 1 and steps[1]:
        positions.append(Position(2, max(steps[0], done), stages[0].epochs))
    total = max(positions[-1].steps_before + steps[positions[-1].stage - 1], state["step"])
    is_finished = state["step"] == total and not state["is_pending"]
    return [] if is_finished else positions, total
