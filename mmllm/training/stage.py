"""Two stages of training, both by `run_stage`: the projector alone, then the projector with the language model.

The surprising fact: accumulation is not an average of averages. Micro-batches hold different numbers of learnt tokens, so
a step first fetches all of its micro-batches, counts the targets of them all, and divides every summed loss by that one
number. Then any split of the same samples gives the same gradient; the mean of means is off by as much as a third.

Everything random is a function of (seed, stage, step): a resumed run restores weights, moments and one integer, and goes
on bit for bit. Recipe: LLaVA 1.5, https://arxiv.org/abs/2310.03744. Next: checkpoint.py, experiment.py.
"""

import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from mmllm.config.schema import ExperimentConfig, StageConfig, TrainingConfig
from mmllm.data.batches import Batch, BatchLoader, ReadImage, allowed_broken, sample_order
from mmllm.data.chat import IGNORED
from mmllm.data.samples import Sample
from mmllm.errors import DataError, RunError
from mmllm.layers.quantized import count_parameters, count_weights
from mmllm.models.multimodal import MultimodalLLM
from mmllm.reporting.log import RunLog, progress_line, write_report
from mmllm.runtime.console import duration, print_rank0, warned_of_disk
from mmllm.runtime.device import autocast
from mmllm.runtime.distributed import World, full
from mmllm.runtime.memory import peak_memory
from mmllm.runtime.signals import StopSignal
from mmllm.storage import checkpoint as disk
from mmllm.storage.checkpoint_writer import CheckpointWriter
from mmllm.training.fsdp import gathered, is_sharded, reduce_after_
from mmllm.training.optim import adamw, parameter_groups, set_learning_rates_
from mmllm.training.out_of_memory import PART_OF, step_flops, trained_parts
from mmllm.training.prepare import frozen_weights
from mmllm.training.surgery import cast_, train_only_
from mmllm.training.validation import sample_captions, validation_losses

NAMES_SHOWN = 8


# The gradient of one optimiser step -----------------------------------------------------------------------------------


def count_targets(batches: Iterable[Batch]) -> int:
    """Learnt tokens in all of the batches, which are still on the CPU: no wait for the device."""
    return sum(int((batch.labels_BT[:, 1:] != IGNORED).sum()) for batch in batches)


def accumulate_gradients(
    model: MultimodalLLM, batches: list[Batch], bf16: bool = False, targets: float | None = None
) -> Tensor:
    """Add to `.grad` the gradient of the summed loss over `targets`; returns that quotient, on the device.

    `targets` are those of all processes; None: of `batches`, which then are the whole step.
    """
    targets = max(1, count_targets(batches) if targets is None else targets)
    total = torch.zeros((), device=model.device)
    for number, batch in enumerate(batches, 1):
        reduce_after_(model, is_last=number == len(batches))
        try:
            batch = batch.to(model.device)
            with autocast(model.device, bf16):
                loss_sum, _ = model(batch.ids_BT, batch.labels_BT, batch.pixels_N3SS, batch.segment_ids_BT)
            loss = loss_sum / targets
            loss.backward()
        except (MemoryError, RuntimeError) as error:
            error.add_note(f"micro-batch {number} of {len(batches)}")
            raise
        total += loss.detach()
    return total


# A run ----------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What both stages share: settings, data, the log, and where the run stands."""

    config: ExperimentConfig
    directory: Path
    train_samples: list[Sample]
    val_samples: list[Sample]
    log: RunLog
    stop: StopSignal  # what this process has heard; all act on `stopping`
    world: World
    writer: CheckpointWriter
    data_sha256: dict[str, str]
    total_steps: int = 0
    best: dict | None = None  # {"name": of the checkpoint, "val_loss": of it}
    loss: float | None = None  # smoothed, for the eye
    step_ms: float | None = None
    saved_step: int | None = None
    skipped: int = 0  # steps in a row
    broken: set[int] = field(default_factory=set)  # samples whose picture proved broken when it was used
    flops: float | None = None
    place: str = "at its start"  # of the stage, for who has to say where something happened
    tokens: int = 0  # of all steps
    stopping: int = 0  # the signal that all processes know of, which ends the run
    read_image: ReadImage | None = None  # None: its pixels


@dataclass(frozen=True)
class Position:
    """Where a stage begins in the run: its number, steps and epochs before it, and its own steps done at a resumption."""

    stage: int
    steps_before: int = 0
    epochs_before: int = 0
    done: int = 0
    updates: int = 0
    is_pending: bool = False  # stopped before the validation that was due
    checkpoint: Path | None = None


def run_stage(model: MultimodalLLM, stage: StageConfig, run: Run, position: Position) -> bool:
    """Train one stage from step `position.done` to its end, or until a signal; validate and save when due.

    Returns whether it was stopped.
    """
    settings, run.place = run.config.training, "at its start"
    train_only_(model, trained_parts(stage))
    held = frozen_weights(model) if settings.bf16 else []
    loader = stage_loader(stage, run, model, position.stage)
    per_epoch = steps_per_epoch(stage, len(run.train_samples), run.world.size)
    total = stage.epochs * per_epoch
    warmup = round(settings.warmup_ratio * total)
    optimizer = adamw(stage_groups(model, stage, settings.weight_decay), settings.adam_beta1, settings.adam_beta2)
    if position.done:
        disk.load_optimizer_(position.checkpoint, model, optimizer, position.updates, run.world)
    print_rank0(
        f"stage {position.stage}: {total} steps of {stage.batch_size} x {stage.gradient_accumulation_steps}"
        f"{f' x {run.world.size} processes' if run.world.size > 1 else ''} samples, "
        f"training {', '.join(stage.train)}: {count_parameters(model, True):,} of {count_weights(model):,} parameters"
        f"{'' if position.done else ', with a new optimiser'}"
    )

    def finish(done: int) -> None:
        """What is due after step `done`: validation, a checkpoint."""
        scores = None
        validates = run.val_samples and is_due(done, settings.eval_steps, per_epoch, total)
        saves = run.stopping or is_due(done, settings.save_steps, per_epoch, total)
        if not (validates or saves):
            return
        run.place = f"in the validation or checkpoint after step {position.steps_before + done}"
        cast_(held, torch.float32)
        if validates:
            scores = validate(model, stage, run, position.steps_before + done, position.stage)
        if run.stopping or saves:
            epoch = position.epochs_before + (done - 1) // per_epoch + 1
            save(model, optimizer, run, position, done, epoch, scores)
        cast_(held, torch.bfloat16)

    cast_(held, torch.bfloat16)
    stopped = False
    if position.is_pending:
        finish(position.done)
    for step, (batches, numbers) in enumerate(
        step_batches(loader, stage.gradient_accumulation_steps, per_epoch, position.done, total), position.done
    ):
        begin = time.perf_counter()
        run.place = f"in step {position.steps_before + step + 1}"
        run.world.report_position(run.place)
        torch.manual_seed(step_seed(run.config.seed, position.stage, step) + run.world.rank)
        rate = set_learning_rates_(optimizer, step, warmup, total)
        counts = run.world.sum(step_counts(batches))
        run.tokens += int(counts[1])
        loss, norm = update_(model, optimizer, batches, settings, counts[0], run.world)
        row = {"stage": position.stage, "step": position.steps_before + step + 1, "learning_rate": rate}
        if math.isfinite(loss) and math.isfinite(norm):
            run.skipped = 0
            row |= {"loss": loss, "grad_norm": norm} | speed(model, counts, time.perf_counter() - begin, run.flops)
            report_step(row, run, is_last=step + 1 == total)
        else:
            names = sample_names(run.train_samples, loader, numbers, step // per_epoch)
            leave_out(row, loss, norm, ", ".join(run.world.all_gather(names)), run)
        report_broken(loader, run)
        is_stopped(run)
        finish(step + 1)
        if is_stopped(run):
            if run.saved_step != position.steps_before + step + 1:  # the signal came after the step was finished
                finish(step + 1)
            run.writer.wait()
            stopped = True
            break
    cast_(held, torch.float32)
    return stopped


def is_stopped(run: Run) -> bool:
    """Whether any process has had a signal, the same answer in all; one that comes while they ask waits for the next time.

    With the same question they hear how the checkpoint on its way stands.
    """
    number, furthest = run.world.all_reduce_max([run.stop.number, run.writer.state()])
    run.stopping = run.stopping or number
    settle(run, furthest)
    return bool(run.stopping)


def update_(
    model: MultimodalLLM,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    settings: TrainingConfig,
    targets: float,
    world: World,
) -> tuple[float, float]:
    """One optimiser step; returns its loss and gradient norm. When one of them is not finite, nothing moves.

    `targets`: of the step in all processes.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    loss = accumulate_gradients(model, batches, settings.bf16, targets)
    world.sum_([loss])
    if not is_sharded(model):  # else the backward pass has done it
        world.sum_gradients_(parameters)
    norm = full(clip_grad_norm_(parameters, settings.max_grad_norm))
    loss, norm = torch.stack((loss, norm.to(loss.dtype))).tolist()  # the one wait for the device in a step
    if math.isfinite(loss) and math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return loss, norm


def step_batches(
    loader: BatchLoader, accumulation: int, per_epoch: int, start: int, total: int
) -> Iterator[tuple[list[Batch], list[int]]]:
    """The micro-batches of each step from `start` to `total`, and their numbers in the epoch."""
    for epoch in range(start // per_epoch, -(-total // per_epoch)):
        first = start - epoch * per_epoch if epoch == start // per_epoch else 0
        made = loader.batches(epoch, first * accumulation)
        for step in range(first, per_epoch):
            numbers = list(range(step * accumulation, (step + 1) * accumulation))
            yield [next(made) for _ in numbers], numbers
        made.close()


def stage_loader(stage: StageConfig, run: Run, model: MultimodalLLM, number: int) -> BatchLoader:
    data = run.config.data
    return BatchLoader(
        run.train_samples,
        model.processor,
        stage.batch_size,
        seed=run.config.seed + number,
        max_length=data.max_length,
        num_workers=data.num_workers,
        max_broken=allowed_broken(data, run.train_samples),
        read_image=run.read_image,
        accumulation=stage.gradient_accumulation_steps,
        group_by_length=data.group_by_length,
        rank=run.world.rank,
        world_size=run.world.size,
    )


def steps_per_epoch(stage: StageConfig, num_samples: int, processes: int = 1) -> int:
    """Optimiser steps of an epoch; DataError when the samples do not fill one."""
    wanted = stage.batch_size * stage.gradient_accumulation_steps * processes
    if num_samples < wanted:
        raise DataError(
            f"{num_samples} training samples do not fill one step of {stage.batch_size} x "
            f"{stage.gradient_accumulation_steps}{f' x {processes} processes' if processes > 1 else ''}; "
            "lower data.batch_size or the accumulation, or bring more samples"
        )
    return num_samples // wanted


def stage_groups(model: MultimodalLLM, stage: StageConfig, weight_decay: float) -> list[dict]:
    rates = (stage.projector_learning_rate, stage.learning_rate, stage.vision_learning_rate)
    peaks = {f"{part}.": rate for part, rate in zip(PART_OF.values(), rates, strict=True)}
    return parameter_groups(model.named_parameters(), peaks, weight_decay)


def step_seed(seed: int, stage: int, step: int) -> int:
    return (seed * 2 + stage) * 1_000_003 + step


def is_due(done: int, every: int | None, per_epoch: int, total: int) -> bool:
    return done == total or done % (every or per_epoch) == 0


def step_counts(batches: list[Batch]) -> tuple[int, int, int]:
    """Targets, tokens and pictures of a step in this process."""
    tokens = sum(batch.ids_BT.numel() for batch in batches)
    return count_targets(batches), tokens, sum(len(batch.pixels_N3SS) for batch in batches)


def speed(model: MultimodalLLM, counts: list[float], seconds: float, flops: float | None) -> dict:
    """What a step of `step_counts` did in its time, all processes together; `flops`: of all devices."""
    targets, tokens, images = counts
    mfu = step_flops(model, tokens, targets, images) / seconds / flops if flops else None
    return {
        "ms": 1000 * seconds,
        "tokens_per_s": tokens / seconds,
        "images_per_s": images / seconds,
        "mfu": mfu,
        "peak_bytes": peak_memory(model.device),
    }


def report_step(row: dict, run: Run, is_last: bool) -> None:
    run.log.write(row)
    run.loss = row["loss"] if run.loss is None else 0.9 * run.loss + 0.1 * row["loss"]
    run.step_ms = row["ms"] if run.step_ms is None else 0.9 * run.step_ms + 0.1 * row["ms"]
    if is_last or row["step"] % run.config.training.log_steps == 0:
        print_rank0(progress_line(row | {"ms": run.step_ms}, run.loss, run.total_steps))


def report_broken(loader: BatchLoader, run: Run) -> None:
    """Note the pictures that proved broken only when they were used."""
    for index, reason in list(loader.broken.items()):
        if index not in run.broken:
            run.broken.add(index)
            row = {"index": index, "file": run.train_samples[index].id, "reason": reason}
            with warned_of_disk(run.directory / "bad_samples.jsonl") as path, path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def sample_names(samples: list[Sample], loader: BatchLoader, numbers: list[int], epoch: int) -> str:
    order = sample_order(len(samples), loader.seed, epoch)
    ids = [samples[index].id for number in numbers for index in loader.indices(order, number)]
    return ", ".join(ids[:NAMES_SHOWN]) + (f" and {len(ids) - NAMES_SHOWN} more" if len(ids) > NAMES_SHOWN else "")


def leave_out(row: dict, loss: float, norm: float, names: str, run: Run) -> None:
    """Note a step whose gradient is not finite; RunError when the settings do not allow one more."""
    settle(run)
    run.skipped += 1
    what = f"step {row['step']}: loss {loss}, gradient norm {norm}, with the samples {names}"
    if run.skipped > run.config.training.max_skipped_steps:
        raise RunError(
            f"{what}; the weights were not updated. Last checkpoint: {run.writer.last_saved or 'none'}. Look at these samples, "
            "lower the learning rate, or allow some such steps with training.max_skipped_steps"
        )
    print_rank0(f"warning: {what}; left out")
    run.log.write(row | {"left_out": f"loss {loss}, gradient norm {norm}"})


# After a step ---------------------------------------------------------------------------------------------------------


def validate(model: MultimodalLLM, stage: StageConfig, run: Run, step: int, number: int) -> dict | None:
    """Validate, log and show; None when a signal cut it short."""
    begin = time.perf_counter()
    model.eval()
    scores = validation_losses(
        model,
        run.val_samples,
        run.config,
        stage.batch_size,
        lambda: is_stopped(run),
        run.read_image,
        world=run.world,
    )
    shown = run.val_samples[: run.config.training.num_sample_captions]
    read_image = run.read_image if run.config.data.features_path else None  # no pictures are there: only their features
    with gathered(model):
        captions = sample_captions(model, [] if run.stopping else shown, lambda: is_stopped(run), read_image)
    train_only_(model, trained_parts(stage))
    if run.stopping:
        return None
    row = {"stage": number, "step": step, **scores, "captions": captions}
    run.log.write(row)
    probe = scores["val_loss_shuffled"]
    other = f" | with other pictures {probe:.4f}" if probe is not None else ""
    print_rank0(
        f"validation at step {step}: loss {scores['val_loss']:.4f}{other} | {duration(time.perf_counter() - begin)}"
    )
    for caption in captions:
        print_rank0(
            f"  {caption['id']}: {caption['prompt']} -> {caption['answer']}   (reference: {caption['reference']})"
        )
    if run.world.is_first:
        with warned_of_disk(run.directory / "report.md"):
            write_report(run.directory)
    return row


def save(
    model: MultimodalLLM,
    optimizer: torch.optim.Optimizer,
    run: Run,
    position: Position,
    done: int,
    epoch: int,
    scores: dict | None,
) -> None:
    """Begin a checkpoint, which is written while training goes on; the last one of a run is waited for."""
    settle(run)
    step = position.steps_before + done
    name = disk.checkpoint_name(epoch, step)
    best = run.best
    if scores and math.isfinite(scores["val_loss"]) and (best is None or scores["val_loss"] < best["val_loss"]):
        best = {"name": name, "val_loss": scores["val_loss"]}
    state = {
        "stage": position.stage,
        "stage_step": done,
        "step": step,
        "epoch": epoch,
        "is_pending": bool(run.stopping) and scores is None,
        "best": best,
        "tokens": run.tokens,
        "num_samples": len(run.train_samples),
        "processes": run.world.size,
        "data_sha256": run.data_sha256,
        "config": run.config.to_dict(),
    }
    begin = time.perf_counter()

    def whole() -> None:
        """Remember the best one, remove old ones."""
        run.best = best
        best_name = best["name"] if best else name
        disk.point_best(run.directory, best_name)
        disk.prune(run.directory, run.config.training.keep_checkpoints, best_name)
        print_rank0(f"saved {run.directory / name} in {duration(time.perf_counter() - begin)}")

    is_last = bool(run.stopping) or step == run.total_steps
    run.saved_step = step
    try:
        run.writer.begin(run.directory / name, model, optimizer, state, whole)
        if is_last:
            run.writer.wait()
    except RunError as error:
        forgive(run, error, is_last)


def settle(run: Run, furthest: int | None = None) -> None:
    """Hear what became of the checkpoint on its way, and wait for it unless `furthest` is what all processes know."""
    try:
        if furthest is None:
            run.writer.wait()
        else:
            run.writer.advance(furthest)
    except RunError as error:
        forgive(run, error, is_last=False)


def forgive(run: Run, error: RunError, is_last: bool) -> None:
    """One checkpoint that could not be written is forgiven, unless nothing comes after it."""
    if is_last or run.writer.failures > 1:
        raise error
    print_rank0(f"warning: {error}; the run goes on and tries again at the next checkpoint")
