"""A contestant of a benchmark: a process that loads once and does the same work at each of its turns.

On a shared machine the speed of a minute ago says nothing about now. So contestants take turns (A B A B), and the ratio of
their medians counts. Each is a process of its own, for its peak memory and because threads of one library would slow down
the other.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from statistics import median

from mmllm.errors import RunError
from mmllm.runtime.console import print_rank0

Work = Callable[[dict], dict]  # one turn: from what is asked to what was measured


class Contestant:
    """The process for `spec`, which names a bench and what else its builder needs; `loaded` is what loading cost."""

    def __init__(self, spec: dict):
        self.name = spec["contestant"]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks", "worker", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        self.loaded = self._answer()

    def turn(self, asked: dict) -> dict:
        """Ask for one turn and wait for what was measured in it."""
        try:
            self.process.stdin.write(json.dumps(asked) + "\n")
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
        raise RunError(f"{self.name} ended with code {code}: {lines[-1] if lines else 'no output'}")

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


def build(spec: dict) -> tuple[dict, Work]:
    """What loading the contestant cost, and its work."""
    if spec["bench"] not in ("train", "generate", "memory"):
        raise KeyError(spec["bench"])
    return importlib.import_module(f"benchmarks.{spec['bench']}").build(spec)


class Here:
    """A contestant in this process, for models so tiny that a start of Python would take longest."""

    def __init__(self, spec: dict):
        self.loaded, self.turn = build(spec)

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to end."""


def serve_turns(spec: dict) -> None:
    """The process of a contestant: build, report the cost of loading, then take a turn for each line of input."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to the errors, not among the answers
    loaded, work = build(spec)
    answers.write(json.dumps(loaded) + "\n")
    for line in sys.stdin:
        answers.write(json.dumps(work(json.loads(line))) + "\n")


def compete(specs: list[dict], rounds: int, *, together: bool = True) -> list[dict]:
    """Let the contestants take turns for `rounds` rounds after one to warm up; one row for each and each of its cases.

    A spec names in "turns" what is asked of its contestant in a round; a turn's "case" goes into its row. `together`
    False: one process at a time, started anew in each round, for what does not fit into memory at once.
    """
    loaded: list[dict] = [{} for _ in specs]
    results: list[list[list[dict]]] = [[[] for _ in spec["turns"]] for spec in specs]

    def start(i: int) -> Contestant | Here:
        contestant = (Here if specs[i]["size"] == "tiny" else Contestant)(specs[i])
        loaded[i] = contestant.loaded
        for asked in specs[i]["turns"]:
            contestant.turn(asked)
        return contestant

    def take(i: int, contestant: Contestant | Here) -> None:
        for asked, found in zip(specs[i]["turns"], results[i], strict=True):
            found.append(contestant.turn(asked))

    if together:
        with ExitStack() as stack:
            contestants = []
            for i, spec in enumerate(specs):
                contestants.append(stack.enter_context(start(i)))
                print_rank0(f"  {spec['contestant']}: ready")
            for _ in range(rounds):
                for i, contestant in enumerate(contestants):
                    take(i, contestant)
    else:
        for number in range(rounds):
            for i, spec in enumerate(specs):
                with start(i) as contestant:
                    take(i, contestant)
                print_rank0(f"  {spec['contestant']}: round {number + 1} of {rounds}")
    return [
        {"case": asked["case"], "contestant": spec["contestant"], **cost, **summary(turns)}
        for spec, cost, found in zip(specs, loaded, results, strict=True)
        for asked, turns in zip(spec["turns"], found, strict=True)
    ]


def summary(turns: list[dict]) -> dict:
    """The median of every number over the turns; the largest peak and bandwidth."""
    row = {}
    for name, value in turns[-1].items():
        values = [turn[name] for turn in turns]
        if name in ("peak_bytes", "bytes_per_s"):
            row[name] = max(values)
        else:
            row[name] = median(values) if isinstance(value, int | float) else value
    return row | {"turns": len(turns)}


def speeds(token_times: list[tuple[int, float]], begin: float, total: float, rows: int) -> dict:
    """The delay of the first of the tokens in `token_times` (row, time), and their rate while all rows were active."""
    first = dict(reversed(token_times))
    last = dict(token_times)
    start, end = max(first.values()), min(last.values())
    count = sum(start < at <= end for _, at in token_times)
    rate = count / (end - start)
    return {
        "first_token_s": min(first.values()) - begin,
        "tokens_per_s": rate,
        "steps_per_s": rate / rows,
        "total_s": total,
        "rows": rows,
    }
