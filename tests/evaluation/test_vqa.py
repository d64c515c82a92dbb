"""Accuracy of answers, against the official examples."""

import json

import pytest

from mmllm.errors import UserError
from mmllm.evaluation.evaluator import MultimodalEvaluator
from mmllm.evaluation.vqa import is_answer, normalise, vqa_accuracy, vqa_accuracy_normalised


@pytest.fixture
def evaluator() -> MultimodalEvaluator:
    return MultimodalEvaluator(meteor=False)


@pytest.mark.parametrize("same, expected", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
def test_an_answer_that_more_people_gave_counts_more(same, expected):
    assert vqa_accuracy("red", ["red"] * same + ["blue"] * (10 - same)) == pytest.approx(expected)


def test_the_official_rule_normalises_only_where_people_differ():
    assert vqa_accuracy("Yes.", ["yes"] * 10) == 0
    assert vqa_accuracy("Yes.", ["yes"] * 9 + ["no"]) == 1
    assert vqa_accuracy_normalised("Yes.", ["yes"] * 10) == 1


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The Two dogs.", "2 dogs"),
        ("t-shirt", "t shirt"),
        ("red / white", "red white"),
        ("1,000", "1000"),
        ("3.5 or st. john", "3.5 or st john"),
        ("dont", "don't"),
        ("couldntve couldnt've couldn'tve", "couldntve couldn't've couldn't've"),
        ("its", "its"),
        ("somebody'd", "somebodyd"),
        ("none", "0"),
        ("A", ""),
    ],
)
def test_an_answer_is_compared_in_its_normal_form(text, expected):
    assert normalise(text) == expected


def test_every_vqa_vector_is_met(shared, evaluator):
    rows = json.loads(shared("vqa/vqa_vectors_dev.json").read_text())["rows"]
    official = [100 * vqa_accuracy(row["prediction"], row["answers"]) for row in rows]
    assert official == pytest.approx([row["official_accuracy"] for row in rows])
    normalised = [100 * vqa_accuracy_normalised(row["prediction"], row["answers"]) for row in rows]
    assert normalised == pytest.approx([row["evalai_mmf_accuracy"] for row in rows])
    scores = evaluator.evaluate_vqa([row["prediction"] for row in rows], [row["answers"] for row in rows])
    assert scores == pytest.approx({"vqa_accuracy": 0.723188, "vqa_accuracy_normalised": 0.728986}, abs=1e-6)


def test_vqa_accuracy_needs_the_answers_of_several_people(evaluator):
    with pytest.raises(UserError, match=r"answers\[0\] holds 1"):
        evaluator.evaluate_vqa(["red"], [["red"]])


def test_case_punctuation_articles_and_number_words_do_not_matter():
    assert is_answer("The top left.", ["top left"])
    assert is_answer("2", ["two"])
    assert not is_answer("top", ["top left"])
