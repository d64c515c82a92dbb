"""A run in progress: what all stages share, when it stops, its checkpoints, and the lines that it writes."""

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mmllm.config.schema import STAGES, ExperimentConfig
from mmllm.data.batches import BatchLoader, ReadImage
from mmllm.data.samples import Sample
from mmllm.errors import RunError
from mmllm.models.multimodal import MultimodalLLM
from mmllm.reporting.metrics import METRICS, RunLog, progress_line
from mmllm.runtime.console import duration, print_rank0, warned_of_disk
from mmllm.runtime.distributed import World
from mmllm.runtime.signals import StopSignal
from mmllm.storage import checkpoint as disk
from mmllm.storage.checkpoint_writer import CheckpointWriter
from mmllm.training.reward import Reward
from mmllm.training.step import LossScale


@dataclass(frozen=True)
class TrainingData:
    """The samples of a run. `sha256` holds the checksums of the data files, see resume.py."""

    train: list[Sample]
    val: list[Sample]
    sha256: dict[str, str]
    read_image: ReadImage | None = None  # None: the pixels of the image file
    notes: Sequence[str] = ()  # how many samples there are and what is left out, for the report


@dataclass(frozen=True)
class Position:
    """Where a stage begins: the steps and epochs of the run before it, and its own steps that are done already."""

    stage: int
    steps_before: int = 0
    epochs_before: int = 0
    done: int = 0
    updates: int = 0  # of the optimizer
    is_pending: bool = False  # the run stopped before the validation that was due
    checkpoint: Path | None = None


def is_stale(config: ExperimentConfig, stage: int, stale: int) -> bool:
    """Whether `stale` checkpoints without a better validation end the run in `stage`, which must be its last one."""
    training = config.training
    return 0 < training.early_stop <= stale and stage == last_stage(config)


def last_stage(config: ExperimentConfig) -> int:
    return max(number for number, stage in enumerate(STAGES, 1) if config.get(f"training.{stage}").epochs)


@dataclass
class Run:
    config: ExperimentConfig
    directory: Path
    data: TrainingData
    world: World
    log: RunLog
    stop: StopSignal  # of this process; all processes act on `stopping`
    writer: CheckpointWriter
    total_steps: int
    best: dict | None = None  # name, val_loss and training.best_metric of the best checkpoint, on rank 0
    tokens: int = 0  # in all steps
    scale: LossScale | None = None  # in float16
    reward: Reward | None = None  # of stage 3; None: as its settings say
    stopping: int = 0  # the signal that ends the run, in all processes
    skipped: int = 0  # steps in a row
    highest: dict | None = None  # as `best`, in all processes, saved or not
    stale: int = 0  # checkpoints of the stage in a row that were not better
    place: str = "at its start"  # in the stage, for error messages
    shown: dict[str, float] = field(default_factory=dict)  # smoothed loss and ms, for the console
    broken: set[int] = field(default_factory=set)  # samples that bad_samples.jsonl lists already

    def sync_stop(self, has_failed: bool = False) -> bool:
        """Whether any process has had a signal or `has_failed`, the same answer in all; polls the pending save as well.

        A collective: all processes call it at the same places. A later signal waits for the next call.
        """
        number, state, has_failed = self.world.all_reduce_max([self.stop.number, self.writer.state(), int(has_failed)])
        self.stopping = self.stopping or number
        with self._tolerate_failed_save():
            self.writer.advance(state)
        return bool(self.stopping or has_failed)

    def save(
        self,
        model: MultimodalLLM,
        optimizer: torch.optim.Optimizer,
        progress: dict,
        scores: dict | None,
        is_pending: bool = False,
    ) -> None:
        """Begin a checkpoint, which is written while training goes on; the last one of the run is waited for.

        `progress` are the numbers of stage, stage_step, step and epoch, `scores` those of a validation at this step.
        `is_pending`: a validation that is due was not made.
        """
        self.wait_for_save()
        name, begin = disk.checkpoint_name(progress["epoch"], progress["step"]), time.perf_counter()
        best, metric = self.best, self.config.training.best_metric
        if scores is not None:
            best, before = better(self.best, name, scores, metric), self.highest
            self.highest = better(before, name, scores, metric)
            self.stale = 0 if self.highest is not before else self.stale + 1
        state = progress | {
            "is_pending": is_pending,
            "best": best,
            "stale": self.stale,
            "tokens": self.tokens,
            "loss_scale": self.scale and [self.scale.value, self.scale.good_steps],
            "num_samples": len(self.data.train),
            "processes": self.world.size,
            "data_sha256": self.data.sha256,
            "config": self.config.to_dict(),
        }

        def on_complete() -> None:
            self.best = best
            best_name = best["name"] if best else name
            disk.point_best(self.directory, best_name)
            disk.prune(self.directory, self.config.training.keep_checkpoints, best_name)
            print_rank0(f"saved {self.directory / name} in {duration(time.perf_counter() - begin)}")

        is_last = bool(self.stopping) or progress["step"] == self.total_steps or self.stops_early(progress["stage"])
        with self._tolerate_failed_save(is_last):
            self.writer.begin(self.directory / name, model, optimizer, state, on_complete)
            if is_last:
                self.writer.wait()

    def stops_early(self, stage: int) -> bool:
        """Whether `training.early_stop` ends the run: in its last stage, the validation does not get better any more."""
        return is_stale(self.config, stage, self.stale)

    def wait_for_save(self) -> None:
        with self._tolerate_failed_save():
            self.writer.wait()

    @contextmanager
    def _tolerate_failed_save(self, is_last: bool = False) -> Iterator[None]:
        """One checkpoint that cannot be written is a warning; the second in a row, or the last of the run, is an error."""
        try:
            yield
        except RunError as error:
            if is_last or self.writer.failures > 1:
                raise
            print_rank0(f"warning: {error}; the run goes on and tries again at the next checkpoint")

    def skip_step(self, row: dict, loss: float, norm: float, names: str) -> None:
        """Log a step whose gradient is not finite; RunError where the settings allow no more of them in a row."""
        self.wait_for_save()
        self.skipped += 1
        what = f"step {row['step']}: loss {loss}, gradient norm {norm}, with the samples {names}"
        if self.skipped > self.config.training.max_skipped_steps:
            raise RunError(
                f"{what}; the weights were not updated. Last checkpoint: {self.writer.last_saved or 'none'}. Look at "
                "these samples, lower the learning rate, or allow some such steps with training.max_skipped_steps"
            )
        print_rank0(f"warning: {what}; skipped")
        self.log.write(row | {"left_out": f"loss {loss}, gradient norm {norm}"})

    def report_overflow(self, row: dict) -> None:
        """Log a step that was skipped to find the scale: its loss is right, so it counts as no failure."""
        print_rank0(
            f"step {row['step']}: a gradient overflows float16; skipped, the loss scale is {self.scale.value:g} now"
        )
        self.log.write(row | {"left_out": f"overflow, loss scale {self.scale.value:g}"})

    def report_step(self, row: dict, is_last: bool) -> None:
        self.skipped = 0
        self.log.write(row)
        self.shown = {name: 0.9 * self.shown.get(name, row[name]) + 0.1 * row[name] for name in ("loss", "ms")}
        if is_last or row["step"] % self.config.training.log_steps == 0:
            print_rank0(progress_line(row | {"ms": self.shown["ms"]}, self.shown["loss"], self.total_steps))

    def report_broken(self, loader: BatchLoader) -> None:
        """Add to bad_samples.jsonl the images that could not be decoded when they were used."""
        for index in loader.broken.keys() - self.broken:
            self.broken.add(index)
            row = {"index": index, "file": self.data.train[index].id, "reason": loader.broken[index]}
            with warned_of_disk(self.directory / "bad_samples.jsonl") as path, path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def better(best: dict | None, name: str, scores: dict, metric: str) -> dict | None:
    """`best`, or the checkpoint `name` where its `scores` of a validation are higher by `metric` or the first of it.

    Equal CIDEr or accuracy, such as 0 at first, is decided by the loss. A metric without a finite value never wins.
    """

    def rank(row: dict) -> tuple[float, float]:
        return 0.0 if metric == "val_loss" else row[metric], -row["val_loss"]

    if scores[metric] is None or not math.isfinite(scores[metric]):
        return best
    if best is not None and metric in best and rank(scores) <= rank(best):
        return best
    return {"name": name} | {key: scores[key] for key in ("val_loss", metric)}


def best_of(config: ExperimentConfig, directory: Path, state: dict, sha256: dict[str, str]) -> dict | None:
    """The best checkpoint so far, if it still exists and was measured on the same validation data."""
    best = state.get("best")
    if not best or not (directory / best["name"]).is_dir():
        return None
    settings = [("data", "val_split"), ("data", "max_val_samples")]
    if config.training.best_metric != "val_loss":
        settings.append(("training", "num_metric_samples"))
    before = state["config"]
    is_same = state["data_sha256"].get("val") == sha256.get("val") and all(
        before[section].get(name) == config.get(f"{section}.{name}") for section, name in settings
    )
    return best if is_same else None


def goal(metric: str) -> str:
    return "lower the validation loss" if metric == "val_loss" else f"raise the {METRICS[metric]} of the validation"


def describe_best(best: dict) -> str:
    return ", ".join(f"{METRICS.get(key, 'validation loss')} {best[key]:.4f}" for key in best if key != "name")
