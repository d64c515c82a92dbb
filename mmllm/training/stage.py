"""One stage of training: the projector alone (stage 1), then the projector with the language model (stage 2); perhaps
then on a reward of the model's own captions (stage 3, reward.py).

Everything random is a function of (seed, stage, step), so a resumed run restores weights, moments and one integer, and
continues bit for bit. Recipe: LLaVA 1.5, https://arxiv.org/abs/2310.03744.
"""

import math
import time
from collections.abc import Iterator
from typing import NoReturn

import torch

from mmllm.config.schema import RewardConfig, StageConfig
from mmllm.data.batches import Batch, BatchLoader, allowed_broken, make_batch
from mmllm.data.order import sample_order
from mmllm.errors import DataError
from mmllm.layers.quantized import count_parameters, count_weights
from mmllm.models.multimodal import MultimodalLLM
from mmllm.reporting.metrics import METRICS
from mmllm.reporting.report import write_report
from mmllm.runtime.console import duration, print_rank0, warned_of_disk
from mmllm.runtime.memory import peak_memory
from mmllm.storage import checkpoint as disk
from mmllm.training.fsdp import gathered
from mmllm.training.prepare import PART_OF, frozen_weights, held_as, train_only_, trained_parts
from mmllm.training.reward import CaptionSampler, caption_reward, has_reference, keep_reference_, read_questions
from mmllm.training.run import Position, Run
from mmllm.training.step import (
    adamw,
    parameter_groups,
    peak_flops,
    set_learning_rates_,
    step_counts,
    step_flops,
    update_,
)
from mmllm.training.validation import generated_metric, sample_captions, validation_losses

NAMES_SHOWN = 8


class Stage:
    """A stage of `run` that begins at `position`: its optimizer, its samples and its number of steps."""

    def __init__(self, model: MultimodalLLM, settings: StageConfig, run: Run, position: Position):
        self.model, self.settings, self.run, self.position = model, settings, run, position
        run.place = "at its start"
        run.stale = run.stale if position.done else 0
        train_only_(model, trained_parts(settings))
        training = run.config.training
        self.steps_per_epoch = steps_per_epoch(settings, len(run.data.train), run.world.size)
        self.total = settings.epochs * self.steps_per_epoch
        self.warmup = round(training.warmup_ratio * self.total)
        groups = stage_groups(model, settings, training.weight_decay)
        self.optimizer = adamw(groups, training.adam_beta1, training.adam_beta2, training.optimizer)
        if position.done:
            disk.load_optimizer_(position.checkpoint, model, self.optimizer, position.updates, run.world)
        self.sampler = self._caption_sampler() if isinstance(settings, RewardConfig) else None
        how = {"read": read_questions, "collate": lambda questions, _: questions} if self.sampler else {}
        if not self.sampler and run.world.device.type == "cuda":
            how = {"collate": lambda *rows: make_batch(*rows).pinned()}
        self.loader = BatchLoader(
            run.data.train,
            model.processor,
            settings.batch_size,
            seed=run.config.seed + position.stage,
            max_length=run.config.data.max_length,
            num_workers=run.config.data.num_workers,
            max_broken=allowed_broken(run.config.data, run.data.train),
            read_image=run.data.read_image,
            accumulation=settings.gradient_accumulation_steps,
            group_by_length=run.config.data.group_by_length,
            augment=run.config.data.augment,
            rank=run.world.rank,
            world_size=run.world.size,
            **how,
        )
        self.frozen = frozen_weights(model) if training.bf16 else []

    def _caption_sampler(self) -> CaptionSampler:
        run, settings = self.run, self.settings
        if has_reference(settings) and not self.position.done:
            keep_reference_(self.optimizer)
        reward = run.reward or caption_reward(run.data.train, settings.bleu_weight)
        limits = {"max_length": run.config.data.max_length, "bf16": run.config.training.bf16}
        return CaptionSampler(self.model, self.optimizer, settings, reward, **limits)

    def train(self) -> None:
        """Take the steps that are left, or until a signal sets `run.stopping`; validate and save when due."""
        run, position = self.run, self.position
        print_rank0(self._describe())
        with held_as(self.frozen, torch.bfloat16):
            if position.is_pending:
                self._finish_step(position.done)
                if run.stops_early(position.stage):
                    return
            for step, batches in step_batches(self.loader, self.steps_per_epoch, position.done, self.total):
                run.place = f"in step {position.steps_before + step + 1}"
                run.world.report_position(run.place)
                self._take_step(step, batches)
                run.report_broken(self.loader)
                run.sync_stop()
                self._finish_step(step + 1)
                if run.stopping or run.stops_early(position.stage):
                    break

    def _describe(self) -> str:
        settings, processes = self.settings, self.run.world.size
        return (
            f"stage {self.position.stage}: {self.total} steps of {settings.batch_size} x "
            f"{settings.gradient_accumulation_steps}{f' x {processes} processes' if processes > 1 else ''} samples, "
            f"training {', '.join(settings.train)}: "
            f"{count_parameters(self.model, True):,} of {count_weights(self.model):,} parameters"
            f"{'' if self.position.done else ', with a new optimizer'}"
        )

    def _take_step(self, step: int, batches: list[Batch] | DataError) -> None:
        """Update the weights and log the step, or skip it when its gradient is not finite.

        A DataError in any process in place of its batches ends the run in all of them.
        """
        run, number, begin = self.run, self.position.stage, time.perf_counter()
        torch.manual_seed((run.config.seed * 2 + number) * 1_000_003 + step + run.world.rank)
        rate = set_learning_rates_(self.optimizer, step, self.warmup, self.total)
        error = batches if isinstance(batches, DataError) else None
        batches, sums = [] if error else batches, [0.0] * 3
        if self.sampler:
            batches, sums = self.sampler.batches(batches)
        *counts, score, divergence, captions, errors = run.world.sum([*step_counts(batches), *sums, bool(error)])
        if errors:
            self._save_and_raise(step, next(filter(None, run.world.all_gather(str(error or "")))))
        run.tokens += int(counts[1])
        loss, norm = update_(self.model, self.optimizer, batches, run.config.training, counts[0], run.world, run.scale)
        row = {"stage": number, "step": self.position.steps_before + step + 1, "learning_rate": rate}
        if math.isfinite(loss) and math.isfinite(norm):
            own = {"reward": score / captions, "kl": divergence / captions} if self.sampler else {}
            row |= {"loss": loss, "grad_norm": norm} | own | self._speed(counts, time.perf_counter() - begin)
            run.report_step(row, is_last=step + 1 == self.total)
        elif run.scale and math.isfinite(loss) and run.scale.value >= 1:
            run.report_overflow(row)
        else:
            names = run.world.all_gather(self._sample_names(step))
            run.skip_step(row, loss, norm, ", ".join(names))

    def _speed(self, counts: list[float], seconds: float) -> dict:
        """Rates of a step of `counts` (targets, tokens, images), all processes together."""
        targets, tokens, images = counts
        peak = peak_flops(self.model.device)
        flops = step_flops(self.model, tokens, targets, images)
        return {
            "ms": 1000 * seconds,
            "tokens_per_s": tokens / seconds,
            "images_per_s": images / seconds,
            "mfu": flops / seconds / (peak * self.run.world.size) if peak else None,
            "peak_bytes": peak_memory(self.model.device),
        }

    def _sample_names(self, step: int) -> str:
        """The samples of a step in this process, for a message."""
        epoch, step = divmod(step, self.steps_per_epoch)
        order = sample_order(len(self.loader.samples), self.loader.seed, epoch)
        first = step * self.loader.accumulation
        micro_batches = [self.loader.indices(order, first + i) for i in range(self.loader.accumulation)]
        ids = [self.loader.samples[index].id for indices in micro_batches for index in indices]
        more = f" and {len(ids) - NAMES_SHOWN} more" if len(ids) > NAMES_SHOWN else ""
        return ", ".join(ids[:NAMES_SHOWN]) + more

    def _finish_step(self, done: int) -> None:
        """Validate and save where that is due after `done` steps of the stage, or where a signal came."""
        run, training = self.run, self.run.config.training
        validates = run.data.val and self._is_due(done, training.eval_steps)
        saves = self._is_due(done, training.save_steps)
        if not (validates or saves or run.stopping):
            return
        step = self.position.steps_before + done
        run.place = f"in the validation or checkpoint after step {step}"
        with held_as(self.frozen, torch.float32):
            try:
                scores = self.validate(step) if validates else None
            except DataError as error:
                self._save_and_raise(done, str(error), is_pending=True)
            if saves or run.stopping:
                is_pending = bool(run.stopping) and scores is None
                run.save(self.model, self.optimizer, self._progress(done), scores, is_pending)

    def _progress(self, done: int) -> dict[str, int]:
        """Where the run is after `done` steps of the stage."""
        epoch = self.position.epochs_before + (done - 1) // self.steps_per_epoch + 1
        step = self.position.steps_before + done
        return {"stage": self.position.stage, "stage_step": done, "step": step, "epoch": epoch}

    def _save_and_raise(self, done: int, reason: str, is_pending: bool = False) -> NoReturn:
        """Save what the run has learned in `done` steps, unless it is saved, and end it with a DataError."""
        run, progress = self.run, self._progress(done)
        run.wait_for_save()
        if done and run.writer.last_saved != disk.checkpoint_name(progress["epoch"], progress["step"]):
            with held_as(self.frozen, torch.float32):
                run.save(self.model, self.optimizer, progress, None, is_pending)
            run.wait_for_save()
        if run.writer.last_saved:
            reason += (
                f". Saved {run.directory / run.writer.last_saved}: mend the file and go on with --resume auto, or go on "
                "without it: data.bad_samples=skip and a data.max_bad_fraction that allows it"
            )
        raise DataError(reason)

    def _is_due(self, done: int, every: int | None) -> bool:
        return done == self.total or done % (every or self.steps_per_epoch) == 0

    def validate(self, step: int) -> dict | None:
        """Log and print the validation after `step`; return its scores, None when a signal cut it short."""
        model, run, begin = self.model, self.run, time.perf_counter()
        model.eval()
        scores = validation_losses(
            model,
            run.data.val,
            run.config,
            self.settings.batch_size,
            run.sync_stop,
            run.data.read_image,
            world=run.world,
        )
        shown = [] if run.stopping else run.data.val[: run.config.training.num_sample_captions]
        read_image = run.data.read_image if run.config.data.features_path else None  # the images need not exist
        with gathered(model):
            captions = sample_captions(model, shown, run.sync_stop, read_image)
            asked = [] if run.stopping else run.data.val
            metric = generated_metric(
                model, asked, run.config.training, self.settings.batch_size, run.sync_stop, read_image, run.world
            )
        train_only_(model, trained_parts(self.settings))
        if run.stopping:
            return None
        scores |= metric
        run.log.write({"stage": self.position.stage, "step": step, **scores, "captions": captions})
        loss, probe = scores["val_loss"], scores["val_loss_shuffled"]
        other = f" | with other images {probe:.4f}" if probe is not None else ""
        shown = "".join(f" | {METRICS[name]} {value:.4f}" for name, value in metric.items() if value is not None)
        took = duration(time.perf_counter() - begin)
        print_rank0(f"validation at step {step}: loss {loss:.4f}{other}{shown} | {took}")
        for caption in captions:
            question, answer, reference = caption["prompt"], caption["answer"], caption["reference"]
            print_rank0(f"  {caption['id']}: {question} -> {answer}   (reference: {reference})")
        if run.world.is_first:
            with warned_of_disk(run.directory / "report.md"):
                write_report(run.directory)
        return scores


def step_batches(
    loader: BatchLoader, per_epoch: int, start: int, total: int
) -> Iterator[tuple[int, list[Batch] | DataError]]:
    """Each step from `start` to `total` with its micro-batches, or the DataError in place of them."""
    accumulation = loader.accumulation
    for epoch in range(start // per_epoch, -(-total // per_epoch)):
        first = max(start, epoch * per_epoch)
        made = loader.batches(epoch, (first - epoch * per_epoch) * accumulation)
        for step in range(first, (epoch + 1) * per_epoch):
            yield step, next_batches(made, accumulation)
        made.close()


def next_batches(made: Iterator[Batch], number: int) -> list[Batch] | DataError:
    """The next micro-batches, or the reason why one cannot be made."""
    try:
        return [next(made) for _ in range(number)]
    except DataError as error:
        return error


def steps_per_epoch(stage: StageConfig, num_samples: int, processes: int = 1) -> int:
    """Optimizer steps of an epoch; DataError when the samples do not fill one."""
    wanted = stage.batch_size * stage.gradient_accumulation_steps * processes
    if num_samples < wanted:
        raise DataError(
            f"{num_samples} training samples do not fill one step of {stage.batch_size} x "
            f"{stage.gradient_accumulation_steps}{f' x {processes} processes' if processes > 1 else ''}; "
            "lower data.batch_size or the accumulation, or bring more samples"
        )
    return num_samples // wanted


def stage_groups(model: MultimodalLLM, stage: StageConfig, weight_decay: float) -> list[dict]:
    """The parameter groups of the optimizer, each part of the model at its own rate."""
    rates = (stage.projector_learning_rate, stage.learning_rate, stage.vision_learning_rate)
    peaks = {f"{part}.": rate for part, rate in zip(PART_OF.values(), rates, strict=True)}
    return parameter_groups(model.named_parameters(), peaks, weight_decay)
