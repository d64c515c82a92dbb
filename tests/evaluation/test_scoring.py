import json
import shutil
import subprocess
import sys
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import pytest

from mmllm.errors import UserError
from mmllm.evaluation.ptb import words
from mmllm.evaluation.scoring import (
    MultimodalEvaluator,
    is_answer,
    normalise,
    vqa_accuracy,
    vqa_accuracy_normalised,
)

HERE = Path(__file__).parent


@pytest.fixture
def evaluator() -> MultimodalEvaluator:
    return MultimodalEvaluator(meteor=False)


# ---- words


def test_all_333_hard_lines_become_the_words_of_the_java_tokenizer():
    lines = json.loads((HERE / "ptb_golden.json").read_text())
    assert [words(text) for text, _ in lines] == [expected for _, expected in lines]


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("A man's T-shirt doesn't fit.", "a man 's t-shirt does n't fit"),
        ("two dogs, one (small) cat!!!", "two dogs one -lrb- small -rrb- cat !!!"),
        ("It’s 3:30 p.m. on Main St.", "it 's 3:30 p.m. on main st."),
        ("a cat\u2028on a mat", "a cat on a mat"),  # the official wrapper shifts all later captions by one here
        ("cat😀dog", "cat dog"),
        ("1½ cups", "1 1/2 cups"),
        ("", ""),
        ("?!.", "?!"),
    ],
)
def test_a_caption_becomes_its_words(caption, expected):
    assert words(caption) == expected


def test_the_coco_captions_become_the_words_of_the_java_tokenizer(shared):
    captions = coco_captions(shared)
    expected = json.loads(shared("caption_metrics/en_captions_val2014_references_after_tokenization.json").read_text())
    assert {number: [words(text) for text in captions[int(number)]] for number in expected} == expected


@pytest.mark.java
@pytest.mark.skipif(shutil.which("java") is None, reason="needs java")
def test_the_java_tokenizer_itself_makes_the_words_of_the_hard_lines(tmp_path):
    lines = json.loads((HERE / "ptb_golden.json").read_text())
    (tmp_path / "lines.txt").write_text("\n".join(text for text, _ in lines) + "\n", encoding="utf-8")
    jar = Path(find_spec("pycocoevalcap.tokenizer.ptbtokenizer").origin).with_name("stanford-corenlp-3.4.1.jar")
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-preserveLines", "-lowerCase", "-encoding", "UTF-8", str(tmp_path / "lines.txt")]
    output = subprocess.run(command, capture_output=True, check=True, encoding="utf-8").stdout
    removed = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
    found = [" ".join(word for word in line.split() if word not in removed) for line in output.split("\n")]
    assert found[: len(lines)] == [words(text) for text, _ in lines]


# ---- captions


def coco_captions(shared) -> dict[int, list[str]]:
    captions = defaultdict(list)
    for annotation in json.loads(shared("caption_metrics/en_captions_val2014.json").read_text())["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    return captions


def test_the_first_example_of_the_manual_scores_as_published(evaluator):
    predictions = ["A cat on a windowsill", "A dog in the park"]
    references = [["A cat sitting on a windowsill"], ["A dog playing in the park"]]
    results = evaluator.evaluate_captioning(predictions, references)
    assert list(results) == ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"]
    expected = [0.81873, 0.70904, 0.51577, 0.00007, 0.89443, 4.53587]
    assert list(results.values()) == pytest.approx(expected, abs=5e-6)


def test_the_coco_demo_scores_as_published(shared, evaluator):
    captions = coco_captions(shared)
    results = json.loads(shared("caption_metrics/en_captions_val2014_fakecap_results.json").read_text())
    scores = evaluator.evaluate_captioning(
        [result["caption"] for result in results], [captions[result["image_id"]] for result in results]
    )
    assert scores["bleu_1"] == pytest.approx(0.579400, abs=1e-6)
    assert scores["bleu_4"] == pytest.approx(0.190829, abs=1e-6)
    assert scores["rouge_l"] == pytest.approx(0.396253, abs=1e-6)
    assert scores["cider"] == pytest.approx(0.599791, abs=1e-6)


def test_every_score_of_the_reference_vectors_is_met(shared, evaluator):
    cases = json.loads(shared("caption_metrics/caption_metric_vectors_dev.json").read_text())["cases"]
    names = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]
    for case in cases:
        scores = evaluator.evaluate_captioning(case["hyps"], case["refs"])
        assert list(scores.values()) == pytest.approx([case[name] for name in names], abs=1e-12), case["name"]


@pytest.mark.java
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="needs java")
def test_meteor_is_there_where_java_is():
    predictions = ["A cat on a windowsill", "A dog in the park"]
    references = [["A cat sitting on a windowsill"], ["A dog playing in the park"]]
    results = MultimodalEvaluator().evaluate_captioning(predictions, references)
    assert results["meteor"] == pytest.approx(0.3899751, abs=1e-6)


def test_meteor_without_java_is_refused_before_any_work(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="install Java"):
        MultimodalEvaluator(meteor=True)
    assert not MultimodalEvaluator().meteor


def test_an_empty_prediction_scores_nothing_and_breaks_nothing(evaluator):
    scores = evaluator.evaluate_captioning(["", "a dog"], [["a cat"], ["a dog"]])
    assert 0 < scores["bleu_1"] < 1
    assert scores["rouge_l"] == 0.5


def test_scoring_prints_nothing_and_leaves_no_file(evaluator, capfd):
    package = Path(find_spec("pycocoevalcap.bleu.bleu").origin).parent.parent
    before = sorted(path for path in package.rglob("*") if path.suffix != ".pyc")
    evaluator.evaluate_captioning(["a cat"], [["a cat", "the cat"]])
    assert capfd.readouterr() == ("", "")
    assert sorted(path for path in package.rglob("*") if path.suffix != ".pyc") == before


@pytest.mark.parametrize(
    "predictions, references, message",
    [
        (["a"], [["a"], ["b"]], "1 predictions, but references for 2"),
        ([], [], "no predictions"),
        (["a"], [[]], r"references\[0\] is empty"),
        (["a"], ["a cat"], r"references\[0\] must be a list of texts"),
        (["a", 5], [["a"], ["b"]], r"predictions\[1\] must be a text, not int"),
        (["a"], [[None]], r"references\[0\] must be a list of texts"),
        ("a", [["a"]], "predictions must be a list, one entry a picture, not str"),
        (["a"], [["."]], "no reference holds a word"),
    ],
)
def test_what_cannot_be_scored_is_named(evaluator, predictions, references, message):
    with pytest.raises(UserError, match=message):
        evaluator.evaluate_captioning(predictions, references)


def test_scoring_needs_no_torch():
    code = "import sys; from mmllm import MultimodalEvaluator; MultimodalEvaluator(meteor=False); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


# ---- answers


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


def test_vqa_accuracy_wants_the_answers_of_several_people(evaluator):
    with pytest.raises(UserError, match=r"answers\[0\] holds 1"):
        evaluator.evaluate_vqa(["red"], [["red"]])


def test_a_right_answer_is_right_in_any_dress():
    assert is_answer("The top left.", ["top left"])
    assert is_answer("2", ["two"])
    assert not is_answer("top", ["top left"])
