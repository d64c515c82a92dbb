"""What a model is asked: one task for each question and each captioned image."""

import json
from pathlib import Path

import pytest

from mmllm.data.chat import assistant, user
from mmllm.data.samples import Sample, load_samples
from mmllm.evaluation.tasks import Task, record_of, tasks_of, with_other_images


def make_task(name: str = "1", *, image: str = "a.png") -> Task:
    return Task(name, (user("?", images=1),), (Path(image),), ("red",), "", is_caption=False)


def test_the_captions_of_one_image_are_one_task_with_all_references(tmp_path):
    turns = [{"from": "human", "value": "What color is it?"}, {"from": "gpt", "value": "red"}]
    records = [{"id": 0, "image": "a.png", "captions": ["a red square", "all is red"]}]
    records.append({"id": 100, "image": "a.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(records))
    tasks = tasks_of(load_samples(tmp_path / "data.json"))
    assert [(task.id, task.is_caption) for task in tasks] == [("0", True), ("100", False)]
    assert tasks[0].references == ("a red square", "all is red")


def test_records_that_caption_the_same_image_are_one_task():
    samples = [
        Sample(str(n), (Path("a.png"),), (user("Describe this image.", 1), assistant(text)), (text,))
        for n, text in enumerate(["a cat", "the cat", "a cat"])
    ]
    assert [(task.id, task.references) for task in tasks_of(samples)] == [("0", ("a cat", "the cat", "a cat"))]


def test_a_question_asked_under_two_numbers_is_answered_under_both():
    samples = [Sample(n, (Path("a.png"),), (user("How many?", 1), assistant("2")), ("2",) * 10) for n in ("7", "8")]
    assert [(task.id, len(task.references)) for task in tasks_of(samples)] == [("7", 10), ("8", 10)]


def test_only_the_last_answer_of_a_conversation_is_asked_for():
    turns = (user("What?", 1), assistant("a cat"), user("Where?"), assistant("here"))
    (asked,) = tasks_of([Sample("1", (Path("a.png"),), turns, ("here",))])
    assert asked.messages == turns[:3] and asked.references == ("here",)


@pytest.mark.parametrize(
    "name, references, expected",
    [
        ("12#1", ("a", "b"), "12"),
        ("x.jpg#0", ("a", "b"), "x.jpg"),
        ("12#5", ("a", "b"), "12#5"),
        ("a#0", ("a",), "a#0"),
    ],
)
def test_a_numbered_sample_knows_its_record(name, references, expected):
    assert record_of(Sample(name, (), (), references)) == expected


@pytest.mark.parametrize("seed", range(5))
def test_every_image_is_exchanged_for_the_same_other_one_in_all_tasks(seed):
    tasks = [make_task(image=f"{n % 4}.png") for n in range(9)]
    others = with_other_images(tasks, seed)
    pairs = {(one.images, other.images) for one, other in zip(tasks, others, strict=True)}
    assert len(pairs) == 4 and all(one != other for one, other in pairs)
    assert {other for _, other in pairs} == {one for one, _ in pairs}
    assert with_other_images(tasks, seed) == others


def test_a_single_image_cannot_be_exchanged():
    assert with_other_images([make_task(), make_task("2")], 0) == []
