"""The batches that samples make."""

import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmllm.data.batches import BatchLoader, ordered_batches
from mmllm.data.chat import IGNORED, ChatProcessor, assistant, user
from mmllm.data.image import ImageProcessor
from mmllm.data.order import sample_order
from mmllm.data.samples import Sample, share_images
from mmllm.data.tokenizer import Tokenizer
from mmllm.errors import DataError, ImageError
from official import write_tokenizer


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> ChatProcessor:
    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return ChatProcessor(Tokenizer(folder), ImageProcessor(size=16), num_image_tokens=4)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    """Twelve files of twelve colours."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(12):
        Image.new("RGB", (20, 20), (20 * i, 0, 0)).save(folder / f"{i:02d}.jpg")
    return sorted(folder.iterdir())


@pytest.fixture
def samples(images) -> list[Sample]:
    return [
        Sample(str(i), (path,), (user("what", images=1), assistant("x" * (i + 1)))) for i, path in enumerate(images)
    ]


def test_rows_are_padded_on_the_right_and_padding_is_no_target(samples, processor):
    (batch,) = ordered_batches(samples[:2], processor, 2, num_workers=0)
    short = processor.encode(list(samples[0].messages))
    assert batch.ids_BT.shape == batch.labels_BT.shape == (2, len(short.ids) + 1)
    assert batch.ids_BT[0].tolist() == [*short.ids, processor.tokenizer.pad_id]
    assert batch.labels_BT[0].tolist() == [*short.labels, IGNORED]
    assert torch.equal(batch.pixels_N3SS[1], processor.image_processor(samples[1].images[0]))


def test_text_only_batches_have_no_pixels_but_their_shape(processor):
    samples = [Sample("0", (), (user("a"), assistant("b")))]
    (batch,) = ordered_batches(samples, processor, 4, num_workers=0)
    assert batch.pixels_N3SS.shape == (0, 3, 16, 16)


def test_images_come_in_the_order_of_their_rows(samples, images, processor):
    two = Sample("two", (images[5], images[0]), (user("which", images=2), assistant("a")))
    text = Sample("text", (), (user("a"), assistant("b")))
    (batch,) = ordered_batches([two, text, samples[3]], processor, 3, num_workers=0)
    expected = [processor.image_processor(images[i]) for i in (5, 0, 3)]
    assert torch.equal(batch.pixels_N3SS, torch.stack(expected))


def test_validation_sees_every_sample_once(samples, processor):
    sizes = [len(batch.ids_BT) for batch in ordered_batches(samples, processor, 5, num_workers=2)]
    assert sizes == [5, 5, 2]


def contents(loader: BatchLoader, epoch: int = 0, start: int = 0) -> list[tuple]:
    return [
        (batch.ids_BT.tolist(), batch.pixels_N3SS.sum((1, 2, 3)).tolist()) for batch in loader.batches(epoch, start)
    ]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_threads_change_nothing(samples, processor, num_workers):
    alone = BatchLoader(samples, processor, 2, num_workers=0)
    ahead = BatchLoader(samples, processor, 2, num_workers=num_workers)
    assert contents(ahead) == contents(alone)
    assert len(alone) == len(contents(alone)) == 6


def test_an_epoch_goes_on_from_any_batch(samples, processor):
    loader = BatchLoader(samples, processor, 2)
    assert contents(loader, epoch=1, start=4) == contents(loader, epoch=1)[4:]
    assert contents(loader, epoch=1) != contents(loader, epoch=0)


def test_processes_share_each_global_batch(samples, processor):
    whole = BatchLoader(samples, processor, 4)
    halves = [BatchLoader(samples, processor, 2, rank=rank, world_size=2) for rank in range(2)]
    order = sample_order(len(samples), seed=0, epoch=0)
    assert [len(loader) for loader in (whole, *halves)] == [3, 3, 3]
    for number in range(3):
        shares = [loader.indices(order, number) for loader in halves]
        assert shares[0] + shares[1] == whole.indices(order, number)


def test_a_loader_that_is_left_early_ends_its_threads(samples, processor):
    batches = BatchLoader(samples, processor, 2, num_workers=2).batches(0)
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batch")]


def test_fewer_samples_than_a_global_batch_are_refused(samples, processor):
    with pytest.raises(DataError, match="12 samples do not fill one batch of 4 x 4 processes; lower data.batch_size"):
        BatchLoader(samples, processor, 4, world_size=4)


def test_an_image_that_breaks_under_way_is_replaced_by_the_next_sample(samples, processor, tmp_path):
    whole = [samples[i] for i in (0, 1, 2, 4, 4, 5)]
    samples[3] = Sample("3", (tmp_path / "gone.jpg",), samples[3].messages)
    loader = BatchLoader(samples[:6], processor, 2, max_broken=1)
    assert contents(loader) == contents(BatchLoader(whole, processor, 2))
    assert loader.broken == {3: f"no such image: {tmp_path}/gone.jpg"}


def test_more_broken_images_than_allowed_end_the_run(samples, processor, tmp_path):
    samples[3] = Sample("three", (tmp_path / "gone.jpg",), samples[3].messages)
    with pytest.raises(DataError, match=r"sample 3 \(three\): no such image") as caught:
        contents(BatchLoader(samples, processor, 2))
    assert isinstance(caught.value.__cause__, ImageError)


@pytest.mark.parametrize("share", [True, False])
def test_an_image_in_several_rows_is_decoded_and_encoded_once(share, images, processor):
    texts = [Sample("", (images[3],), (user("what", images=1), assistant("x" * (9 + i)))) for i in range(6)]
    limit = len(processor.encode(list(texts[-1].messages)).ids) + 10
    groups = share_images(texts) if share else texts
    read = []
    (batch,) = ordered_batches(
        [*groups, Sample("", (images[5],), texts[0].messages)],
        processor,
        7,
        max_length=limit,
        num_workers=0,
        read_image=lambda path: read.append(path) or processor.image_processor(path),
    )
    assert read == [images[3], images[5]] and len(batch.pixels_N3SS) == 2
    rows = len(batch.ids_BT)
    assert 2 < rows <= 7 and batch.image_index_P.tolist() == [0] * (rows - 1) + [1]
