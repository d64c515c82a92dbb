import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mmllm.commands import evaluate
from mmllm.data.chat import assistant, user
from mmllm.data.samples import Sample, load_samples
from mmllm.errors import DataError, UserError
from mmllm.evaluation.evaluate import (
    Task,
    constant_predictions,
    record_of,
    score,
    table,
    tasks_of,
    with_other_pictures,
)
from mmllm.evaluation.scoring import MultimodalEvaluator, best_constant_caption
from official import write_model

COLOURS = {"red.png": "#ff0000", "green.png": "#00ff00", "blue.png": "#0000ff"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model and three pictures, each with two captions and a question, and one question without a picture."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_model(folder / "model")
    records = []
    for number, (name, colour) in enumerate(COLOURS.items()):
        Image.new("RGB", (40, 40), colour).save(folder / name)
        word = name.removesuffix(".png")
        records.append({"id": number, "image": name, "captions": [f"a {word} square", f"all is {word}"]})
        turns = [{"from": "human", "value": "What color is it?"}, {"from": "gpt", "value": word}]
        records.append({"id": 100 + number, "image": name, "conversations": turns, "kind": "color"})
    turns = [{"from": "human", "value": "Is it day?"}, {"from": "gpt", "value": "yes"}]
    records.append({"id": "day", "conversations": turns, "references": ["yes"] * 9 + ["no"], "kind": "yes/no"})
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def task(name: str = "1", *, references=("red",), image: str = "a.png", kind: str = "", is_caption=False) -> Task:
    return Task(name, (user("?", images=1),), (Path(image),), references, kind, is_caption)


def test_an_evaluation_writes_predictions_and_scores_with_true_and_with_shuffled_pictures(folder, capsys):
    out = folder / "out"
    evaluate.main(
        [f"--model={folder / 'model'}", f"--data={folder / 'data.json'}", f"--out={out}", "--max-new-tokens=16"]
        + ["--batch-size=3", "--device=cpu", "--constant"]
    )
    captions = json.loads((out / "captions.json").read_text())
    assert [sorted(result) for result in captions] == [["caption", "image_id"]] * 3
    assert [result["image_id"] for result in captions] == [0, 1, 2]
    answers = json.loads((out / "answers.json").read_text())
    assert [result["question_id"] for result in answers] == [100, 101, 102, "day"]
    shuffled = json.loads((out / "captions_shuffled.json").read_text())
    assert [result["image_id"] for result in shuffled] == [0, 1, 2]
    said = [result["caption"] for result in captions]
    assert len(set(said)) == 3  # red, green, blue
    assert [result["caption"] for result in shuffled] == [said[1], said[2], said[0]]
    scores = json.loads((out / "scores.json").read_text())["scores"]
    assert list(scores) == ["true images", "shuffled images", "best constant"]
    assert scores["true images"]["captions"]["count"] == 3
    assert scores["true images"]["answers"]["by_kind"]["color"]["count"] == 3
    assert scores["best constant"]["answers"]["accuracy"] == pytest.approx(1 / 3)
    assert scores["best constant"]["vqa"]["vqa_accuracy"] == 1
    printed = capsys.readouterr().out
    assert "captions (3)" in printed and "answers (3)" in printed and "vqa (1)" in printed
    assert "shuffled images" in printed


def test_the_answers_do_not_depend_on_the_batch_size(folder):
    said = []
    for size in ("1", "7"):
        out = folder / f"batch-{size}"
        evaluate.main(
            [f"--model={folder / 'model'}", f"--data={folder / 'data.json'}", f"--out={out}", "--max-new-tokens=3"]
            + ["--batch-size", size, "--device=cpu", "--no-shuffled", "--limit=4"]
        )
        said.append([(out / name).read_text() for name in ("captions.json", "answers.json")])
        assert not (out / "captions_shuffled.json").exists()
    assert said[0] == said[1]


def test_the_samples_of_one_picture_are_asked_once_with_all_references(folder):
    tasks = tasks_of(load_samples(folder / "data.json"))
    assert [(task.id, task.is_caption) for task in tasks[:2]] == [("0", True), ("100", False)]
    assert tasks[0].references == ("a red square", "all is red")
    assert len(tasks) == 7


def test_records_that_caption_the_same_picture_are_one_task():
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
def test_a_sample_knows_its_record(name, references, expected):
    assert record_of(Sample(name, (), (), references)) == expected


@pytest.mark.parametrize("seed", range(5))
def test_every_picture_is_exchanged_for_another_and_the_same_in_all_tasks(seed):
    tasks = [task(image=f"{n % 4}.png") for n in range(9)]
    others = with_other_pictures(tasks, seed)
    pairs = {(one.images, other.images) for one, other in zip(tasks, others, strict=True)}
    assert len(pairs) == 4 and all(one != other for one, other in pairs)
    assert {other for _, other in pairs} == {one for one, _ in pairs}
    assert with_other_pictures(tasks, seed) == others


def test_a_single_picture_cannot_be_exchanged():
    assert with_other_pictures([task(), task("2")], 0) == []


def test_answers_are_scored_exactly_and_by_kind_or_by_the_rule_of_vqa():
    tasks = [
        task("1", references=("red",), kind="color"),
        task("2", references=("blue",), kind="color"),
        task("3", references=("two",), kind="count"),
        task("4", references=("yes",) * 10),
        task("5", references=()),
    ]
    scores = score(tasks, ["Red.", "green", "2", "Yes", "anything"], MultimodalEvaluator(meteor=False))
    assert scores["answers"] == {
        "count": 3,
        "accuracy": pytest.approx(2 / 3),
        "by_kind": {"color": {"count": 2, "accuracy": 0.5}, "count": {"count": 1, "accuracy": 1.0}},
    }
    assert scores["vqa"] == {"count": 1, "vqa_accuracy": 0.0, "vqa_accuracy_normalised": 1.0}


def test_without_a_look_the_most_common_answer_of_each_kind_is_best():
    tasks = [task(str(n), references=(text,), kind="color") for n, text in enumerate(["red", "blue", "red"])]
    tasks.append(task("9", references=("two",), kind="count"))
    assert constant_predictions(tasks) == ["red", "red", "red", "two"]


def test_the_best_constant_caption_is_the_one_most_like_the_others():
    references = [["A dog runs on grass.", "a dog runs"], ["a dog runs on sand"], ["a dog runs on grass"], ["two cats"]]
    best = best_constant_caption(references)
    cider = {
        text: MultimodalEvaluator(meteor=False).evaluate_captioning([text] * 4, references)["cider"]
        for texts in references
        for text in texts
    }
    assert cider[best] == max(cider.values())


def test_a_table_of_nothing_says_so():
    assert table({"true images": {}}) == ["no sample has a reference: nothing to score", ""]


def test_missing_pictures_are_named_before_the_model_is_loaded(folder, tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([{"image": "gone.png", "text": "a cat"}]))
    with pytest.raises(DataError, match=r"1 pictures cannot be used, the first is .*gone\.png"):
        evaluate.main([f"--model={tmp_path / 'no-model'}", f"--data={tmp_path / 'data.json'}", f"--out={tmp_path}"])


def test_a_place_that_cannot_be_written_is_refused_before_the_model_is_loaded(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="name another folder with --out"):
        evaluate.main(
            [f"--model={tmp_path / 'no-model'}", f"--data={folder / 'data.json'}", f"--out={tmp_path / 'file' / 'x'}"]
        )


def test_help_comes_without_torch():
    code = "import sys, mmllm.commands.evaluate; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
