"""Samples to batches, in a stateless order.

The order of samples is a pure function of (seed, epoch), so a run resumes from one integer, on any number of processes.

B rows, T tokens, N images of all rows, S pixels a side; Q visual tokens of F features where images are features.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from mmllm.config.schema import DataConfig
from mmllm.data.augment import RandomParts
from mmllm.data.chat import IGNORED, ChatProcessor, Encoded
from mmllm.data.order import sample_order
from mmllm.data.packing import PADDING, encode_shared, rough_length
from mmllm.data.samples import Sample
from mmllm.errors import DataError, ImageError
from mmllm.runtime.console import stderr
from mmllm.runtime.threads import worker_pool

Item = TypeVar("Item")


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right, and the pixels of their images; N may be 0.

    `segment_ids_BT` is None where each row is one conversation, see packing.py. `image_index_P` says which image each of
    P places in the rows shows, in their order; None where each shows the next one. With cached features, `pixels_N3SS`
    holds these, (N, Q, F). `factors_M` says how much each of M targets counts in the loss, row by row; None: 1.
    """

    ids_BT: Tensor
    labels_BT: Tensor
    pixels_N3SS: Tensor
    segment_ids_BT: Tensor | None = None
    image_index_P: Tensor | None = None
    factors_M: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(x if x is None else x.to(device, non_blocking=True) for x in vars(self).values()))

    def pinned(self) -> "Batch":
        """The same in memory from which a GPU copies while it computes."""
        return Batch(*(x if x is None else x.pin_memory() for x in vars(self).values()))


def collate(rows: list[Encoded], pixels: list[Tensor], pad_id: int, image_size: int) -> Batch:
    """The batch of encoded conversations and the pixels of their images."""
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


EncodedRow = tuple[Encoded, list[Tensor]]  # a row of tokens and the pixels of its images
ReadImage = Callable[[Path], Tensor]  # an image file to pixels (3, S, S), or to features (Q, F), see features.py


def read_rows(
    sample: Sample, processor: ChatProcessor, max_length: int | None = None, read_image: ReadImage | None = None
) -> list[EncodedRow]:
    """The rows of a sample and of those that share its images: one, or as few as they fit into."""
    pixels = [(read_image or processor.image_processor)(path) for path in sample.images]
    return [(row, pixels) for row in encode_shared(sample, processor, max_length)]


def make_batch(rows: list[EncodedRow], processor: ChatProcessor) -> Batch:
    """`collate` with the padding token and the image size of `processor`; an image in several places is in it once."""
    pixels = list({id(image): image for _, images in rows for image in images}.values())
    number = {id(image): i for i, image in enumerate(pixels)}
    index = [number[id(images[i])] for row, images in rows for i in row.images]
    batch = collate([row for row, _ in rows], pixels, processor.tokenizer.pad_id, processor.image_processor.size)
    return batch if index == list(range(len(pixels))) else replace(batch, image_index_P=torch.tensor(index))


class BatchMaker:
    """`make(indices)` is the batch of these samples: what `read` makes of each, put together by `collate`.

    A sample whose image cannot be decoded is replaced by the next one. It is reported on stderr once, and `broken` says
    why, by index. DataError for one more than `max_broken`.
    """

    def __init__(
        self,
        samples: list[Sample],
        processor: ChatProcessor,
        max_length: int | None,
        read_image: ReadImage | None,
        max_broken: int,
        read: Callable[..., list] = read_rows,
        collate: Callable[[list, ChatProcessor], Item] = make_batch,
    ):
        self.samples, self.processor, self.max_length = samples, processor, max_length
        self.read_image, self.max_broken = read_image or processor.image_processor, min(max_broken, len(samples) - 1)
        self.read, self.collate = read, collate
        self.broken: dict[int, str] = {}

    def __call__(self, indices: Iterable[int], read_image: ReadImage | None = None) -> Item:
        read_image = cache(read_image or self.read_image)
        return self.collate([row for index in indices for row in self._rows(index, read_image)], self.processor)

    def _rows(self, index: int, read_image: ReadImage) -> list:
        while True:
            sample = self.samples[index]
            try:
                return self.read(sample, self.processor, self.max_length, read_image)
            except ImageError as error:
                is_new = index not in self.broken
                self.broken[index] = str(error)
                if len(self.broken) > self.max_broken:
                    limit = f"data.bad_samples and data.max_bad_fraction allow {self.max_broken} such samples"
                    raise DataError(f"sample {index} ({sample.id}): {error}; {limit}") from error
                if is_new:
                    stderr(f"warning: sample {index} ({sample.id}) is replaced by the next one: {error}")
            index = (index + 1) % len(self.samples)


class BatchLoader:
    """Shuffled micro-batches of `samples`, prepared ahead by threads (decoding an image releases the GIL).

    Each of `world_size` processes gets its own slice of every global batch; the last samples of an epoch that do not
    fill a global batch are left out. At most `max_broken` samples may turn out to be broken, see BatchMaker. With
    `augment` each epoch shows other parts of the images, see augment.py.
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
        augment: bool = False,
        read: Callable[..., list] = read_rows,
        collate: Callable[[list, ChatProcessor], Item] = make_batch,
    ):
        if len(samples) < batch_size * world_size:
            raise DataError(
                f"{len(samples)} samples do not fill one batch of {batch_size} x {world_size} processes; "
                "lower data.batch_size or add samples"
            )
        self.samples, self.processor, self.batch_size, self.seed = samples, processor, batch_size, seed
        self.num_workers, self.rank, self.world_size = num_workers, rank, world_size
        self.accumulation, self.group_by_length = accumulation, group_by_length
        self.make = BatchMaker(samples, processor, max_length, read_image, max_broken, read, collate)
        self.broken = self.make.broken
        self.parts = RandomParts(processor.image_processor, samples, seed) if augment else None

    def __len__(self) -> int:
        """Micro-batches of an epoch, in each process."""
        return len(self.samples) // (self.batch_size * self.world_size)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Item]:
        """The micro-batches of an epoch from number `start` on."""
        order = sample_order(len(self.samples), self.seed, epoch)
        numbers = range(start, len(self))
        read_image = self.parts.of_epoch(epoch) if self.parts else None
        yield from prefetch(
            lambda number: self.make(self.indices(order, number), read_image), numbers, self.num_workers
        )

    def indices(self, order: list[int], number: int) -> list[int]:
        """The samples of this process's micro-batch `number`.

        `group_by_length` sorts the samples of an optimizer step (`accumulation` micro-batches of all processes) by length:
        the step's gradient stays the same, and all processes work on rows of similar length at any time.
        """
        step, number = divmod(number, self.accumulation)
        size = self.batch_size * self.world_size * self.accumulation
        of_step = order[step * size : (step + 1) * size]
        if self.group_by_length:
            of_step = sorted(of_step, key=lambda index: rough_length(self.samples[index], self.processor))
        start = (number * self.world_size + self.rank) * self.batch_size
        return of_step[start : start + self.batch_size]


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
    """All samples in their given order, for validation; the last batch may be smaller."""
    make = BatchMaker(samples, processor, max_length, read_image, max_broken)
    starts = range(0, len(samples), batch_size)
    return prefetch(lambda start: make(range(start, min(start + batch_size, len(samples)))), starts, num_workers)


def allowed_broken(settings: DataConfig, samples: list[Sample]) -> int:
    """How many samples may turn out to be broken when they are used."""
    return int(settings.max_bad_fraction * len(samples)) if settings.bad_samples == "skip" else 0


def prefetch(make: Callable[[int], Item], numbers: range, num_workers: int) -> Iterator[Item]:
    """`make(number)` for each number, in order, by threads that work a few ahead; with 0 workers, on demand."""
    if num_workers == 0:
        yield from map(make, numbers)
        return
    waiting: list[Future[Item]] = []
    with worker_pool(num_workers, "batch") as pool:
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
