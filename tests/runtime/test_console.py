"""Lines on the console: durations, rates, and the progress of work that has no steps of its own."""

import sys

import pytest

from mmllm.runtime import console
from mmllm.runtime.console import duration, progress, short


@pytest.mark.parametrize(
    "seconds, text", [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (760, "12m40s"), (3600, "1h00m"), (90061, "25h01m")]
)
def test_a_duration_has_two_units(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("number, text", [(0.25, "0.2"), (78, "78"), (9940, "9.9k"), (123456, "123k"), (2.5e6, "2.5M")])
def test_a_rate_has_three_digits(number, text):
    assert short(number) == text


def test_progress_in_a_log_file_is_a_line_now_and_then(monkeypatch, capsys):
    clock = iter(range(0, 100, 10))  # ten seconds an item
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    assert list(progress("abcdefgh", 8, "features")) == list("abcdefgh")
    assert capsys.readouterr().err == "features: 2/8 after 30s, 1m30s left\nfeatures: 5/8 after 1m00s, 36s left\n"


def test_progress_on_a_terminal_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(progress([1, 2], 2, "features")) == [1, 2]
    assert "features:   0%" in capsys.readouterr().err


def test_only_rank_0_shows_progress(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(console, "LINE_EVERY_S", 0)
    assert list(progress([1, 2, 3], 3, "features")) == [1, 2, 3]
    assert capsys.readouterr().err == ""
