"""Data files to samples, what is wrong with them, and the batches they make."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmllm.config.schema import DataConfig, ExperimentConfig
from mmllm.data.batches import BatchLoader, ordered_batches, sample_order
from mmllm.data.chat import IGNORED, IMAGE, ChatProcessor, Message, assistant, user
from mmllm.data.image import ImageProcessor
from mmllm.data.samples import (
    BadSample,
    Sample,
    check_samples,
    checked_samples,
    image_fault,
    load_samples,
    read_samples,
)
from mmllm.data.tokenizer import Tokenizer
from mmllm.errors import DataError, ImageError
from mmllm.training.resume import data_sha256
from official import write_tokenizer

CAT = {"image": "cat.jpg", "text": "A cat.", "prompt": "What is this?"}


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> ChatProcessor:
    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return ChatProcessor(Tokenizer(folder), ImageProcessor(size=16), num_image_tokens=4)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    """Twelve files of twelve colours."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(12):
        Image.new("RGB", (20, 20), (20 * i, 0, 0)).save(folder / f"{i:02d}.jpg")
    return sorted(folder.iterdir())


@pytest.fixture
def samples(pictures) -> list[Sample]:
    return [
        Sample(str(i), (path,), (user("what", images=1), assistant("x" * (i + 1)))) for i, path in enumerate(pictures)
    ]


def written(folder: Path, content: object, name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


# formats


def test_a_conversation_keeps_its_turns_and_the_places_of_its_pictures(tmp_path):
    record = {
        "id": "seven",
        "image": ["a.jpg", "b.jpg"],
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "<image> or <image>?"},
            {"from": "gpt", "value": "The first."},
            {"from": "user", "value": "Why?"},
            {"from": "assistant", "value": "It has an <image> in it."},
        ],
    }
    assert load_samples(written(tmp_path, [record]), "pictures") == [
        Sample(
            id="seven",
            images=(Path("pictures/a.jpg"), Path("pictures/b.jpg")),
            messages=(
                Message("system", ("Be brief.",)),
                Message("user", (IMAGE, " or ", IMAGE, "?")),
                assistant("The first."),
                user("Why?"),
                assistant("It has an <image> in it."),
            ),
            references=("It has an <image> in it.",),
        )
    ]


def test_a_picture_without_a_mark_comes_first(tmp_path):
    turns = [{"from": "human", "value": "What is this?"}, {"from": "assistant", "value": "A cat."}]
    (sample,) = load_samples(written(tmp_path, [{"image": "cat.jpg", "conversations": turns}]))
    assert sample.messages[0] == user("What is this?", images=1)
    assert sample.images == (tmp_path / "cat.jpg",)


def test_a_conversation_may_have_no_picture(tmp_path):
    turns = [{"from": "human", "value": "Hello."}, {"from": "assistant", "value": "Hello!"}]
    (sample,) = load_samples(written(tmp_path, [{"conversations": turns}]))
    assert (sample.images, sample.messages) == ((), (user("Hello."), assistant("Hello!")))


def test_image_text_prompt_is_a_question_and_its_answer(tmp_path):
    first, second = load_samples(written(tmp_path, [CAT, {"image": "dog.jpg", "text": "A dog."}]))
    assert first.messages == (user("What is this?", images=1), assistant("A cat."))
    assert second.messages == (user("Describe this image.", images=1), assistant("A dog."))
    assert second.references == ("A dog.",)


def test_several_captions_are_several_samples_with_all_of_them_as_references(tmp_path):
    first, second = load_samples(written(tmp_path, [{"image": "cat.jpg", "captions": ["A cat.", "One cat."]}]))
    assert (first.id, second.id) == ("0#0", "0#1")
    assert (first.messages[1], second.messages[1]) == (assistant("A cat."), assistant("One cat."))
    assert first.references == second.references == ("A cat.", "One cat.")


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([CAT, CAT]),
        "\ufeff" + json.dumps([CAT, CAT]),
        json.dumps(CAT) + "\n" + json.dumps(CAT) + "\n\n",
        "\ufeff" + json.dumps(CAT) + "\r\n" + json.dumps(CAT),
    ],
    ids=["list", "list with BOM", "lines", "lines with BOM and CRLF"],
)
def test_a_list_and_lines_are_the_same_with_or_without_a_byte_order_mark(content, tmp_path):
    assert [sample.messages[1] for sample in load_samples(written(tmp_path, content))] == [assistant("A cat.")] * 2


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path):
    lines = "\n".join(json.dumps({"prompt": "a", "text": f"{i}\u2028\x85"}, ensure_ascii=False) for i in range(2))
    assert [sample.references for sample in load_samples(written(tmp_path, lines))] == [
        ("0\u2028\x85",),
        ("1\u2028\x85",),
    ]


def test_a_single_line_with_several_pictures_is_a_sample(tmp_path):
    (sample,) = load_samples(written(tmp_path, {"images": ["a.jpg", "b.jpg"], "text": "Two."}))
    assert len(sample.images) == 2


def test_coco_captions(tmp_path):
    content = {
        "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"}],
        "annotations": [
            {"image_id": 8, "id": 1, "caption": "One. "},
            {"image_id": 7, "id": 2, "caption": "Two."},
            {"image_id": 8, "id": 3, "caption": "Three."},
        ],
    }
    found = load_samples(written(tmp_path, content))
    assert [(sample.id, sample.images[0].name, sample.references) for sample in found] == [
        ("8#0", "b.jpg", ("One.", "Three.")),
        ("8#1", "b.jpg", ("One.", "Three.")),
        ("7", "a.jpg", ("Two.",)),
    ]


def karpathy(folder: Path) -> Path:
    parts = ["train", "restval", "val", "test"]
    images = [
        {"filepath": "val2014", "filename": f"{i}.jpg", "cocoid": i, "split": part, "sentences": [{"raw": f"{part}. "}]}
        for i, part in enumerate(parts)
    ]
    return written(folder, {"dataset": "coco", "images": images}, "dataset_coco.json")


def test_karpathys_restval_is_for_training(tmp_path):
    found = load_samples(karpathy(tmp_path), split="train")
    assert [sample.references for sample in found] == [("train.",), ("restval.",)]
    assert found[0].images == (tmp_path / "val2014" / "0.jpg",)


def test_a_file_of_several_splits_is_never_read_whole(tmp_path):
    with pytest.raises(DataError, match="holds the splits train, val, test; None is none of them"):
        load_samples(karpathy(tmp_path))


def test_flickr8k_tokens(tmp_path):
    text = "a.jpg#0\tOne .\na.jpg#1\tTwo # 2 .\nb.jpg#0\tThree .\n"
    found = load_samples(written(tmp_path, text, "Flickr8k.token.txt"))
    assert [(sample.id, sample.references) for sample in found] == [
        ("a.jpg#0", ("One .", "Two # 2 .")),
        ("a.jpg#1", ("One .", "Two # 2 .")),
        ("b.jpg", ("Three .",)),
    ]


def test_vqa_questions_find_their_answers_in_the_file_beside_them(tmp_path):
    question = {"question_id": 5, "image_id": 458752, "question": "What is it?"}
    answers = [{"answer": "net"}, {"answer": "a net"}, {"answer": "net"}]
    annotation = {"question_id": 5, "answers": answers, "answer_type": "other"}
    content = {"data_subtype": "train2014", "questions": [question]}
    path = written(tmp_path, content, "v2_OpenEnded_mscoco_train2014_questions.json")
    (unanswered,) = load_samples(path)
    written(tmp_path, {"annotations": [annotation]}, "v2_mscoco_train2014_annotations.json")
    (sample,) = load_samples(path)
    assert unanswered.messages == (user("What is it?", images=1),)
    assert sample == Sample(
        id="5",
        images=(tmp_path / "COCO_train2014_000000458752.jpg",),
        messages=(user("What is it?", images=1), assistant("net")),
        references=("net", "a net", "net"),
        kind="other",
    )


@pytest.mark.parametrize(
    "name, content, words",
    [
        (
            "v2_mscoco_train2014_annotations.json",
            '{"annotations": [',
            "annotations.json: line 1: .*; is the file whole",
        ),
        (
            "v2_OpenEnded_mscoco_train2014_questions.json",
            '{"data_subtype": "train2014", "questions": [{"question_id": 1, "image_id": "x", "question": "?"}]}',
            "looks like a file of COCO, Karpathy or VQAv2, but is not whole",
        ),
    ],
)
def test_a_vqa_file_that_is_not_whole_is_named(tmp_path, name, content, words):
    questions = tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json"
    questions.write_text('{"data_subtype": "train2014", "questions": []}')
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=words):
        load_samples(questions)


def test_the_answers_of_vqa_belong_to_what_a_run_was_trained_on(tmp_path):
    config = ExperimentConfig()
    config.data.train_data_path = str(tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json")
    config.data.features_path = str(tmp_path / "features.safetensors")
    answers = tmp_path / "v2_mscoco_train2014_annotations.json"
    for path in (config.data.train_data_path, config.data.features_path, answers):
        Path(path).write_text("{}")
    before = data_sha256(config)
    answers.write_text("{ }")
    Path(config.data.features_path).write_text("{ }")
    after = data_sha256(config)
    assert before.keys() == after.keys() == {"train", "features"}
    assert all(before[name] != after[name] for name in before)


def test_the_real_vqa_files_are_read(shared):
    first = load_samples(shared("vqa/vqav2_questions_fixture.json"))[0]
    assert first.messages[1] == assistant("net")
    assert len(first.references) == 10
    assert first.images[0].exists()


# what is refused


@pytest.mark.parametrize(
    "record, message",
    [
        ("A cat.", "a JSON object is needed, not str"),
        ({"image": "a.jpg"}, "needs `conversations` (a list of turns), `text`, or `captions` (a list of texts)"),
        ({"image": "a.jpg", "text": 4}, "`text` must be a text or a list of texts"),
        ({"image": "a.jpg", "captions": ["a", None]}, "`captions` must be a text or a list of texts"),
        ({"image": "a.jpg", "captions": []}, "`captions` must be a text or a list of texts"),
        ({"image": 4, "text": "a"}, "`image` must be a file name, `images` a list of them"),
        ({"text": "A cat."}, "has neither an `image` nor a `prompt`, so its text answers nothing"),
        ({"image": "a.jpg", "conversations": []}, "`conversations` must be a list of turns"),
        ({"conversations": [{"from": "human"}]}, "conversations[0] needs `from` and `value`, both texts"),
        ({"conversations": [{"from": [], "value": "a"}]}, "conversations[0] needs `from` and `value`, both texts"),
        (
            {"conversations": [{"from": "bot", "value": "a"}]},
            "conversations[0].from is 'bot'; it can be human, user, gpt, assistant, system",
        ),
        (
            {"image": "a.jpg", "conversations": [{"from": "gpt", "value": "a"}]},
            "no turn of the user, so its picture has no place",
        ),
        (
            {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image><image>"}]},
            "<image> marks: 2, pictures: 1; each picture needs its mark, or none has one",
        ),
        (
            {"conversations": [{"from": "human", "value": "<image>"}]},
            "<image> marks: 1, pictures: 0; each picture needs its mark, or none has one",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}], "text": "a"},
            "has `conversations` and also `text` or `captions`; keep one of them",
        ),
    ],
)
def test_a_record_that_makes_no_sample_is_named(record, message, tmp_path):
    path = written(tmp_path, [CAT, record])
    with pytest.raises(DataError) as caught:
        load_samples(path)
    assert str(caught.value) == f"{path}: sample 1: {message}"


@pytest.mark.parametrize("name", ["../secret.jpg", "a/../../secret.jpg", "/etc/secret.jpg"])
def test_a_picture_outside_the_image_directory_is_refused(name, tmp_path):
    with pytest.raises(DataError, match="is outside the image directory"):
        load_samples(written(tmp_path, [{"image": name, "text": "a"}]), tmp_path / "pictures")


def test_a_whole_path_into_the_image_directory_is_accepted(tmp_path):
    inside = tmp_path / "pictures" / "a.jpg"
    (sample,) = load_samples(written(tmp_path, [{"image": str(inside), "text": "a"}]), tmp_path / "pictures")
    assert sample.images == (inside,)


@pytest.mark.parametrize(
    "content, message",
    [
        ("[]", "no samples in it"),
        ("\n", "no samples in it"),
        ("<html>", "line 1: Expecting value"),
        ('{"prompt": "a", "text": "b"}\n{"prompt": ', "line 2: Expecting value"),
        ("[\n{]", "line 2: Expecting property name"),
        ("4", "a list of records is needed, not int"),
        ('{"annotations": []}', "name VQAv2's questions file"),
        ('{"images": [{"id": 1}], "annotations": [{"id": 1}]}', "not whole: KeyError('image_id')"),
        ('{"images": [], "annotations": [{"image_id": 1, "caption": "a"}]}', "unknown images, first image_id 1"),
    ],
)
def test_a_file_that_is_no_data_is_named(content, message, tmp_path):
    path = written(tmp_path, content)
    with pytest.raises(DataError) as caught:
        load_samples(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_a_missing_file_and_one_that_is_no_text_are_named(tmp_path, pictures):
    with pytest.raises(DataError, match=r"x\.json: no such data file"):
        load_samples(tmp_path / "x.json")
    with pytest.raises(DataError, match="cannot be read as UTF-8 text"):
        load_samples(pictures[0])
    with pytest.raises(DataError, match="line 2: not `name.jpg#0<tab>caption`"):
        load_samples(written(tmp_path, "a.jpg#0\tOne .\nb.jpg Two .\n", "tokens.txt"))


# the check before training


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
    assert check_samples(samples, processor, max_length=100) == [
        BadSample(1, f"{tmp_path}/cut.jpg", f"{tmp_path}/cut.jpg: broken or cut off; save or send it again"),
        BadSample(
            3,
            f"{tmp_path}/page.jpg",
            f"{tmp_path}/page.jpg: not a picture of a supported kind; use JPEG, PNG, WEBP, GIF, BMP, TIFF "
            "(convert HEIC and SVG first)",
        ),
        BadSample(
            4,
            f"{tmp_path}/bomb.png",
            f"{tmp_path}/bomb.png: 8000 x 8000 is 64 megapixels, at most 50; resize it first",
        ),
        BadSample(6, f"{tmp_path}/gone.jpg", f"no such image: {tmp_path}/gone.jpg"),
        BadSample(7, "silent", "no assistant turn, so there is nothing to learn from it"),
        BadSample(8, "long", "takes 565 tokens, but max_length is 100; shorten it or raise max_length"),
        BadSample(9, "odd", "`image` must be a file name"),
        BadSample(10, "half", "a text holds half of a character (a lone surrogate); write the character whole"),
    ]


@pytest.mark.parametrize("text", ["", "A cat.", "x" * 300, "\U0001d160" * 30, "\u0958" * 30])
def test_a_sample_fits_to_the_token(text, samples, processor):
    sample = Sample("0", samples[0].images, (user("what", images=1), assistant(text)))
    length = len(processor.encode(list(sample.messages)).ids)
    assert [bool(check_samples([sample], processor, length - less)) for less in (-1000, 0, 1)] == [False, False, True]


def test_a_picture_that_is_broken_in_the_middle_is_found_when_every_pixel_is_decoded(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.png")
    content = bytearray((tmp_path / "x.png").read_bytes())
    content[2000:2100] = bytes(100)
    (tmp_path / "x.png").write_bytes(content)
    assert image_fault(tmp_path / "x.png") == ""
    assert "broken or cut off" in image_fault(tmp_path / "x.png", decode_all=True)


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.gif", "x.bmp", "x.tif"])
def test_a_whole_picture_of_every_kind_passes(name, tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / name)
    assert image_fault(tmp_path / name) == ""


def test_bytes_after_the_end_of_a_picture_do_no_harm(pictures, tmp_path):
    (tmp_path / "x.jpg").write_bytes(pictures[0].read_bytes() + b"\0" * 100)
    assert image_fault(tmp_path / "x.jpg") == ""


@pytest.fixture
def one_bad_in_four(tmp_path, pictures) -> Path:
    records = [{"image": path.name, "text": "a"} for path in pictures[:4]]
    records[2] = {"image": pictures[2].name}
    return written(tmp_path, records)


def settings_for(pictures: list[Path], policy: str, max_fraction: float) -> DataConfig:
    return DataConfig(image_dir=str(pictures[0].parent), bad_samples=policy, max_bad_fraction=max_fraction)


def test_bad_samples_end_the_run_before_it_begins(one_bad_in_four, processor, pictures, tmp_path):
    report = tmp_path / "run" / "bad_samples.jsonl"
    with pytest.raises(DataError, match="1 of 4 samples are bad; mend those listed in .*The first is sample 2"):
        checked_samples(one_bad_in_four, settings_for(pictures, "error", 0.5), processor, report, split="train")
    assert report.exists()


def test_bad_samples_may_be_left_out_and_are_listed(one_bad_in_four, processor, pictures, tmp_path):
    report = tmp_path / "run" / "bad_samples.jsonl"
    settings = settings_for(pictures, "skip", 0.25)
    good = checked_samples(one_bad_in_four, settings, processor, report, split="train")
    assert [sample.id for sample in good] == ["0", "1", "3"]
    assert json.loads(report.read_text()) == {
        "index": 2,
        "file": "2",
        "reason": "needs `conversations` (a list of turns), `text`, or `captions` (a list of texts)",
    }


def test_too_many_bad_samples_are_not_left_out(one_bad_in_four, processor, pictures, tmp_path):
    settings = settings_for(pictures, "skip", 0.2)
    with pytest.raises(DataError, match=r"1 of 4 samples are bad, more than data\.max_bad_fraction=0\.2 allows"):
        checked_samples(one_bad_in_four, settings, processor, tmp_path / "bad_samples.jsonl", split="train")


def test_a_limit_takes_the_first_samples_and_checks_no_other(one_bad_in_four, processor, pictures, tmp_path):
    settings = settings_for(pictures, "error", 0.0)
    good = checked_samples(one_bad_in_four, settings, processor, tmp_path / "bad.jsonl", split="train", limit=2)
    assert [sample.id for sample in good] == ["0", "1"]
    assert len(read_samples(one_bad_in_four)) == 4


# order and batches


def test_the_order_is_the_same_on_every_machine_and_for_ever():
    assert sample_order(10, seed=1, epoch=2) == [6, 0, 4, 5, 2, 7, 9, 1, 8, 3]


def test_the_order_holds_every_sample_once_and_depends_on_seed_and_epoch():
    orders = [tuple(sample_order(1000, seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert len(set(orders)) == 9


def test_the_order_mixes_well():
    places = np.array([sample_order(100, 0, epoch) for epoch in range(2000)])
    assert abs(places.mean(0) - 49.5).max() < 2.6  # four standard errors of a uniform place
    assert abs(np.corrcoef(places[:, 0], places[:, 1])[0, 1]) < 0.1


def test_rows_are_padded_on_the_right_and_padding_is_not_learnt(samples, processor):
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


def test_pictures_come_in_the_order_of_their_rows(samples, pictures, processor):
    two = Sample("two", (pictures[5], pictures[0]), (user("which", images=2), assistant("a")))
    text = Sample("text", (), (user("a"), assistant("b")))
    (batch,) = ordered_batches([two, text, samples[3]], processor, 3, num_workers=0)
    expected = [processor.image_processor(pictures[i]) for i in (5, 0, 3)]
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


def test_a_picture_that_breaks_under_way_is_replaced_by_the_next_sample(samples, processor, tmp_path):
    whole = [samples[i] for i in (0, 1, 2, 4, 4, 5)]
    samples[3] = Sample("3", (tmp_path / "gone.jpg",), samples[3].messages)
    loader = BatchLoader(samples[:6], processor, 2, max_broken=1)
    assert contents(loader) == contents(BatchLoader(whole, processor, 2))
    assert loader.broken == {3: f"no such image: {tmp_path}/gone.jpg"}


def test_more_broken_pictures_than_allowed_end_the_run(samples, processor, tmp_path):
    samples[3] = Sample("three", (tmp_path / "gone.jpg",), samples[3].messages)
    with pytest.raises(DataError, match=r"sample 3 \(three\): no such image") as caught:
        contents(BatchLoader(samples, processor, 2))
    assert isinstance(caught.value.__cause__, ImageError)
