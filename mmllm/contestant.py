"""A contestant of a benchmark: a process of its own that loads once and does the same work each time it is its turn.

The surprising fact: on a shared machine the speed of a minute ago says nothing about now. So contestants take turns
(A B A B), and what is kept is the ratio of their medians. A process each, because the peak memory of a process can only
be asked for once, and because one library's threads would wait in the other's way.

Next: bench_train.py, bench_generate.py.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from statistics import median

from mmllm.errors import RunError
from mmllm.log import say

Work = Callable[[], dict]  # one turn: what was measured in it
Build = Callable[[dict], tuple[dict, Work]]  # a spec to what loading cost, and the work


class Contestant:
    """The process for `spec`, which names a bench and what else its builder needs; `loaded` is what loading cost."""

    def __init__(self, spec: dict):
        self.name = spec["contestant"]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mmllm.bench", "worker", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        self.loaded = self._answer()

    def turn(self) -> dict:
        """Ask for one turn and wait for what was measured in it."""
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self._fail()
        return self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        return json.loads(line) if line else self._fail()

    def _fail(self) -> None:
        code = self.process.wait()
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors if line.strip()]
        self.close()
        raise RunError(f"{self.name} ended with code {code}: {lines[-1] if lines else 'it said nothing'}")

    def close(self) -> None:
        with suppress(BrokenPipeError):  # what was written to a process that is gone
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
        self.errors.close()

    def __enter__(self) -> "Contestant":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill() if error[0] else None
        self.close()


def serve_turns(spec: dict, build: Build) -> None:
    """What runs in the process: build, tell what loading cost, then a turn for every line that comes in."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to the errors, not among the answers
    loaded, work = build(spec)
    answers.write(json.dumps(loaded) + "\n")
    for _ in sys.stdin:
        answers.write(json.dumps(work()) + "\n")


def compete(specs: list[dict], rounds: int, warm_ups: int = 1, *, together: bool = True) -> list[dict]:
    """Let the contestants take turns for `rounds` rounds; returns one summary each, in the order of `specs`.

    `together` False: one process at a time, started anew for each turn, for what does not fit into memory at once.
    """
    turns: list[list[dict]] = [[] for _ in specs]
    loaded: list[dict] = [{} for _ in specs]
    if together:
        contestants: list[Contestant] = []
        try:
            for i, spec in enumerate(specs):
                contestants.append(started(spec, warm_ups))
                loaded[i] = contestants[i].loaded
            for _ in range(rounds):
                for i, contestant in enumerate(contestants):
                    turns[i].append(contestant.turn())
        finally:
            for contestant in contestants:
                contestant.close()
    else:
        for _ in range(rounds):
            for i, spec in enumerate(specs):
                with started(spec, warm_ups) as contestant:
                    loaded[i] = contestant.loaded
                    turns[i].append(contestant.turn())
    return [summary(spec, cost, results) for spec, cost, results in zip(specs, loaded, turns, strict=True)]


def started(spec: dict, warm_ups: int) -> Contestant:
    contestant = Contestant(spec)
    for _ in range(warm_ups):
        contestant.turn()
    say(f"  {contestant.name}: ready")
    return contestant


def summary(spec: dict, loaded: dict, turns: list[dict]) -> dict:
    """One row: what loading cost, then the median of every number over the turns, and the largest peak."""
    row = {"contestant": spec["contestant"], **loaded}
    for name, value in turns[-1].items():
        values = [turn[name] for turn in turns]
        if name == "peak_bytes":
            row[name] = max(values)
        else:
            row[name] = median(values) if isinstance(value, int | float) else value
    return row | {"turns": len(turns)}
