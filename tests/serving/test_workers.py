"""`uvicorn serve:app` and gunicorn, with several workers: real processes, as the commands are typed."""

import asyncio
import os
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from conftest import ROOT
from mmllm.commands.serve import WorkerApp
from mmllm.errors import RunError
from mmllm.inference.pipeline import load_pipeline
from mmllm.inference.request import GenerationConfig
from mmllm.kernels import cpu as kernels
from server_process import BASE64, IMAGE, RealServer, wait_until

slow = pytest.mark.slow
WORDS = ["cat", "dog", "sun", "car", "sea", "red"]


@contextmanager
def started(line: str, folder: Path, workers: int, log: Path, **settings):
    """The server that a command line starts, once all its workers are ready, and its main process."""
    command = [str(Path(sys.executable).with_name(shlex.split(line)[0])), *shlex.split(line)[1:]]
    environ = {
        "MMLLM_MODEL": str(folder),
        "MMLLM_DEVICE": "cpu",
        "MMLLM_HEADER_TIMEOUT_S": "1",
        "TMPDIR": str(log.parent),
    }
    with log.open("w") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, stderr=stderr, stdout=stderr, env=os.environ | environ)
    try:
        wait_until(lambda: log.read_text().count("ready after") == workers or process.poll() is not None)
        yield process, RealServer(int(re.search(r"http://127.0.0.1:(\d+)", log.read_text())[1]), log)
    finally:
        process.terminate()
        process.wait()


def workers_of(process: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes()]


def talk(server: RealServer, name: str, words: list[str], first: int, tries: int = 600) -> list[tuple[int, str]]:
    """Number and answer of each turn; a worker that has just been started says 503 until it is ready."""
    turns = []
    for turn, word in enumerate(words, first):
        image = {"image_base64": BASE64} if turn == 1 else {}
        status, body = 503, {}
        while status == 503 and (tries := tries - 1):
            status, body = server.chat(message=f"{name} {word}", conversation_id=name, **image)
        turns.append((body["turn"], body["response"]))
    return turns


@slow
@pytest.mark.parametrize(
    "line, workers",
    [
        ("uvicorn serve:app --port 0 --workers 2", 2),
        ("gunicorn serve:app -w 2 -k uvicorn.workers.UvicornWorker -b 127.0.0.1:0", 2),
    ],
)
def test_every_turn_is_right_with_several_workers_of_which_one_is_killed(line, workers, folder, tmp_path):
    pipeline = load_pipeline(folder, device="cpu", dtype="int8" if kernels.native() else None)
    names, expected = [f"c{i}" for i in range(20)], {}
    for name in names:
        pipeline.reset()
        config = GenerationConfig(max_new_tokens=5)
        chat = [pipeline.chat(f"{name} {word}", None if i else IMAGE, config) for i, word in enumerate(WORDS)]
        expected[name] = list(enumerate(chat, 1))
    with started(line, folder, workers, tmp_path / "log") as (process, server), ThreadPoolExecutor(4) as clients:
        with server.send(b"POST /chat HTTP/1.1\r\nHost: x\r\nX-Ha") as connection:
            assert connection.recv(10) == b""  # the time limit of headers holds
        assert server.call("GET", "/health")[1]["slots"]["total"] == 8 // workers
        before = workers_of(process)
        turns = dict(zip(names, clients.map(lambda name: talk(server, name, WORDS[:3], 1), names), strict=True))
        os.kill(before[0], signal.SIGKILL)
        for name, rest in zip(names, clients.map(lambda name: talk(server, name, WORDS[3:], 4), names), strict=True):
            turns[name] += rest
        assert turns == expected
        wait_until(lambda: len(workers_of(process)) == workers and set(workers_of(process)) != set(before))
        assert (
            server.log.read_text().count('"path": "/chat", "status": 200') > 110
        )  # the killed one may owe its last lines
    assert "Traceback" not in server.log.read_text()
    assert not list(tmp_path.glob("mmllm-*/*/conversations.sqlite-wal"))  # the last one to close it tidies up


@slow
def test_workers_whose_model_cannot_be_loaded_are_not_started_again_and_again(tmp_path):
    (tmp_path / "model").mkdir()
    line = "uvicorn serve:app --port 0 --workers 2"
    with started(line, tmp_path / "model", 2, tmp_path / "log") as (process, _):
        process.wait(60)
    log = (tmp_path / "log").read_text()
    assert "error: " in log and str(tmp_path / "model") in log and "Traceback" not in log


def test_a_server_that_is_not_uvicorn_is_refused_with_the_lines_that_work():
    sent = []

    async def receive() -> dict:
        return {"type": "lifespan.startup"}

    async def send(message: dict) -> None:
        sent.append(message)

    asyncio.run(WorkerApp()({"type": "lifespan"}, receive, send))
    (message,) = sent
    assert message["type"] == "lifespan.startup.failed"
    assert message["message"].startswith("error: ") and "`uvicorn serve:app --workers 4`" in message["message"]
    with pytest.raises(RunError, match="without --lifespan off"):
        asyncio.run(WorkerApp()({"type": "http"}, receive, send))
