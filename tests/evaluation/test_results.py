"""Scores of tasks and the table of them."""

from pathlib import Path

import pytest

from mmllm.data.chat import user
from mmllm.evaluation.evaluator import MultimodalEvaluator
from mmllm.evaluation.results import constant_predictions, measure, score_runs, table
from mmllm.evaluation.tasks import Task


def make_task(name: str = "1", *, references=("red",), kind: str = "") -> Task:
    return Task(name, (user("?", images=1),), (Path("a.png"),), references, kind, is_caption=False)


def test_answers_are_scored_exactly_and_by_kind_or_by_the_rule_of_vqa():
    tasks = [
        make_task("1", references=("red",), kind="color"),
        make_task("2", references=("blue",), kind="color"),
        make_task("3", references=("two",), kind="count"),
        make_task("4", references=("yes",) * 10),
        make_task("5", references=()),
        make_task("6", references=("red",)),
    ]
    parts = measure(tasks, ["Red.", "green", "2", "Yes", "anything", None])
    scores = score_runs({"first": {}, "second": parts}, MultimodalEvaluator(meteor=False))["second"]
    assert scores["answers"] == {
        "count": 3,
        "accuracy": pytest.approx(2 / 3),
        "exact_match": 0.0,  # red is not "Red."
        "by_kind": {
            "color": {"count": 2, "accuracy": 0.5, "exact_match": 0.0},
            "count": {"count": 1, "accuracy": 1.0, "exact_match": 0.0},
        },
    }
    assert scores["vqa"] == {"count": 1, "vqa_accuracy": 0.0, "vqa_accuracy_normalised": 1.0}


def test_the_best_constant_answer_is_the_most_common_one_of_each_kind():
    tasks = [make_task(str(n), references=(text,), kind="color") for n, text in enumerate(["red", "blue", "red"])]
    tasks.append(make_task("9", references=("two",), kind="count"))
    assert constant_predictions(tasks) == ["red", "red", "red", "two"]


def test_a_table_of_nothing_says_so():
    assert table({"true images": {}}) == ["no sample has a reference: nothing to score", ""]
