"""What a run leaves to read, made from rows written out here."""

import json
import resource
import signal
import sys
import types
import xml.etree.ElementTree as ElementTree

import pytest

from mmllm.commands import compare as command
from mmllm.config.schema import ExperimentConfig
from mmllm.errors import UserError
from mmllm.reporting import log
from mmllm.reporting.compare import compare

ROW = {
    "stage": 1,
    "step": 120,
    "loss": 2.5,
    "learning_rate": 9.8e-5,
    "grad_norm": 0.714,
    "ms": 404.3,
    "tokens_per_s": 9940.0,
    "images_per_s": 77.9,
    "mfu": 0.41,
    "peak_bytes": 11_200_000_000,
}
CAPTION = {"id": "7", "image": None, "prompt": "What is it?", "answer": "a | cat", "reference": "A cat."}
EVALUATION = {"stage": 1, "step": 120, "val_loss": 2.25, "val_loss_shuffled": 3.0, "captions": [CAPTION]}


def start(directory, origins=None, resumed_from=None):
    log.record_start(directory, device="cpu", origins=origins or {}, resumed_from=resumed_from)


def test_a_progress_line_fits_a_terminal_and_says_everything():
    line = log.progress_line(ROW, 2.314, total_steps=2000)
    assert line == (
        "step 120/2000  6.0% | loss 2.314 | lr 9.8e-05 | |g| 0.71 | 404 ms | 9.9k tok/s | 78 img/s | mfu 41% | 11.2 GB"
        " | eta 12m40s"
    )
    assert "| mfu n/a |" in log.progress_line(ROW | {"mfu": None}, 2.314, total_steps=2000)


def test_a_resumed_log_drops_later_rows_and_a_torn_last_line(tmp_path):
    run_log = log.RunLog(tmp_path)
    for step in (1, 2, 3):
        run_log.write({"step": step})
    run_log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in log.read_metrics(tmp_path)] == [1, 2, 3]
    resumed = log.RunLog(tmp_path, last_step=2)
    resumed.write({"step": 3, "again": True})
    resumed.close()
    assert log.read_metrics(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_a_new_run_begins_with_an_empty_log(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    log.RunLog(tmp_path).close()
    assert log.read_metrics(tmp_path) == []


def test_each_start_of_a_run_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "configs/a b.py"])
    start(tmp_path, {"seed": "command line"})
    start(tmp_path, resumed_from="checkpoint-epoch-1-step-2")
    first, second = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert first["command"] == "python train.py 'configs/a b.py'"
    assert first["settings_from"] == {"seed": "command line"}
    assert {"python", "torch", "safetensors"} <= first["versions"].keys()
    assert (first["resumed_from"], second["resumed_from"]) == (None, "checkpoint-epoch-1-step-2")


def test_a_sparkline_goes_from_high_to_low():
    assert log.sparkline([8, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"
    assert log.sparkline([3.0]) == "▁"
    assert len(log.sparkline(list(range(1000)), width=60)) == 60


def test_the_report_and_the_curve_come_from_the_files_of_the_run(tmp_path):
    run_log = log.RunLog(tmp_path)
    for step in range(1, 21):
        run_log.write(ROW | {"step": step, "loss": 4.0 if step <= 10 else 2.0, "stage": 1 if step <= 12 else 2})
    run_log.write(EVALUATION | {"stage": 2, "step": 20})
    run_log.close()
    start(tmp_path, {"data.batch_size": "configs/debug.py"})
    log.write_report(tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert "| 1 | 12 | 4.0000 | 3.6000 | - | 5s |" in report
    assert "| 2 | 8 | 2.0000 | 2.0000 | 2.2500 | 3s |" in report
    assert "2.2500 with the true pictures, 3.0000 with those of other samples: the model looks at the picture" in report
    assert "|  | 7 | What is it? | a \\| cat | A cat. |" in report
    assert "Cost of the steps: 8s on cpu, 80.4k tokens, 630 pictures, 11.2 GB at most." in report
    assert "| data.batch_size | configs/debug.py |" in report
    assert "python sample.py --model" in report
    svg = ElementTree.fromstring((tmp_path / "loss.svg").read_text())
    assert svg.tag.endswith("svg")
    text = " ".join(svg.itertext())
    assert "training loss" in text and "validation, other pictures" in text and "stage 2" in text


def test_the_report_says_what_was_trained_on_what_and_shows_the_pictures(tmp_path):
    config = ExperimentConfig()
    config.data.train_data_path, config.model.use_lora = "train.json", True
    config.save(tmp_path / "experiment.json")
    (tmp_path / "1.jpg").touch()
    run_log = log.RunLog(tmp_path)
    run_log.write(ROW | {"step": 1})
    run_log.write(EVALUATION | {"step": 1, "captions": [CAPTION | {"image": str(tmp_path / "1.jpg")}]})
    run_log.close()
    start(tmp_path)
    log.write_report(tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert (
        "From `openai/clip-vit-base-patch32` and `Qwen/Qwen2.5-0.5B-Instruct` with adapters, on `train.json`, validated on "
        "nothing. Stage 1 trains projector for 3 epochs; stage 2 trains projector, language_model for 2 epochs."
        in report
    )
    assert '| <img src="1.jpg" width="112"> | 7 |' in report


def write_run(folder, losses, **settings):
    config = ExperimentConfig()
    for name, value in settings.items():
        config.set_text(name, value)
    folder.mkdir()
    config.save(folder / "experiment.json")
    run_log = log.RunLog(folder)
    for step, loss in enumerate(losses, 1):
        run_log.write(ROW | {"step": step, "loss": loss})
    run_log.write(EVALUATION | {"step": len(losses), "val_loss": losses[-1]})
    run_log.close()
    return folder


def test_two_runs_are_laid_over_each_other_with_what_they_differ_in(tmp_path, capsys):
    first = write_run(tmp_path / "first", [4.0, 3.0], batch_size="8")
    second = write_run(tmp_path / "second <b>", [4.0, 2.0, 1.0], batch_size="16")
    command.main([str(first), str(second), "--out", str(tmp_path / "both.svg")])
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "data.batch_size: 8 | 16"
    assert out[2].split() == [str(first), "2", "3.900", "3.0000", "1s", "9.9k", "11.2", "GB"]
    assert out[3].removeprefix(str(second)).split()[:3] == ["3", "3.520", "1.0000"]
    assert out[4] == f"curves: {tmp_path / 'both.svg'}"
    svg = ElementTree.fromstring((tmp_path / "both.svg").read_text())
    assert str(second) in " ".join(svg.itertext())
    assert len([path for path in svg.iter("{http://www.w3.org/2000/svg}path") if "stroke" in path.attrib]) == 6


def test_what_is_no_run_cannot_be_compared(tmp_path):
    run = write_run(tmp_path / "run", [1.0])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no metrics.jsonl with a step in it"):
        compare([run, tmp_path / "empty"], tmp_path / "both.svg")
    with pytest.raises(UserError, match="1 runs to compare; name two to 4"):
        compare([run], tmp_path / "both.svg")


def test_a_run_without_validation_still_reports(tmp_path):
    run_log = log.RunLog(tmp_path)
    run_log.write(ROW | {"step": 1})
    run_log.close()
    start(tmp_path)
    log.write_report(tmp_path)
    assert "validation," not in (tmp_path / "loss.svg").read_text()
    assert "looks at the picture" not in (tmp_path / "report.md").read_text()


def test_wandb_is_never_needed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # what Python itself does for a package that cannot be imported
    assert log.start_wandb("mmllm", "name", {}) is None
    assert "wandb is not installed" in capsys.readouterr().out


class FakeWandb(types.ModuleType):
    """What the package would do, noted down."""

    Error = OSError

    def __init__(self, key):
        super().__init__("wandb")
        self.api, self.rows = types.SimpleNamespace(api_key=key), []

    def init(self, **settings):
        self.settings = settings
        return self

    def log(self, row, step):
        self.rows.append((step, row))

    def finish(self):
        self.rows.append("finished")


def test_wandb_gets_the_numbers_of_each_step_when_it_is_asked_for(tmp_path, monkeypatch):
    wandb = FakeWandb("key")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run_log = log.RunLog(tmp_path, wandb_run=log.start_wandb("mmllm", "tiny", {"seed": 0}))
    run_log.write({"step": 1, "loss": 2.0, "captions": [CAPTION]})
    run_log.close()
    assert wandb.settings == {"project": "mmllm", "name": "tiny", "config": {"seed": 0}}
    assert wandb.rows == [(1, {"step": 1, "loss": 2.0}), "finished"]


def test_a_run_goes_on_without_wandb_when_it_fails_on_the_way(tmp_path, monkeypatch, capsys):
    class Gone(FakeWandb):
        def log(self, row, step):
            raise RuntimeError("the service is away")

    monkeypatch.setitem(sys.modules, "wandb", Gone("key"))
    run_log = log.RunLog(tmp_path, wandb_run=log.start_wandb("mmllm", "tiny", {}))
    run_log.write({"step": 1})
    run_log.write({"step": 2})
    run_log.close()
    assert [row["step"] for row in log.read_metrics(tmp_path)] == [1, 2]
    assert capsys.readouterr().out.count("warning: wandb failed (RuntimeError('the service is away'))") == 1


def test_rows_for_which_there_is_no_room_are_told_and_written_later(tmp_path, capsys):
    """A limit on the file's size is the nearest thing to a full disk that a test can have."""
    run_log = log.RunLog(tmp_path)
    run_log.write({"step": 1})
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
        run_log.write({"step": 2})
        run_log.write({"step": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [row["step"] for row in log.read_metrics(tmp_path)] == [1]
    assert "metrics.jsonl: cannot be written (File too large); the run goes on" in capsys.readouterr().err
    run_log.write({"step": 4})
    run_log.close()
    assert [row["step"] for row in log.read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_wandb_without_an_account_asks_for_nothing(monkeypatch, capsys):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(None))
    assert log.start_wandb("mmllm", "tiny", {}) is None
    assert "wandb is not logged in" in capsys.readouterr().out


def test_wandb_offline_needs_no_account(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb = FakeWandb(None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert log.start_wandb("mmllm", "tiny", {}) is wandb


def test_a_run_goes_on_when_wandb_cannot_start(monkeypatch, capsys):
    class Unreachable(FakeWandb):
        def init(self, **settings):
            raise OSError("no network")

    monkeypatch.setitem(sys.modules, "wandb", Unreachable("key"))
    assert log.start_wandb("mmllm", "tiny", {}) is None
    assert capsys.readouterr().out == "wandb did not start (no network); the run goes on without it\n"
