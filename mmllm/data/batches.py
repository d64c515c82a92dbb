"""Samples to batches, in an order that nobody has to remember.

The surprising fact: the order of samples is a pure function of (seed, epoch, index), so a run resumes from one integer,
on any number of processes.
Next: trainer.py.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmllm.config.schema import DataConfig
from mmllm.data.chat import IGNORED, IMAGE, ChatProcessor, Encoded
from mmllm.data.packing import PADDING, encode_shared
from mmllm.data.samples import Sample
from mmllm.errors import DataError, ImageError
from mmllm.runtime.console import stderr


def sample_order(num_samples: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch: a permutation that depends on nothing but its arguments.

    The indices are sorted by numbers of splitmix64 (https://prng.di.unimi.it/splitmix64.c): numpy's own permutations may
    change from one version to the next, and a resumed run would see other samples.
    """
    start = mixed(mixed(np.array([seed], np.uint64) * GOLDEN) + np.array([epoch], np.uint64) * GOLDEN)
    return np.argsort(mixed(start + np.arange(1, num_samples + 1, dtype=np.uint64) * GOLDEN), kind="stable").tolist()


GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mixed(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right: ids and labels (B, T), pixels of all their pictures in order (N, 3, S, S), N may be 0.

    `branches_BT` is None where each row is one conversation. Where the tower's work was done before, the pictures are
    features (N, Q, F).
    """

    ids_BT: Tensor
    labels_BT: Tensor
    pixels_N3SS: Tensor
    segment_ids_BT: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(x if x is None else x.to(device, non_blocking=True) for x in vars(self).values()))


def collate(rows: list[Encoded], pixels: list[Tensor], pad_id: int, image_size: int) -> Batch:
    """One batch of encoded conversations and their pictures."""
    length = max(len(row.ids) for row in rows)
    ids_BT = torch.full((len(rows), length), pad_id)
    labels_BT = torch.full((len(rows), length), IGNORED)
    segment_ids_BT = torch.full((len(rows), length), PADDING) if any(row.segment_ids for row in rows) else None
    for i, row in enumerate(rows):
        ids_BT[i, : len(row.ids)] = torch.tensor(row.ids)
        labels_BT[i, : len(row.labels)] = torch.tensor(row.labels)
        if segment_ids_BT is not None:
            segment_ids_BT[i, : len(row.ids)] = torch.tensor(row.segment_ids or [0] * len(row.ids))
    pixels_N3SS = torch.stack(pixels) if pixels else torch.zeros(0, 3, image_size, image_size)
    return Batch(ids_BT, labels_BT, pixels_N3SS, segment_ids_BT)


Row = tuple[Encoded, list[Tensor]]  # a conversation and the pixels of its pictures
ReadImage = Callable[[Path], Tensor]  # a picture's pixels (3, S, S), or its features (Q, F), see features.py


class BatchLoader:
    """Shuffled micro-batches of `samples`, made ahead by threads (decoding a picture frees the interpreter).

    Each of `world_size` processes gets its own slice of every global batch; the last samples of an epoch that fill no
    global batch wait for another epoch. A picture that proves broken only now is replaced by the next sample, as long
    as no more than `max_broken` do; which ones and why is in `broken`.
    """

    def __init__(
        self,
        samples: list[Sample],
        processor: ChatProcessor,
        batch_size: int,
        *,
        seed: int = 0,
        max_length: int | None = None,
        num_workers: int = 2,
        rank: int = 0,
        world_size: int = 1,
        max_broken: int = 0,
        read_image: ReadImage | None = None,
        accumulation: int = 1,
        group_by_length: bool = False,
    ):
        if len(samples) < batch_size * world_size:
            raise DataError(
                f"{len(samples)} samples do not fill one batch of {batch_size} x {world_size} processes; "
                "lower data.batch_size or bring more samples"
            )
        self.samples, self.processor, self.max_length = samples, processor, max_length
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self.rank, self.world_size, self.max_broken = rank, world_size, max_broken
        self.read_image = read_image or processor.image_processor
        self.accumulation, self.group_by_length = accumulation, group_by_length
        self.broken: dict[int, str] = {}

    def __len__(self) -> int:
        """Micro-batches of an epoch, for each process."""
        return len(self.samples) // (self.batch_size * self.world_size)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The micro-batches of an epoch from number `start` on."""
        order = sample_order(len(self.samples), self.seed, epoch)
        yield from prefetch(lambda number: self._make(order, number), range(start, len(self)), self.num_workers)

    def indices(self, order: list[int], number: int) -> list[int]:
        """The samples of this process's micro-batch `number`.

        `group_by_length` sorts the samples of an optimiser step (`accumulation` micro-batches of all processes) by length:
        its gradient stays, and at any moment all processes have rows of like length.
        """
        step, number = divmod(number, self.accumulation)
        size = self.batch_size * self.world_size * self.accumulation
        of_step = order[step * size : (step + 1) * size]
        if self.group_by_length:
            of_step = sorted(of_step, key=lambda index: rough_length(self.samples[index], self.processor))
        start = (number * self.world_size + self.rank) * self.batch_size
        return of_step[start : start + self.batch_size]

    def _make(self, order: list[int], number: int) -> Batch:
        rows = [row for index in self.indices(order, number) for row in self._read(index)]
        return make_batch(rows, self.processor)

    def _read(self, index: int) -> list[Row]:
        def read(sample: Sample) -> list[Row]:
            return read_rows(sample, self.processor, self.max_length, self.read_image)

        return first_readable(self.samples, index, read, self.broken, self.max_broken)


def first_readable(
    samples: list[Sample], index: int, read: Callable[[Sample], list[Row]], broken: dict[int, str], max_broken: int
) -> list[Row]:
    """What `read` makes of the sample at `index`, or of the first one after it whose pictures are whole. Those that are
    not are told and go into `broken`; DataError for one more than `max_broken`."""
    while True:
        try:
            return read(samples[index])
        except ImageError as error:
            is_new = index not in broken
            broken[index] = str(error)
            if len(broken) > min(max_broken, len(samples) - 1):
                raise DataError(f"sample {index} ({samples[index].id}): {error}") from error
            if is_new:
                stderr(f"warning: sample {index} ({samples[index].id}) is replaced by the next one: {error}")
        index = (index + 1) % len(samples)


def allowed_broken(settings: DataConfig, samples: list[Sample]) -> int:
    """How many of the samples may prove broken when they are used."""
    return int(settings.max_bad_fraction * len(samples)) if settings.bad_samples == "skip" else 0


def rough_length(sample: Sample, processor: ChatProcessor) -> int:
    """About the length of the sample's row in letters, without the price of its tokens."""
    texts = [message for one in (sample, *sample.shared) for message in one.messages]
    letters = sum(len(part) for message in texts for part in message.parts if part is not IMAGE)
    return letters + 4 * processor.num_image_tokens * len(sample.images)


def ordered_batches(
    samples: list[Sample],
    processor: ChatProcessor,
    batch_size: int,
    *,
    max_length: int | None = None,
    num_workers: int = 2,
    read_image: ReadImage | None = None,
    max_broken: int = 0,
) -> Iterator[Batch]:
    """All samples in their order, the last batch as small as it is: for validation."""
    broken: dict[int, str] = {}

    def read(sample: Sample) -> list[Row]:
        return read_rows(sample, processor, max_length, read_image)

    def make(start: int) -> Batch:
        part = range(start, min(start + batch_size, len(samples)))
        rows = [row for index in part for row in first_readable(samples, index, read, broken, max_broken)]
        return make_batch(rows, processor)

    return prefetch(make, range(0, len(samples), batch_size), num_workers)


def read_row(sample: Sample, processor: ChatProcessor, max_length: int | None = None) -> Row:
    """The row of a sample alone."""
    encoded = processor.encode(list(sample.messages), max_length)
    return encoded, [processor.image_processor(path) for path in sample.images]


def read_rows(
    sample: Sample, processor: ChatProcessor, max_length: int | None = None, read_image: ReadImage | None = None
) -> list[Row]:
    """The rows of a sample and of those that share its pictures: one, or as few as they fit into."""
    pixels = [(read_image or processor.image_processor)(path) for path in sample.images]
    return [(row, pixels) for row in encode_shared(sample, processor, max_length)]


def make_batch(rows: list[Row], processor: ChatProcessor) -> Batch:
    pixels = [image for _, images in rows for image in images]
    return collate([row for row, _ in rows], pixels, processor.tokenizer.pad_id, processor.image_processor.size)


def prefetch(make: Callable[[int], Batch], numbers: range, num_workers: int) -> Iterator[Batch]:
    """`make(number)` for each number, in order, made by threads a few ahead; 0 workers: made when asked for."""
    if num_workers == 0:
        yield from map(make, numbers)
        return
    waiting: list[Future[Batch]] = []
    with ThreadPoolExecutor(num_workers, thread_name_prefix="batch") as pool:
        try:
            for number in numbers:
                waiting.append(pool.submit(make, number))
                if len(waiting) > 2 * num_workers:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()
