"""From a configuration to a finished run: what `train.py` does once its arguments are read.

Most of it refuses early: whatever can be wrong with settings, data, disk or checkpoint is found before the first weight is
read, because the alternative is to find it after the first epoch.
"""

import json
import os
import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mmllm.config.schema import ExperimentConfig
from mmllm.config.sources import explain
from mmllm.data.chat import mark_targets
from mmllm.data.checks import checked_samples, refuse_broken
from mmllm.data.features import FeatureCache, FeatureTable, fingerprint
from mmllm.data.formats import data_files, image_folder
from mmllm.data.order import sample_order, split_by_image
from mmllm.data.packing import encode_shared
from mmllm.data.samples import Sample
from mmllm.errors import ConfigError
from mmllm.models.multimodal import MultimodalLLM
from mmllm.reporting.metrics import NullLog, RunLog, start_wandb
from mmllm.reporting.report import record_start, write_report
from mmllm.runtime.console import duration, print_rank0, warned_of_disk
from mmllm.runtime.device import autocast, half_type
from mmllm.runtime.distributed import World
from mmllm.runtime.files import writing
from mmllm.runtime.memory import keep_freed_memory
from mmllm.runtime.signals import StopSignal
from mmllm.storage import checkpoint as disk
from mmllm.storage.checkpoint_writer import CheckpointWriter
from mmllm.training.data_plan import largest
from mmllm.training.fsdp import is_wanted, shard_
from mmllm.training.out_of_memory import named_out_of_memory
from mmllm.training.prepare import prepare
from mmllm.training.resume import (
    data_sha256,
    find_checkpoint,
    open_directory,
    refuse_changes,
    refuse_other_count,
    refuse_small_disk,
    stage_positions,
)
from mmllm.training.reward import Reward
from mmllm.training.run import Run, TrainingData, best_of, describe_best, goal, last_stage
from mmllm.training.stage import Stage
from mmllm.training.step import LossScale
from mmllm.training.validation import check_metric


def train(
    config: ExperimentConfig,
    origins: dict[str, str] | None = None,
    *,
    resume: str | None = None,
    overwrite: bool = False,
    allow_data_change: bool = False,
    reward: Reward | None = None,
) -> int:
    """Run all stages. Returns the exit code: 0, or 128 + the number of the signal that stopped it (after saving).

    `reward` takes the place of stage 3's own.
    `resume` is "auto" (the newest whole checkpoint of this run, or a new run), a checkpoint, or the directory of a run.
    """
    with World.start(config.device, config.training.timeout_s) as world, ExitStack() as at_end:
        sha256 = data_sha256(config)
        directory = world.on_rank0(lambda: open_directory(config, at_end))
        checkpoint = world.on_rank0(lambda: find_checkpoint(directory, resume, overwrite))
        state = disk.read_state(checkpoint) if checkpoint else {}
        if state:
            refuse_changes(config, checkpoint, state, sha256, allow_data_change, world.size)
        for line in explain(config, origins or {}):
            print_rank0(f"  {line}")
        model = ready_model(config, origins or {}, checkpoint, world)
        data = load_data(config, model, directory, sha256, world)
        if state and not allow_data_change:
            refuse_other_count(config, state, len(data.train))
        positions, total_steps = stage_positions(config, len(data.train), checkpoint, state, world.size)
        if not positions:
            print_rank0(f"{checkpoint}: already at step {state['step']} of {total_steps}; nothing is left to train")
            return 0
        world.on_rank0(lambda: refuse_small_disk(config, model, data, directory, positions, world.size))
        if config.data.cache_features:
            data = replace(data, read_image=fill_cache(config, model, data, world))
            for split, samples in (("", data.train), ("val_", data.val)):
                refuse_broken(samples, data.read_image.faults, config.data, report_file(directory, split, world))
        with (
            StopSignal() as stop,
            closing(begin(config, origins or {}, directory, checkpoint, state, data.notes, world)) as log,
            CheckpointWriter(world, checkpoint and checkpoint.name) as writer,
        ):
            best, tokens = best_of(config, directory, state, sha256), state.get("tokens", 0)
            run = Run(config, directory, data, world, log, stop, writer, total_steps, best, tokens)
            run.highest, run.stale, run.reward = best, state.get("stale", 0), reward
            if config.training.bf16 and half_type(world.device) == torch.float16:
                print_rank0("this card has no bfloat16: training in float16, with a scale of the loss")
                run.scale = LossScale(*(state.get("loss_scale") or ()))
            for position in positions:
                with named_out_of_memory(config, position.stage, world.device, lambda: run.place):
                    Stage(model, config.stages()[position.stage - 1], run, position).train()
                if run.stopping:
                    break
        return world.on_rank0(lambda: conclude(run))


def ready_model(
    config: ExperimentConfig, origins: dict[str, str], checkpoint: Path | None, world: World
) -> MultimodalLLM:
    """The model to train, prepared, on the device of this process."""
    is_sharded = is_wanted(config, world.size)
    if is_sharded and config.training.optimizer == "adamw8bit":
        raise ConfigError(
            "training.optimizer=adamw8bit cannot be sharded; set training.sharding=none, or optimizer=adamw"
        )
    model = load_model(config, origins, checkpoint, None if is_sharded else world.device)
    prepare(model, config)
    if is_sharded:
        shard_(model, world, reshard_after_forward=config.training.reshard_after_forward)
    keep_freed_memory(world.device)  # what loading has freed goes back first
    return model


def load_model(
    config: ExperimentConfig, origins: dict[str, str], checkpoint: Path | None, device: torch.device | None
) -> MultimodalLLM:
    """The model of the checkpoint, of `model.pretrained`, or of the two towers; float32, in memory of its own.

    `device` None: every tensor as its file has it and still in the file, for `shard_` to copy its rows from.
    """
    settings = config.model
    source = checkpoint or settings.pretrained
    place, dtype = (torch.device("cpu"), None) if device is None else (device, torch.float32)
    if source:
        model = MultimodalLLM.from_pretrained(source, device=place, dtype=dtype)
        found = {"features": model.config.features, "system_prompt": model.processor.system}
        found |= {"image_size": model.config.vision.image_size, "image_fit": model.processor.image_processor.fit}
        for name, value in found.items():
            if f"model.{name}" in origins and config.get(f"model.{name}") != value:
                raise ConfigError(f"model.{name} is {config.get(f'model.{name}')!r}, but {source} has {value!r}")
    else:
        model = MultimodalLLM.from_towers(
            settings.clip,
            settings.qwen,
            features=settings.features,
            image_size=settings.image_size,
            image_fit=settings.image_fit,
            system=settings.system_prompt,
            seed=config.seed,
            device=place,
            dtype=dtype,
        )
    for parameter in model.parameters() if device else []:
        # out of the mapped file: another alignment in memory may change the last bit of a sum
        parameter.data = parameter.data.clone()
    return model


def load_data(
    config: ExperimentConfig, model: MultimodalLLM, directory: Path, sha256: dict[str, str], world: World
) -> TrainingData:
    """The checked samples for training and validation, the latter in a fixed mixed order; prints the first one.

    Rank 0 lists the bad ones in `directory`. With a table of features the images need not exist.
    """
    data, process, table = config.data, model.processor, feature_table(config, model)

    notes = []

    def samples_of(split: str, path: str, part: str, limit: int | None) -> list[Sample]:
        report = report_file(directory, split, world)
        fault = table and table.fault
        folder = data.val_image_dir if split else None
        samples, note = checked_samples(
            path, data, process, report, split=part, image_dir=folder, limit=limit, fault=fault
        )
        notes.extend(filter(None, [note]))
        return samples

    train = samples_of("", data.train_data_path, data.train_split, data.max_train_samples)
    val = []
    if data.val_data_path:
        val = samples_of("val_", data.val_data_path, data.val_split, data.max_val_samples)
    elif data.val_fraction:
        train, val = split_by_image(train, data.val_fraction, config.seed)
        val = val[: data.max_val_samples]
        notes.append(f"data.val_fraction={data.val_fraction}: {count(val)} are set aside, by image, to validate")
    else:
        notes.append(
            "data.val_data_path and data.val_fraction are not set: no validation, best_model will be the last checkpoint"
        )
    texts, most = max(1 + len(sample.shared) for sample in train), max(stage.batch_size for stage in config.stages())
    if texts > 1 and (size := largest(train, process, data.max_length)):
        notes.append(
            f"a sample is up to {texts} texts of an image in up to {size.rows} rows: a batch of {most} samples has up to "
            f"{most * texts} texts in {most * size.rows} rows"
        )
    notes.append(f"{count(train)} to train on, {count(val)} to validate.")
    check_metric(val, config.training)
    print_rank0("\n".join(notes) + " The first one, with its targets in [[ ]]:")
    first, *_ = encode_shared(train[0], process, data.max_length)
    print_rank0("  " + mark_targets(first, process, "[[", "]]").strip().replace("\n", "\n  "))
    return TrainingData(train, [val[index] for index in sample_order(len(val), 0, 0)], sha256, table, notes)


def report_file(directory: Path, split: str, world: World) -> Path:
    """Where the bad samples are listed, by rank 0 alone."""
    return directory / f"bad_{split}samples.jsonl" if world.is_first else Path(os.devnull)


def count(samples: list[Sample]) -> str:
    """The number of samples, and of the texts in them where several share an image."""
    texts = len(samples) + sum(len(sample.shared) for sample in samples)
    return f"{len(samples)} samples" + (f" ({texts} texts, those of an image together)" * (texts > len(samples)))


def feature_table(config: ExperimentConfig, model: MultimodalLLM) -> FeatureTable | None:
    """The features to read in place of the images, where `data.features_path` names a file of them."""
    data = config.data
    if data.features_path is None:
        return None
    files = [file for source in (data.train_data_path, data.val_data_path) if source for file in data_files(source)]
    named = [Path(name).expanduser() for name in (data.image_dir, data.val_image_dir) if name]
    folders = named + ([] if data.image_dir else [image_folder(file) for file in files])
    return FeatureTable(data.features_path, folders, model.config.feature_shape)


def fill_cache(config: ExperimentConfig, model: MultimodalLLM, data: TrainingData, world: World) -> FeatureCache:
    """The cache with the features of all images; each process computes its share of those that are missing."""
    begin = time.perf_counter()
    cache = feature_cache(model, Path(config.output_dir).expanduser() / "features", config.training.bf16)
    images = {path for sample in (*data.train, *data.val) for path in sample.images}
    made = cache.fill(images, rank=world.rank, world_size=world.size, num_workers=config.data.num_workers)
    (made,) = world.sum([made])  # and wait until all are there
    for faults in world.all_gather(json.dumps({str(image): fault for image, fault in cache.faults.items()})):
        cache.faults |= {Path(image): fault for image, fault in json.loads(faults).items()}
    took = duration(time.perf_counter() - begin)
    print_rank0(f"features of {len(images)} images: {made:.0f} made in {took}, in {cache.folder}")
    return cache


def feature_cache(model: MultimodalLLM, folder: Path, bf16: bool) -> FeatureCache:
    """The cache in `folder` of the features that this model's vision tower computes."""
    dtype, processor = half_type(model.device) if bf16 else torch.float32, model.processor.image_processor

    def encode(pixels_N3SS: Tensor) -> Tensor:
        with torch.no_grad(), autocast(model.device, bf16):
            return model.vision_features(pixels_N3SS)

    settings = {
        "vision": model.config.vision.to_dict(),
        "features": model.config.features,
        "pixels": processor.to_dict(),
        "dtype": str(dtype),
    }
    name = fingerprint(settings, model.vision_tower.state_dict())
    return FeatureCache(encode, processor, folder / name, model.config.feature_shape, dtype)


def begin(
    config: ExperimentConfig,
    origins: dict[str, str],
    directory: Path,
    checkpoint: Path | None,
    state: dict,
    notes: Sequence[str],
    world: World,
) -> RunLog | NullLog:
    """Clear the directory, record the start and open the log: nothing is refused any more."""
    if not world.is_first:
        return NullLog()
    if state:
        print_rank0(f"going on from {checkpoint}: step {state['step']}, stage {state['stage']}")
    if checkpoint and checkpoint.parent.resolve() == directory.resolve():
        disk.set_aside_later(directory, state["step"])
    else:
        disk.remove_all(directory)
        for name in ("metrics.jsonl", "run.json"):  # of another run
            (directory / name).unlink(missing_ok=True)
        shutil.rmtree(directory / "evaluation", ignore_errors=True)
    device = world.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    wandb_run = start_wandb("mmllm", config.experiment_name, config.to_dict()) if config.use_wandb else None
    with writing(directory):
        resumed_from = checkpoint and str(checkpoint)
        record_start(directory, device=name, origins=origins, resumed_from=resumed_from, data=notes)
        config.save(directory / "experiment.json")
        return RunLog(directory, state.get("step", 0), wandb_run)


def conclude(run: Run) -> int:
    """Print the last lines of a run; return its exit code."""
    with warned_of_disk(run.directory / "report.md"):
        write_report(run.directory)
    if run.stopping:
        cause = signal.Signals(run.stopping).name
        print_rank0(f"stopped by {cause}; saved {run.directory / run.writer.last_saved}; go on with --resume auto")
        return 128 + run.stopping
    if run.stops_early(last_stage(run.config)):
        print_rank0(f"early stop: the last {run.stale} checkpoints did not {goal(run.config.training.best_metric)}")
    model = run.directory / disk.BEST
    which = f"{run.best['name']}, {describe_best(run.best)}" if run.best else run.writer.last_saved
    images = [path for sample in [*run.data.val, *run.data.train] for path in sample.images[:1]]
    print_rank0(f"done. Best model: {model} -> {which}")
    if run.config.data.max_train_samples:
        print_rank0(
            f"data.max_train_samples={run.config.data.max_train_samples}: this run shows that the data can be trained on; "
            "how good its model answers says little about a run on all samples"
        )
    print_rank0(f"curves: {run.directory / 'loss.png'}, report: {run.directory / 'report.md'}")
    print_rank0(f"try it: python -m mmllm sample --model {model} --image {images[0] if images else 'x.jpg'}")
    return 0
