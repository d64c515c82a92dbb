"""Loss curves: which are drawn, and what names them."""

from xml.etree import ElementTree

import pytest
from PIL import Image

from mmllm.reporting.curves import draw_comparison, draw_run
from run_rows import EVALUATION, ROW

RUN = [ROW | {"step": step, "loss": 5 / step, "stage": 1 if step <= 10 else 2} for step in range(1, 31)]


def words_of(path) -> str:
    return " ".join(ElementTree.fromstring(path.read_text()).itertext())


def test_the_curves_of_a_run_name_training_validation_and_stages(tmp_path):
    draw_run([*RUN, EVALUATION | {"step": 30, "stage": 2}], tmp_path / "loss.svg")
    words = words_of(tmp_path / "loss.svg")
    for expected in (tmp_path.name, "training", "validation, other images", "stage 2", "optimizer step"):
        assert expected in words


def test_a_run_without_validation_has_no_such_curve(tmp_path):
    draw_run(RUN, tmp_path / "loss.svg")
    assert "other images" not in words_of(tmp_path / "loss.svg")


@pytest.mark.parametrize("losses", [[2.0], [0.0, 0.0], [4.0, float("nan"), 2.0], [float("nan")]])
def test_short_and_broken_runs_are_drawn_too(tmp_path, losses):
    draw_run([ROW | {"step": step, "loss": loss} for step, loss in enumerate(losses, 1)], tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.size == (800, 450)


def test_runs_are_laid_over_each_other_by_name(tmp_path):
    draw_comparison({"first": RUN, "second <b>": RUN[:5]}, tmp_path / "both.svg")
    words = words_of(tmp_path / "both.svg")
    assert "first" in words and "second <b>" in words and "Loss of 2 runs" in words
