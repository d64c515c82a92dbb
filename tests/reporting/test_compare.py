"""`mmllm compare` shows what runs differ in, beside their curves."""

import pytest

from conftest import ROOT
from mmllm.commands import compare as command
from mmllm.errors import UserError
from mmllm.reporting.compare import compare
from mmllm.reporting.metrics import read_metrics
from run_rows import write_run


def test_two_runs_are_compared_by_settings_and_results(tmp_path, capsys):
    first = write_run(tmp_path / "first", [4.0, 3.0], batch_size="8")
    second = write_run(tmp_path / "second", [4.0, 2.0, 1.0], batch_size="16")
    command.main([str(first), str(second), "--out", str(tmp_path / "both.png")])
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "data.batch_size: 8 | 16"
    assert out[2].split() == [str(first), "2", "3.900", "3.0000", "1s", "9.9k", "11.2", "GB"]
    assert out[3].split()[:4] == [str(second), "3", "3.520", "1.0000"]
    assert out[4] == f"curves: {tmp_path / 'both.png'}"
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_the_metrics_of_somebody_elses_run_are_compared_without_its_settings(tmp_path):
    own = write_run(tmp_path / "own", [4.0, 3.0], batch_size="8")
    reference = tmp_path / "reference.jsonl"
    (write_run(tmp_path / "other", [4.0, 2.0, 1.0]) / "metrics.jsonl").rename(reference)
    lines = compare([own, reference], tmp_path / "both.png")
    assert lines[0].split()[:2] == ["run", "steps"] and lines[2].split()[:4] == [str(reference), "3", "3.520", "1.0000"]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "runs").glob("*.jsonl")), ids=lambda path: path.stem)
def test_a_reference_run_holds_numbers_alone(path, tmp_path):
    rows = read_metrics(path)
    assert all(isinstance(value, int | float) for row in rows for value in row.values())
    own = write_run(tmp_path / "own", [4.0, 3.0])
    assert compare([own, path], tmp_path / "both.png")[2].split()[:2] == [str(path), str(rows[-1]["step"])]


def test_what_cannot_be_compared_is_refused_with_the_reason(tmp_path):
    run = write_run(tmp_path / "run", [1.0])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no metrics.jsonl with a step in it"):
        compare([run, tmp_path / "empty"], tmp_path / "both.svg")
    with pytest.raises(UserError, match="1 runs to compare; name two to 4"):
        compare([run], tmp_path / "both.svg")
    with pytest.raises(UserError, match=r"both.txt: cannot be written .* name a .png or .svg file"):
        compare([run, run], tmp_path / "both.txt")
    with pytest.raises(UserError, match="both.png: cannot be written"):
        compare([run, run], tmp_path / "no folder" / "both.png")
