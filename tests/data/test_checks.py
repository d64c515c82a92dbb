"""The check before training: every bad sample is named, refused or left out."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmllm.config.schema import DataConfig
from mmllm.data.chat import ChatProcessor, assistant, user
from mmllm.data.checks import BadSample, check_samples, checked_samples, image_fault
from mmllm.data.image import ImageProcessor, decode
from mmllm.data.samples import Sample, read_samples
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


def written(folder: Path, content: object, name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_every_bad_sample_is_named_with_its_file_and_reason(samples, processor, tmp_path):
    (tmp_path / "cut.jpg").write_bytes(samples[1].images[0].read_bytes()[:-40])
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    Image.new("1", (8000, 8000)).save(tmp_path / "bomb.png")  # 64 megapixels in 8 kB
    turns = samples[0].messages
    samples[1] = Sample("cut", (tmp_path / "cut.jpg",), turns)
    samples[3] = Sample("page", (tmp_path / "page.jpg",), turns)
    samples[4] = Sample("bomb", (tmp_path / "bomb.png",), turns)
    samples[6] = Sample("gone", (tmp_path / "gone.jpg",), turns)
    samples[7] = Sample("silent", samples[7].images, (user("what", images=1),))
    samples[8] = Sample("long", samples[8].images, (user("what", images=1), assistant("x" * 500)))
    samples[10] = Sample("half", samples[8].images, (user("what", images=1), assistant("\ud83d")))
    samples[9] = Sample("odd", (), (), fault="`image` must be a file name")
    bad, _ = check_samples(samples, processor, max_length=100)
    assert bad == [
        BadSample(1, f"{tmp_path}/cut.jpg", f"{tmp_path}/cut.jpg: broken or cut off; save or send it again"),
        BadSample(
            3,
            f"{tmp_path}/page.jpg",
            f"{tmp_path}/page.jpg: not an image of a supported format; use JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF "
            "(for HEIC: pip install pillow-heif)",
        ),
        BadSample(
            4,
            f"{tmp_path}/bomb.png",
            f"{tmp_path}/bomb.png: 8000 x 8000 is 64 megapixels, at most 50; resize it first",
        ),
        BadSample(6, f"{tmp_path}/gone.jpg", f"no such image: {tmp_path}/gone.jpg"),
        BadSample(7, "silent", "no assistant turn, so there is nothing to train on"),
        BadSample(8, "long", "takes 565 tokens, but max_length is 100; shorten it or raise max_length"),
        BadSample(9, "odd", "`image` must be a file name"),
        BadSample(10, "half", "a text holds half of a character (a lone surrogate); write the whole character"),
    ]


@pytest.mark.parametrize("text", ["", "A cat.", "x" * 300, "\U0001d160" * 30, "\u0958" * 30])
def test_a_sample_fits_to_the_token(text, samples, processor):
    sample = Sample("0", samples[0].images, (user("what", images=1), assistant(text)))
    length = len(processor.encode(list(sample.messages)).ids)
    found = [check_samples([sample], processor, length - less) for less in (-1000, 0, 1)]
    assert [bool(bad) for bad, _ in found] == [False, False, True]


def test_an_image_that_is_broken_in_the_middle_shows_it_only_when_it_is_decoded(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.png")
    content = bytearray((tmp_path / "x.png").read_bytes())
    content[2000:2100] = bytes(100)
    (tmp_path / "x.png").write_bytes(content)
    assert image_fault(tmp_path / "x.png") == ""
    with pytest.raises(ImageError, match="broken or cut off"):
        decode(tmp_path / "x.png")


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.gif", "x.bmp", "x.tif"])
def test_a_whole_image_of_every_kind_passes(name, tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / name)
    assert image_fault(tmp_path / name) == ""


def test_bytes_after_the_end_of_an_image_do_no_harm(images, tmp_path):
    (tmp_path / "x.jpg").write_bytes(images[0].read_bytes() + b"\0" * 100)
    assert image_fault(tmp_path / "x.jpg") == ""


@pytest.fixture
def one_bad_in_four(tmp_path, images) -> Path:
    records = [{"image": path.name, "text": "a"} for path in images[:4]]
    records[2] = {"image": images[2].name}
    return written(tmp_path, records)


def settings_for(images: list[Path], policy: str, max_fraction: float) -> DataConfig:
    return DataConfig(image_dir=str(images[0].parent), bad_samples=policy, max_bad_fraction=max_fraction)


def test_bad_samples_end_the_run_before_it_begins(one_bad_in_four, processor, images, tmp_path):
    report = tmp_path / "run" / "bad_samples.jsonl"
    with pytest.raises(DataError, match="1 of 4 samples are bad; fix those listed in .*The first is sample 2"):
        checked_samples(one_bad_in_four, settings_for(images, "error", 0.5), processor, report, split="train")
    assert report.exists()


def test_bad_samples_may_be_left_out_and_are_listed(one_bad_in_four, processor, images, tmp_path):
    report = tmp_path / "run" / "bad_samples.jsonl"
    settings = settings_for(images, "skip", 0.25)
    good, _ = checked_samples(one_bad_in_four, settings, processor, report, split="train")
    assert [sample.id for sample in good] == ["0", "1", "3"]
    assert json.loads(report.read_text()) == {
        "index": 2,
        "file": "2",
        "reason": "needs `conversations` or `messages` (a list of turns), `text`, `captions` or `answer`",
    }


def test_too_many_bad_samples_are_not_left_out(one_bad_in_four, processor, images, tmp_path):
    settings = settings_for(images, "skip", 0.2)
    with pytest.raises(DataError, match=r"1 of 4 samples are bad, more than data\.max_bad_fraction=0\.2 allows"):
        checked_samples(one_bad_in_four, settings, processor, tmp_path / "bad_samples.jsonl", split="train")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk without room, as Linux has it")
def test_a_full_disk_while_bad_samples_are_listed_is_a_warning(one_bad_in_four, processor, images, capsys):
    settings = settings_for(images, "skip", 0.5)
    samples, _ = checked_samples(one_bad_in_four, settings, processor, Path("/dev/full"), split="train")
    assert len(samples) == 3
    assert "warning: /dev/full: cannot be written (No space left on device)" in capsys.readouterr().err


def test_a_limit_takes_the_first_samples_and_checks_no_other(one_bad_in_four, processor, images, tmp_path):
    settings = settings_for(images, "error", 0.0)
    good, _ = checked_samples(one_bad_in_four, settings, processor, tmp_path / "bad.jsonl", split="train", limit=2)
    assert [sample.id for sample in good] == ["0", "1"]
    assert len(read_samples(one_bad_in_four)) == 4


def test_the_exchanges_that_do_not_fit_are_counted(processor, images, tmp_path):
    talk = [("human", "<image>\nWhat?"), ("gpt", "A cat."), *[("human", "Is it old?"), ("gpt", "No.")] * 6]
    turns = [{"from": role, "value": text} for role, text in talk]
    records = [{"image": images[0].name, "conversations": turns[:end]} for end in (14, 14, 2)]
    path, settings = written(tmp_path, records), settings_for(images, "error", 0.0)
    whole = processor.encode(list(read_samples(path)[0].messages))
    exchange = (len(whole.ids) - len(processor.encode(list(read_samples(path)[2].messages)).ids)) // 6
    settings.max_length = len(whole.ids) - exchange - 1  # two of seven exchanges have to go
    samples, note = checked_samples(path, settings, processor, tmp_path / "bad.jsonl", split="train")
    assert note == (
        f"{path}: 4 exchanges ({4 * exchange} tokens) of 2 samples are left out, because these are longer than "
        f"data.max_length={settings.max_length}"
    )
    assert len(processor.encode(list(samples[0].messages), settings.max_length).ids) == len(whole.ids) - 2 * exchange
    settings.max_length = len(whole.ids)
    assert checked_samples(path, settings, processor, tmp_path / "bad.jsonl", split="train")[1] == ""


def test_the_validation_may_have_an_image_folder_of_its_own(processor, images, tmp_path):
    (tmp_path / "val").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "val" / "0.png")
    path = written(tmp_path, [{"image": "0.png", "text": "a"}])
    settings, val = settings_for(images, "error", 0.0), str(tmp_path / "val")
    (sample,), _ = checked_samples(path, settings, processor, tmp_path / "bad.jsonl", split="val", image_dir=val)
    assert sample.images == (tmp_path / "val" / "0.png",)
    with pytest.raises(DataError, match=r"no such image: .*0\.png"):
        checked_samples(path, settings, processor, tmp_path / "bad.jsonl", split="val")
