"""report.md and run.json say how a run went, from its own files."""

import json
import sys

from mmllm.config.schema import ExperimentConfig
from mmllm.reporting.report import record_start, write_report
from mmllm.runtime.files import write_json
from run_rows import CAPTION, EVALUATION, ROW, write_rows


def start(directory, origins=None, resumed_from=None):
    record_start(directory, device="cpu", origins=origins or {}, resumed_from=resumed_from, data=["9 samples"])


def report_of(directory) -> str:
    start(directory, {"data.batch_size": "configs/debug.py"})
    write_report(directory)
    return (directory / "report.md").read_text()


def test_each_start_of_a_run_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "configs/a b.py"])
    start(tmp_path, {"seed": "command line"})
    start(tmp_path, resumed_from="checkpoint-epoch-1-step-2")
    first, second = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert first["command"] == "python train.py 'configs/a b.py'"
    assert first["settings_from"] == {"seed": "command line"}
    assert {"python", "torch", "safetensors"} <= first["versions"].keys()
    assert (first["resumed_from"], second["resumed_from"]) == (None, "checkpoint-epoch-1-step-2")


def test_the_report_sums_up_the_rows_of_the_run(tmp_path):
    losses = [4.0] * 10 + [2.0] * 10
    rows = [ROW | {"step": i, "loss": loss, "stage": 1 if i <= 12 else 2} for i, loss in enumerate(losses, 1)]
    write_rows(tmp_path, *rows, EVALUATION | {"stage": 2, "step": 20})
    report = report_of(tmp_path)
    assert "![curves](loss.png)" in report and (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "| 1 | 12 | 4.0000 | 3.6000 | - | 5s | 48.2k | 378 | 11.2 GB |" in report
    assert "| 2 | 8 | 2.0000 | 2.0000 | 2.2500 | 3s | 32.1k | 252 | 11.2 GB |" in report
    assert "2.2500 with the true images, 3.0000 with those of other samples: the model looks at the image" in report
    assert "|  | 7 | What is it? | a \\| cat | A cat. |" in report
    assert "\n- 9 samples\n" in report and "python -m mmllm sample --model" in report


def test_the_report_shows_settings_with_their_values_and_the_images_that_exist(tmp_path):
    ExperimentConfig().save(tmp_path / "experiment.json")
    (tmp_path / "1.jpg").touch()
    write_rows(tmp_path, ROW, EVALUATION | {"captions": [CAPTION | {"image": str(tmp_path / "1.jpg")}]})
    report = report_of(tmp_path)
    assert "| data.batch_size | `32` | configs/debug.py |" in report
    assert '| <img src="1.jpg" width="112"> | 7 |' in report


def test_the_report_holds_the_scores_of_later_evaluations(tmp_path):
    write_rows(tmp_path, ROW)
    (tmp_path / "evaluation" / "val").mkdir(parents=True)
    scores = {"true images": {"answers": {"count": 9, "accuracy": 0.9736}}}
    found = {"data": "val.json", "model": "best_model", "checkpoint": "checkpoint-epoch-1-step-2", "scores": scores}
    write_json(tmp_path / "evaluation" / "val" / "scores.json", found)
    report = report_of(tmp_path)
    assert "`val.json`, answered by checkpoint-epoch-1-step-2:" in report
    assert "| answers | accuracy |\n| --- | --- |\n| true images | 0.974 |" in report


def test_a_stage_whose_steps_were_all_skipped_is_left_out_and_the_best_metric_is_shown(tmp_path):
    skipped = {"stage": 1, "step": 1, "learning_rate": 0.1, "left_out": "overflow, loss scale 32768"}
    found = [EVALUATION | {"step": step, "cider": cider} for step, cider in ((1, 0.5), (2, 0.75), (3, 0.25))]
    write_rows(tmp_path, skipped, *found)
    report = report_of(tmp_path)
    assert "\n| 1 |" not in report
    assert "Best validation CIDEr: 0.7500, at step 2." in report


def test_a_run_without_validation_still_reports(tmp_path):
    write_rows(tmp_path, ROW)
    assert "looks at the image" not in report_of(tmp_path)


def test_a_figure_that_cannot_be_drawn_costs_a_warning_and_no_report(tmp_path, monkeypatch, capsys):
    write_rows(tmp_path, ROW)
    monkeypatch.setitem(
        sys.modules, "matplotlib", None
    )  # what Python itself does for a package that cannot be imported
    report = report_of(tmp_path)
    assert "loss.png" not in report and "| 1 | 1 | 2.5000 | 2.5000 | - | 0s |" in report
    assert "loss.png: cannot be drawn" in capsys.readouterr().err


def test_stage_3_reports_its_reward_in_place_of_a_loss_that_says_nothing(tmp_path):
    write_rows(
        tmp_path,
        ROW,
        *(ROW | {"stage": 3, "step": 2 + i, "loss": -0.1, "reward": i / 10, "kl": 0.5} for i in range(20)),
    )
    report = report_of(tmp_path)
    assert "| 1 | 1 | 2.5000 | 2.5000 | - |" in report
    assert "| 3 | 20 | reward 0.4500 | reward 1.4500 | - |" in report
