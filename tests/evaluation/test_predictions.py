"""Result files of other programs."""

import json

import pytest
from test_results import make_task

from mmllm.errors import DataError
from mmllm.evaluation.predictions import read_predictions, write_predictions


def write(path, content):
    path.write_text(json.dumps(content))
    return [path]


@pytest.mark.parametrize(
    "row", [{"question_id": 7, "answer": "red"}, {"questionId": "7", "prediction": "red"}], ids=["VQA", "GQA"]
)
def test_a_question_finds_its_answer_by_the_official_id(row, tmp_path):
    assert read_predictions(write(tmp_path / "a.json", [row]), [make_task("7")]) == ["red"]


@pytest.mark.parametrize("name", ["7", "02930152", "0", "000000033471.jpg"])
def test_what_was_written_is_found_again(name, tmp_path):
    write_predictions(tmp_path, [make_task(name)], ["red"], "")
    assert read_predictions([tmp_path / "answers.json"], [make_task(name)]) == ["red"]
    (row,) = json.loads((tmp_path / "answers.json").read_text())
    assert row["question_id"] == (int(name) if name in "70" else name), "official ids are numbers"


@pytest.mark.parametrize(
    "content, message",
    [
        ({"7": "red"}, "a list of results is needed, not dict"),
        ([{"id": 7, "answer": "red"}], "result 0 needs `image_id` and `caption`, or `question_id` and `answer`"),
        ([{"question_id": 7, "answer": "red"}] * 2, "result 1: a second answer for question_id 7; keep one of them"),
    ],
)
def test_a_file_that_holds_no_results_is_refused(content, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read_predictions(write(tmp_path / "a.json", content), [make_task("7")])
