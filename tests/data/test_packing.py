"""Several captions or questions of one image in one row: what is shared, and what is not lost."""

from pathlib import Path

import pytest

from mmllm.data.chat import IGNORED, IMAGE, ChatProcessor, Message, assistant, user
from mmllm.data.image import ImageProcessor
from mmllm.data.packing import encode_shared, pack
from mmllm.data.samples import Sample, share_images
from mmllm.data.tokenizer import Tokenizer
from official import write_tokenizer

CAT, MAT = (Path("cat.png"),), (Path("mat.png"),)
CAPTIONS = ("a cat", "a cat on the mat", "a hat", "a cat", "in")


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> ChatProcessor:
    return ChatProcessor(Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"))), ImageProcessor(16), 4)


def question(images: tuple[Path, ...], *turns: str) -> Sample:
    """A sample named by its first answer; `turns` are questions and answers in turn."""
    messages = [user(turns[0], images=len(images)), assistant(turns[1])]
    for i in range(2, len(turns), 2):
        messages += [user(turns[i]), assistant(turns[i + 1])]
    return Sample(turns[1], images, tuple(messages))


def caption(images: tuple[Path, ...], text: str) -> Sample:
    return question(images, "Describe this image.", text)


def prefix_of(row) -> list[int]:
    return row.ids[: row.segment_ids.count(0)]


def targets_of(rows) -> list[int]:
    return [label for row in rows for label in row.labels if label != IGNORED]


def test_captions_share_everything_up_to_the_answer(processor):
    (group,) = share_images([caption(CAT, text) for text in CAPTIONS])
    (row,) = encode_shared(group, processor)
    assert prefix_of(row) == processor.encode_prompt(list(group.messages[:1]))
    assert row.segment_ids.count(1) == len([*processor.tokenizer.encode("a cat"), "<|im_end|>", "\n"])


def test_questions_share_what_they_begin_with(processor):
    (group,) = share_images(
        [
            question(CAT, "what is it?", "a thing", "where?", "there"),
            question(CAT, "what color?", "red"),
            question(CAT, "why?", "in"),
        ]
    )
    (row,) = encode_shared(group, processor)
    end = [processor.tokenizer.id("<|vision_end|>"), *processor.tokenizer.encode("\nwh")]
    assert prefix_of(row)[-len(end) :] == end


def test_texts_that_do_not_fit_one_row_take_several_and_no_target_is_lost(processor):
    separate = [processor.encode(list(caption(CAT, text).messages)) for text in CAPTIONS]
    limit = max(len(row.ids) for row in separate) + 8
    rows = pack(separate, processor.tokenizer.image_id, limit)
    (whole,) = pack(separate, processor.tokenizer.image_id)
    assert 1 < len(rows) < len(CAPTIONS)
    assert all(len(row.ids) <= limit for row in rows)
    assert targets_of(separate) == targets_of(rows) == targets_of([whole])


def test_an_image_behind_different_words_has_a_place_in_each_text(processor):
    """The first of two images is shared, as both texts begin with it."""
    turns = [Message("user", (IMAGE, f"{text}\n", IMAGE)) for text in ("what?", "a cat?")]
    (group,) = share_images([Sample("", CAT + MAT, (turn, assistant("in"))) for turn in turns])
    (row,) = encode_shared(group, processor)
    is_image = [token == processor.tokenizer.image_id for token in row.ids]
    places = [sum(x and s == number for x, s in zip(is_image, row.segment_ids, strict=True)) for number in range(3)]
    assert row.images == [0, 1, 1] and places == [4, 4, 4]


def test_samples_of_the_same_images_become_one_and_text_alone_stays():
    both = CAT + MAT
    groups = share_images(
        [
            caption(CAT, "a cat"),
            question(MAT, "what?", "a mat"),
            question(both, "which?", "one"),
            caption(CAT, "a hat"),
            question((), "hello", "two"),
            question((), "hello", "three"),
            question(both, "and?", "four"),
        ]
    )
    assert [(group.id, [other.id for other in group.shared]) for group in groups] == [
        ("a cat", ["a hat"]),
        ("a mat", []),
        ("one", ["four"]),
        ("two", []),
        ("three", []),
    ]


def test_an_image_with_many_texts_becomes_samples_of_at_most_sixteen():
    groups = share_images([caption(CAT, str(i)) for i in range(40)])
    assert [1 + len(group.shared) for group in groups] == [16, 16, 8]
