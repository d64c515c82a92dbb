"""Signals during a run, each in a process of its own: some die of it."""

import os
import signal
import subprocess
import sys

import pytest

from conftest import ROOT

posix_only = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="signals of POSIX")
BEGIN = """
import os, pathlib, signal, sys, time
from mmllm.runtime.signals import StopSignal
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0.01)
"""


def finished(program: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", BEGIN + program], capture_output=True, text=True, cwd=ROOT)


def test_a_second_signal_ends_a_run_at_once():
    program = "with StopSignal() as stop:\n    send(signal.SIGTERM)\n    print('noted', stop.number, flush=True)\n"
    done = finished(program + "    send(signal.SIGTERM)\n    time.sleep(600)")
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "noted 15\n")
    assert "stopping after this step, then saving; Ctrl-C or SIGTERM once more stops at once" in done.stderr


@posix_only
@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_a_warning_of_a_scheduler_stops_the_run_and_the_sigterm_after_it_does_not_end_it_at_once(name):
    program = (
        f"with StopSignal() as stop:\n    send(signal.{name})\n    send(signal.{name})\n    send(signal.SIGTERM)\n"
    )
    done = finished(program + "    print(signal.Signals(stop.number).name)")
    assert (done.returncode, done.stdout) == (0, f"{name}\n")


@posix_only
def test_nohup_stays_in_force():
    program = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\nwith StopSignal() as stop:\n    send(signal.SIGHUP)\n"
    done = finished(program + "    print(stop.number)")
    assert (done.returncode, done.stdout) == (0, "0\n")


@posix_only
def test_a_run_whose_terminal_is_closed_goes_on_to_its_end(tmp_path):
    program = f"""
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
with StopSignal() as stop:
    print("ready", flush=True)
    while not stop.number:
        time.sleep(0.01)
    print("saving", flush=True)
    pathlib.Path({str(tmp_path / "saved")!r}).write_text(str(stop.number))
"""
    ours, its = os.openpty()
    command = [sys.executable, "-c", BEGIN + program]
    with subprocess.Popen(command, stdin=its, stdout=its, stderr=its, start_new_session=True, cwd=ROOT) as process:
        os.close(its)
        said = os.read(ours, 100)
        os.close(ours)
    assert said.startswith(b"ready")  # the end of the line may come later
    assert process.returncode == 0
    assert (tmp_path / "saved").read_text() == "1"
