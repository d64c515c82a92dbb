"""The public recipe from end to end, on a miniature of its data and models."""

import json

import pytest
from public_data import host, write_public

from examples.coco import __main__ as coco
from examples.coco.recipe import MIXTURE
from examples.coco.report import scores_table
from mmllm.data.samples import load_samples
from mmllm.reporting.metrics import read_metrics
from official import write_clip, write_qwen

SMALL = ["data.batch_size=2", "data.num_workers=0", "training.bf16=false", "stage1.gradient_accumulation_steps=1"]
SMALL += ["stage2.gradient_accumulation_steps=2", "training.num_sample_captions=0", "stage3.max_new_tokens=4"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """What the recipe leaves, and the requests of its second run, which has nothing to do."""
    folder = tmp_path_factory.mktemp("coco")
    write_clip(folder / "clip", num_hidden_layers=2)
    write_qwen(folder / "qwen", num_hidden_layers=2)
    with host(folder / "host") as server:
        table = write_public(folder / "host", server.url)
        line = [f"--{name}={folder / name}" for name in ("clip", "qwen", "data", "out")]
        line += [f"--table={table}", "--device=cpu", *SMALL]
        coco.main(line)
        asked, written = len(server.requests), [path.read_bytes() for path in (folder / "out").glob("*/metrics.jsonl")]
        coco.main(line)
        assert len(server.requests) == asked
        assert [path.read_bytes() for path in (folder / "out").glob("*/metrics.jsonl")] == written
        photographs = [name for name, _ in server.requests if "2014.zip" in name]
        assert len(photographs) == 2  # though three of the data sets show them
    return folder


@pytest.mark.slow
def test_the_recipe_ends_in_a_report_with_targets(done):
    report = (done / "out" / "report.md").read_text()
    for row in ("true images", "shuffled images", "blank images", "best constant", "target", "ClipCap", "GIT-base"):
        assert f"| {row}" in report or f"| mix: {row}" in report and f"| reward: {row}" in report
    assert "| align | 2 |" in report and "| mix | 4 |" in report and "| reward | 3 |" in report
    assert "| evaluation: reward, vqav2 |" in report


@pytest.mark.slow
def test_each_stage_trains_what_they_should(done):
    stages = [{row["stage"] for row in read_metrics(done / "out" / name)} for name in ("align", "mix", "reward")]
    assert stages == [{1}, {2}, {3}]
    settings = json.loads((done / "out" / "mix" / "experiment.json").read_text())
    assert settings["model"]["pretrained"].endswith("align/best_model")
    assert settings["data"]["train_data_path"].count("train.jsonl") == 3


@pytest.mark.slow
def test_no_image_that_is_evaluated_was_trained_on(done):
    def images(split: str, names: tuple[str, ...]) -> set:
        files = ",".join(str(done / "data" / name / f"{split}.jsonl") for name in names)
        return {path for sample in load_samples(files, done / "data" / "images") for path in sample.images}

    tested = images("test", ("coco", "vqav2"))
    assert tested and not tested & images("train", MIXTURE)


@pytest.mark.slow
def test_the_result_files_are_those_that_the_servers_take(done):
    folder = done / "out" / "mix" / "evaluation"
    assert [row["image_id"] for row in json.loads((folder / "coco" / "captions.json").read_text())] == [6, 9]
    assert [row["question_id"] for row in json.loads((folder / "vqav2" / "answers.json").read_text())] == [6000, 9000]


def test_scores_stand_in_percent_beside_the_target():
    found = {"bleu_4": 0.25, "cider": 1.0, "interval": {"bleu_4": [0.2, 0.3], "cider": [0.9, 1.1]}}
    lines = scores_table("coco", {"true images": {"captions": found}}).split("\n")
    assert lines[2] == "| true images | 25.0 (20.0 to 30.0) | 100.0 (90.0 to 110.0) |"
    assert lines[3] == "| target | 39.0 | 130.0 |"
