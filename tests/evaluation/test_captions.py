"""Scores of captions, against the published ones; METEOR where Java works."""

import json
import shutil
import subprocess
import sys
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import pytest

from mmllm.errors import UserError
from mmllm.evaluation import captions
from mmllm.evaluation.captions import best_constant_caption
from mmllm.evaluation.evaluator import MultimodalEvaluator


@pytest.fixture
def evaluator() -> MultimodalEvaluator:
    return MultimodalEvaluator(meteor=False)


def coco_captions(shared) -> dict[int, list[str]]:
    texts = defaultdict(list)
    for annotation in json.loads(shared("caption_metrics/en_captions_val2014.json").read_text())["annotations"]:
        texts[annotation["image_id"]].append(annotation["caption"])
    return texts


def test_the_first_example_of_the_manual_scores_as_published(evaluator):
    predictions = ["A cat on a windowsill", "A dog in the park"]
    references = [["A cat sitting on a windowsill"], ["A dog playing in the park"]]
    results = evaluator.evaluate_captioning(predictions, references)
    assert list(results) == ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"]
    expected = [0.81873, 0.70904, 0.51577, 0.00007, 0.89443, 4.53587]
    assert list(results.values()) == pytest.approx(expected, abs=5e-6)


def test_the_coco_demo_scores_as_published(shared, evaluator):
    texts = coco_captions(shared)
    results = json.loads(shared("caption_metrics/en_captions_val2014_fakecap_results.json").read_text())
    scores = evaluator.evaluate_captioning(
        [result["caption"] for result in results], [texts[result["image_id"]] for result in results]
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


def test_meteor_without_java_is_refused_before_any_work(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="there is no `java` here; install Java"):
        MultimodalEvaluator(meteor=True)
    assert not MultimodalEvaluator().meteor
    assert capsys.readouterr().err == ""


@pytest.fixture
def fake_java(tmp_path, monkeypatch):
    """A function that puts a shell script in the place of `java`."""

    def write(script: str) -> None:
        java = tmp_path / f"bin-{len(list(tmp_path.iterdir()))}" / "java"
        java.parent.mkdir()
        java.write_text(f"#!/bin/sh\n{script}\n")
        java.chmod(0o755)
        monkeypatch.setenv("PATH", f"{java.parent}:/usr/bin:/bin")

    return write


def test_java_that_exits_at_once_or_hangs_is_reported_and_meteor_left_out(fake_java, monkeypatch, capsys):
    for script, timeout_s, fault in (
        ("exit 0", 60, "does not answer with a version"),
        ("exec sleep 600", 0.2, "Timeout"),
    ):
        monkeypatch.setattr(captions, "JAVA_TIMEOUT_S", timeout_s)
        fake_java(script)
        assert not MultimodalEvaluator().meteor
        assert "METEOR is left out: " in (err := capsys.readouterr().err) and fault in err
        with pytest.raises(UserError, match="METEOR is a Java program and .*; install Java"):
            MultimodalEvaluator(meteor=True)


def test_java_that_fails_later_costs_meteor_and_not_the_other_scores(fake_java, capsys):
    fake_java('[ "$1" = -version ] && echo version 17')
    scores = MultimodalEvaluator().evaluate_captioning(["a cat"], [["a cat"]])
    assert scores["bleu_1"] == pytest.approx(1) and "meteor" not in scores
    assert "METEOR is left out: METEOR's Java program failed" in capsys.readouterr().err


SPICE_JAVA = """
[ "$1" = -version ] && { echo version 8; exit; }
while [ "$1" != -out ]; do shift; done
echo '[{"image_id": 0, "scores": {"All": {"f": 0.25}}}, {"image_id": 1, "scores": {"All": {"f": 0.5}}}]' > $2
"""


def test_spice_is_what_its_program_writes_and_is_left_out_where_it_fails(fake_java, monkeypatch, capsys):
    monkeypatch.setattr("pycocoevalcap.spice.spice.get_stanford_models", lambda: None)  # a download of 400 MB
    fake_java(SPICE_JAVA)
    captions = ["a cat", "a dog"], [["a cat"], ["the dog"]]
    assert MultimodalEvaluator(meteor=False, spice=True).evaluate_captioning(*captions)["spice"] == 0.375
    fake_java('[ "$1" = -version ] && echo version 17')
    scores = MultimodalEvaluator(meteor=False, spice=True).evaluate_captioning(*captions)
    assert scores["cider"] > 0 and "spice" not in scores
    assert "SPICE is left out: SPICE's Java program failed" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="SPICE is a Java program and there is no `java` here"):
        MultimodalEvaluator(spice=True)


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
        ("a", [["a"]], "predictions must be a list, one entry per image, not str"),
        (["a"], [["."]], "no reference holds a word"),
    ],
)
def test_what_cannot_be_scored_is_named(evaluator, predictions, references, message):
    with pytest.raises(UserError, match=message):
        evaluator.evaluate_captioning(predictions, references)


def test_scoring_needs_no_torch():
    code = "import sys; from mmllm import MultimodalEvaluator; MultimodalEvaluator(meteor=False); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_the_best_constant_caption_is_the_one_most_like_the_others():
    references = [["A dog runs on grass.", "a dog runs"], ["a dog runs on sand"], ["a dog runs on grass"], ["two cats"]]
    best = best_constant_caption(references)
    cider = {
        text: MultimodalEvaluator(meteor=False).evaluate_captioning([text] * 4, references)["cider"]
        for texts in references
        for text in texts
    }
    assert cider[best] == max(cider.values())
