"""metrics.jsonl survives a crash, a resume and a full disk; wandb is never needed."""

import resource
import signal
import sys
import types

import pytest

from mmllm.reporting.metrics import RunLog, progress_line, read_metrics, start_wandb
from run_rows import CAPTION, ROW


def test_a_progress_line_fits_a_terminal_and_says_everything():
    line = progress_line(ROW, 2.314, total_steps=2000)
    assert line == (
        "step 120/2000  6.0% | loss 2.314 | lr 9.8e-05 | |g| 0.71 | 404 ms | 9.9k tok/s | 78 img/s | mfu 41% | 11.2 GB"
        " | eta 12m40s"
    )
    assert "| mfu n/a |" in progress_line(ROW | {"mfu": None}, 2.314, total_steps=2000)


def test_a_resumed_log_drops_later_rows_and_a_torn_last_line(tmp_path):
    run_log = RunLog(tmp_path)
    for step in (1, 2, 3):
        run_log.write({"step": step})
    run_log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    resumed = RunLog(tmp_path, last_step=2)
    resumed.write({"step": 3, "again": True})
    resumed.close()
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_texts_with_line_separators_or_half_characters_come_back_as_rows(tmp_path):
    texts = ["a\u2028b", "c\u0085d", "half \ud83d of a character"]
    run_log = RunLog(tmp_path)
    for step, text in enumerate(texts):
        run_log.write({"step": step, "reference": text})
    run_log.close()
    assert [row["reference"] for row in read_metrics(tmp_path)] == texts
    RunLog(tmp_path, last_step=2).close()
    assert [row["reference"] for row in read_metrics(tmp_path)] == texts


def test_a_new_run_begins_with_an_empty_log(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    RunLog(tmp_path).close()
    assert read_metrics(tmp_path) == []


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
    run_log = RunLog(tmp_path, wandb_run=start_wandb("mmllm", "tiny", {"seed": 0}))
    run_log.write({"step": 1, "loss": 2.0, "captions": [CAPTION]})
    run_log.close()
    assert wandb.settings == {"project": "mmllm", "name": "tiny", "config": {"seed": 0}}
    assert wandb.rows == [(1, {"step": 1, "loss": 2.0}), "finished"]


def test_a_run_goes_on_without_wandb_when_it_fails_on_the_way(tmp_path, monkeypatch, capsys):
    class Gone(FakeWandb):
        def log(self, row, step):
            raise RuntimeError("the service is away")

    monkeypatch.setitem(sys.modules, "wandb", Gone("key"))
    run_log = RunLog(tmp_path, wandb_run=start_wandb("mmllm", "tiny", {}))
    run_log.write({"step": 1})
    run_log.write({"step": 2})
    run_log.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert capsys.readouterr().out.count("warning: wandb failed (RuntimeError('the service is away'))") == 1


def test_rows_for_which_there_is_no_room_are_told_and_written_later(tmp_path, capsys):
    """A limit on the file's size is the nearest thing to a full disk that a test can have."""
    run_log = RunLog(tmp_path)
    run_log.write({"step": 1})
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
        run_log.write({"step": 2})
        run_log.write({"step": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    assert "metrics.jsonl: cannot be written (File too large); the run goes on" in capsys.readouterr().err
    run_log.write({"step": 4})
    run_log.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]


class Unreachable(FakeWandb):
    def init(self, **settings):
        raise OSError("no network")


@pytest.mark.parametrize(
    "module, says",
    [
        (None, "wandb is not installed"),  # what Python itself does for a package that cannot be imported
        (FakeWandb(None), "wandb is not logged in"),
        (Unreachable("key"), "wandb did not start (no network); the run goes on without it"),
    ],
)
def test_wandb_is_never_needed(monkeypatch, capsys, module, says):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", module)
    assert start_wandb("mmllm", "tiny", {}) is None
    assert capsys.readouterr().out.startswith(says)


def test_wandb_offline_needs_no_account(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb = FakeWandb(None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert start_wandb("mmllm", "tiny", {}) is wandb
