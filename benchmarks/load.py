"""A server under load, as its clients see it: lost and mixed answers, refusals, memory, waiting times, stalls, reuse.

Without `--url` two servers are started here. A tiny model answers the thousands of requests whose answers are compared: what
can be lost or mixed up lies in the server. The full-size model of random weights, int8 as a server has it on a CPU, gives the
times. Answers of random weights are no sentences, but take as long.
"""

import base64
import contextlib
import http.client
import io
import itertools
import json
import math
import os
import re
import socket
import statistics
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.random_model import sizes, write_model
from benchmarks.rows import Goal
from mmllm.errors import RunError
from mmllm.runtime.console import print_rank0

SERVE = Path(__file__).parent.parent / "serve.py"
TRUTH, TIMES, SERVER = "answers", "times", "mmllm serve"
CLIENTS = 16  # fewer than slots and queue of a server on a CPU: nothing is refused
WARM = 0.1  # of the requests: before them memory is not measured
JOBS = 40  # different ones
REFUSALS = 200
LONG_PROMPT = 1600  # tokens


def goal(text: str, field: str, case: str, bound: float, at_most: bool = True) -> Goal:
    return Goal("load", "cpu", text, field, (case, SERVER), bound, at_most=at_most)


GOALS = (
    goal("lost answers", "lost", TRUTH, 0),
    goal("mixed answers", "mixed", TRUTH, 0),
    goal("memory growth, MB", "growth_mb", TRUTH, 30),
    goal("refusals p99, ms", "refusal_p99_ms", TIMES, 50),
    goal("/question of 8 tokens p50, s", "question_s", TIMES, 1),
    goal("/caption of 30 tokens p50, s", "caption_s", TIMES, 2),
    goal(f"longest stall of a stream beside {LONG_PROMPT} tokens, ms", "stall_ms", TIMES, 300),
    goal("the same image again, first token", "same_image", TIMES, 0.35),
    goal("turn 6 of a chat over turn 1, first token", "turn_6", TIMES, 1.3),
    goal("captions of 30 tokens, 8 clients over one", "together_30", TIMES, 1.8, at_most=False),
    goal("captions of 100 tokens, 8 clients over one", "together_100", TIMES, 2.5, at_most=False),
)


def measure(size: str, requests: int, url: str | None, folder: Path) -> list[dict]:
    """Two rows: the answers to `requests` requests, and the times."""
    rows = []
    for case, model, work in ((TRUTH, "tiny", partial(answers, requests=requests)), (TIMES, size, times)):
        with contextlib.nullcontext(Server(url)) if url else started(model, folder) as server:
            rows.append({"case": case, "contestant": SERVER, "model": url or model} | work(server))
        print_rank0(f"{case}: " + ", ".join(f"{name} {value}" for name, value in list(rows[-1].items())[3:]))
    return rows


# A server and its clients ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    url: str
    process: int | None = None  # where it was started here

    @property
    def headers(self) -> dict[str, str]:
        key = os.environ.get("MMLLM_API_KEY")
        return {"Connection": "close"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def send(self, path: str, body: bytes, kind: str) -> http.client.HTTPResponse:
        """A POST on a connection of its own, which the response holds."""
        place = urllib.parse.urlsplit(self.url)
        connection = http.client.HTTPConnection(place.hostname, place.port, timeout=300)
        connection.request("POST", path, body, self.headers | {"Content-Type": kind})
        return connection.getresponse()

    def chat(self, **values: object) -> http.client.HTTPResponse:
        return self.send("/chat", json.dumps(values).encode(), "application/json")

    def about(self, path: str, image: bytes, **fields: object) -> http.client.HTTPResponse:
        """A form with an image."""
        parts = [
            f'--b\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode() for k, v in fields.items()
        ]
        head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
        return self.send(path, b"".join([*parts, head, image, b"\r\n--b--\r\n"]), "multipart/form-data; boundary=b")

    def health(self) -> dict:
        place = urllib.parse.urlsplit(self.url)
        connection = http.client.HTTPConnection(place.hostname, place.port, timeout=60)
        connection.request("GET", "/health", headers=self.headers)
        return json.loads(connection.getresponse().read())

    def resident_mb(self) -> float | None:
        if self.process is None:
            return None
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process}/status").read_text())[1]) / 1000


@contextlib.contextmanager
def started(size: str, folder: Path) -> Iterator[Server]:
    """A server of random weights, once it is ready."""
    model = write_model(folder / f"{size}-all-layers" / "model", sizes(size, None))
    log = folder / f"serve-{size}.log"
    command = [sys.executable, str(SERVE), "--model", str(model), "--port", "0", "--device", "cpu"]
    with log.open("w") as stderr, subprocess.Popen(command, stderr=stderr) as process:
        try:
            while "ready after" not in log.read_text():
                if process.poll() is not None:
                    raise RunError(f"the server ended; {log} has the reason")
                time.sleep(0.1)
            yield Server(re.search(r"http://[\d.]+:\d+", log.read_text())[0], process.pid)
        finally:
            process.terminate()


def result(response: http.client.HTTPResponse) -> dict:
    """The answer, of a stream its last event, which must hold the text of all deltas."""
    if response.status != 200:
        raise RunError(f"status {response.status}: {response.read()[:200]!r}")
    if response.headers["content-type"] == "application/json":
        return json.loads(response.read())
    *pieces, whole = [event for _, event in events(response)]
    text = next(whole[name] for name in ("caption", "answer", "response") if name in whole)
    if "".join(piece["delta"] for piece in pieces) != text:
        raise RunError("the pieces of a stream are not its text")
    return whole


def events(response: http.client.HTTPResponse) -> Iterator[tuple[float, dict]]:
    """The events of a stream with the time of their arrival."""
    for line in response:
        if line.startswith(b"data: {"):
            yield time.perf_counter(), json.loads(line[6:])


def noise(number: int, side: int = 320) -> bytes:
    """An image that no other number has, as PNG."""
    pixels = np.random.default_rng(number).integers(0, 256, (side // 16, side // 16, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((side, side)).save(file, "PNG")
    return file.getvalue()


# Every answer is the one that its request gets alone --------------------------------------------------------------------


def answers(server: Server, requests: int) -> dict:
    names = itertools.count()
    todo, done = itertools.count(), itertools.count(1)
    alone = [job(server, number, next(names)) for number in range(JOBS)]
    each = sum(map(len, alone)) / JOBS  # requests of a job
    lost, mixed, resident = [], [], []

    def client(_: int) -> None:
        while (number := next(todo)) < requests / each:
            try:
                if job(server, number % JOBS, next(names)) != alone[number % JOBS]:
                    mixed.append(number)
            except (RunError, OSError, http.client.HTTPException, ValueError) as error:
                lost.append(f"{type(error).__name__}: {error}")
            if next(done) == int(WARM * requests / each):
                resident.append(server.resident_mb())

    begin = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(client, range(CLIENTS)))
    seconds = time.perf_counter() - begin
    for line in lost[:3]:
        print_rank0(f"lost: {line}")
    growth = None if server.process is None else round(server.resident_mb() - resident[0], 1)
    kinds = {"requests": requests, "clients": CLIENTS, "different_answers": len(set(map(str, alone)))}
    return kinds | {"lost": len(lost), "mixed": len(mixed), "growth_mb": growth, "seconds": round(seconds, 1)}


def job(server: Server, number: int, name: int) -> list[object]:
    """The answers of job `number`: a caption, a question or three turns of a conversation; every second is a stream."""
    image, how = noise(number % 7, 100 + 40 * (number % 7)), {"max_new_tokens": 4 + number % 9, "seed": number}
    how |= {"stream": True} if number % 2 else {}
    if number % 4 > 1:
        how |= {"temperature": 0.9}
    if number % 3 == 0:
        return [result(server.about("/caption", image, prompt=f"Describe {number}.", **how))["caption"]]
    if number % 3 == 1:
        return [result(server.about("/question", image, question=f"What is {number}?", **how))["answer"]]
    picture, turns = {"image_base64": base64.b64encode(image).decode()}, []
    for turn in range(3):
        answer = result(server.chat(message=f"{turn} of {number}?", conversation_id=f"load-{name}", **picture, **how))
        turns.append((answer["turn"], answer["response"]))
        picture = {}
    return turns


# Times ----------------------------------------------------------------------------------------------------------------


def times(server: Server) -> dict:
    numbers = itertools.count(1000)  # each image is new to the server
    result(server.about("/question", noise(next(numbers)), question="?", max_new_tokens=2))

    def seconds(path: str, field: str, tokens: int) -> float:
        begin = time.perf_counter()
        answer = result(server.about(path, noise(next(numbers)), max_new_tokens=tokens, **{field: "What is it?"}))
        assert answer["usage"]["completion_tokens"] == tokens
        return time.perf_counter() - begin

    row = {
        "question_s": statistics.median(seconds("/question", "question", 8) for _ in range(11)),
        "caption_s": statistics.median(seconds("/caption", "prompt", 30) for _ in range(7)),
        "same_image": same_image(server, numbers),
        "turn_6": turn_6(server, numbers),
        "stall_ms": stall_ms(server),
        "refusal_p99_ms": refusal_p99_ms(server),
    }
    for tokens in (30, 100):
        row[f"together_{tokens}"] = together(lambda tokens=tokens: seconds("/caption", "prompt", tokens))
    return {name: round(value, 3) for name, value in row.items()}


def first_token_s(ask: Callable[[], http.client.HTTPResponse]) -> float:
    begin = time.perf_counter()
    response = ask()
    first = next(events(response))[0] - begin
    response.read()
    return first


def same_image(server: Server, numbers: Iterator[int]) -> float:
    """The first token of a second question about an image over that of the first one."""
    first, again = [], []
    for _ in range(5):
        image = noise(next(numbers))
        for measured, question in ((first, "What is it?"), (again, "And where?")):
            ask = {"question": question, "max_new_tokens": 8, "stream": "true"}
            measured.append(first_token_s(lambda image=image, ask=ask: server.about("/question", image, **ask)))
    return statistics.median(again) / statistics.median(first)


def turn_6(server: Server, numbers: Iterator[int]) -> float:
    """The first token of turn 6 of a conversation over that of turn 1, which brings the image."""
    turns = []
    for _ in range(3):
        number = next(numbers)
        picture = {"image_base64": base64.b64encode(noise(number)).decode()}
        turns.append([])
        for turn in range(6):
            more = {"conversation_id": f"turns-{number}", "max_new_tokens": 16, "stream": True} | picture
            turns[-1].append(
                first_token_s(lambda turn=turn, more=more: server.chat(message=f"And then {turn}?", **more))
            )
            picture = {}
    first, *_, last = map(statistics.median, zip(*turns, strict=True))
    return last / first


def stall_ms(server: Server) -> float:
    """The longest wait between two pieces of a stream while another request's long prompt is read."""

    def read(words: int) -> int:
        answer = result(server.chat(message="zebra " * words, max_new_tokens=1))
        return answer["usage"]["prompt_tokens"]

    few, more = read(10), read(60)
    words = math.ceil(10 + 50 * (LONG_PROMPT - few) / (more - few))
    response = server.chat(message="Tell me a story.", max_new_tokens=400, stream=True)
    stream = events(response)
    arrivals = [next(stream)[0] for _ in range(10)]
    with ThreadPoolExecutor(1) as other:
        reading = other.submit(read, words)
        while not reading.done():
            arrivals.append(next(stream)[0])
    response.close()
    print_rank0(f"a stream of {len(arrivals)} pieces beside a prompt of {reading.result()} tokens")
    return 1000 * max(after - before for before, after in itertools.pairwise(arrivals[9:]))


def refusal_p99_ms(server: Server) -> float:
    """From connecting to the status 429, with a body of 1 MB, while every slot and every place in the queue is taken."""
    place = urllib.parse.urlsplit(server.url)

    def send(body: bytes) -> socket.socket:
        connection = socket.create_connection((place.hostname, place.port), timeout=60)
        head = f"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        lines = "".join(f"{name}: {value}\r\n" for name, value in server.headers.items())
        with contextlib.suppress(ConnectionError):  # refused before all of it was sent
            connection.sendall(f"{head}{lines}\r\n".encode() + body)
        return connection

    def take(place: int) -> None:
        while len(waits) < REFUSALS:
            with send(json.dumps({"message": "Hello", "max_new_tokens": 512}).encode()) as taken[place]:
                taken[place].recv(100)

    health, waits, taken = server.health(), [], {}
    places = health["slots"]["total"] + health["queue"]["limit"]
    with ThreadPoolExecutor(places) as others:
        others.map(take, range(places))
        while server.health()["queue"]["waiting"] < health["queue"]["limit"]:
            time.sleep(0.01)
        while len(waits) < REFUSALS:
            begin = time.perf_counter()
            with send(json.dumps({"message": "x" * 1_000_000}).encode()) as connection:
                if connection.recv(12) == b"HTTP/1.1 429":  # else a place had just become free
                    waits.append(1000 * (time.perf_counter() - begin))
        for connection in taken.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
    while server.health()["slots"]["busy"]:
        time.sleep(0.01)
    return sorted(waits)[math.ceil(0.99 * REFUSALS) - 1]


def together(work: Callable[[], float]) -> float:
    """How many times as many answers a minute 8 clients get as one."""
    work()
    begin = time.perf_counter()
    for _ in range(4):
        work()
    alone = (time.perf_counter() - begin) / 4
    begin = time.perf_counter()
    with ThreadPoolExecutor(8) as clients:
        list(clients.map(lambda _: work(), range(16)))
    return 16 * alone / (time.perf_counter() - begin)
