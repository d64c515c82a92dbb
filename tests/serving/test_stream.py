"""Answers while they are being made, and many at once: over real sockets, each as if it had been asked alone."""

import asyncio
import http.client
import json
import math
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from starlette.testclient import TestClient

from mmllm.inference.pipeline import load_pipeline
from mmllm.serving.app import Server, create_app
from mmllm.serving.events import MOST_UNSENT, EventStream, Pieces
from mmllm.serving.http import HttpError
from mmllm.serving.settings import Settings
from official import write_model
from server_process import BASE64, FOREVER, Real, answer, app, ask, fault, head, ready, say, until


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return load_pipeline(write_model(tmp_path_factory.mktemp("served"), max_position_embeddings=32768), device="cpu")


@pytest.fixture(scope="module")
def client(pipeline):
    with TestClient(app(pipeline, max_new_tokens=FOREVER, max_context=32768)) as client:
        yield ready(client)


def events(text: str) -> list:
    """The contents of a stream: objects, and at the end "[DONE]"."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    return [json.loads(line) if line != "[DONE]" else line for line in lines]


def told(content: list) -> str:
    return "".join(event.get("delta", "") for event in content[:-1])


LONG = {"max_new_tokens": 60, "temperature": 1.0, "seed": 3}


def test_a_stream_tells_the_pieces_then_the_whole_answer_as_without_it(client):
    form = {name: str(value) for name, value in LONG.items()}
    asked = [
        ("caption", lambda **more: ask(client, **form | more)),
        ("answer", lambda **more: ask(client, "/question", question="What?", **form | more)),
        ("response", lambda **more: say(client, image_base64=BASE64, conversation_id="s", reset=True, **LONG | more)),
    ]
    for name, request in asked:
        whole = request().json()
        response = request(stream="true" if name != "response" else True)
        assert response.headers["content-type"] == "text/event-stream"
        assert (response.headers["cache-control"], response.headers["x-accel-buffering"]) == ("no-cache", "no")
        *pieces, last, done = events(response.text)
        assert done == "[DONE]" and len(pieces) > 1
        assert last.pop("id") != whole.pop("id") and last == whole
        assert told([*pieces, last, done]) == whole[name]


def test_a_streamed_turn_is_remembered(client):
    say(client, conversation_id="t", stream=True)
    assert say(client, conversation_id="t").json()["turn"] == 2


@pytest.mark.parametrize("value", ["yes", 1, "true"])
def test_stream_is_true_or_false(client, value):
    assert fault(say(client, stream=value)) == (400, "invalid_value", "stream")
    assert ask(client, stream="yes").status_code == 400 and ask(client, stream="false").status_code == 200


def test_an_answer_ends_before_its_stop_string(client):
    whole = say(client, **LONG).json()["response"]
    stop = whole[len(whole) // 2 :][:2]
    for more in ({"stop": stop}, {"stop": ["\x01\x01", stop]}):
        content = events(say(client, **LONG | more, stream=True).text)
        assert told(content) == content[-2]["response"] == whole[: whole.index(stop)]
        assert content[-2]["finish_reason"] == "stop"


@pytest.mark.parametrize("stop", ["", [""], ["a", "b", "c", "d", "e"], "x" * 65, [1], 5, {"a": 1}, ["\ud800"]])
def test_stop_strings_are_few_and_short(client, stop):
    body = json.dumps({"message": "Hello", "stop": stop})
    response = client.post("/chat", content=body, headers={"Content-Type": "application/json"})
    code = "invalid_unicode" if stop == ["\ud800"] else "invalid_value"
    assert fault(response) == (400, code, "stop")


@pytest.mark.parametrize("values", [{"min_p": 1.5}, {"repetition_penalty": 0}, {"repetition_penalty": 3}])
def test_further_options_have_their_ranges(client, values):
    assert fault(say(client, **values)) == (400, "invalid_value", next(iter(values)))
    assert say(client, min_p=0.1, repetition_penalty=1.1, temperature=0.7).status_code == 200


def test_what_fails_before_the_first_word_is_an_ordinary_error(client):
    assert fault(say(client, message="word " * 1500, max_new_tokens=FOREVER, stream=True))[:2] == (
        400,
        "context_length_exceeded",
    )


def test_what_fails_later_is_an_event_and_the_stream_ends(client, pipeline):
    norm = pipeline.model.language_model.model.norm.weight
    healthy = norm.data.clone()
    values = {"message": "Hello", "max_new_tokens": FOREVER, "temperature": 1.0, "stream": True}
    try:
        with client.stream("POST", "/chat", json=values) as response:
            texts = response.iter_text()
            text = next(texts)
            norm.data.fill_(math.nan)
            text += "".join(texts)
    finally:
        norm.data.copy_(healthy)
    *pieces, last, done = events(text)
    assert pieces and done == "[DONE]" and list(last["error"]) == ["message", "type", "param", "code"]
    assert (last["error"]["type"], last["error"]["code"]) == ("server_error", "generation_failed")
    until(lambda: client.get("/health").json()["slots"]["busy"] == 0)
    until(lambda: client.app.state.service.admitted == 0)


def test_one_wrong_row_fails_alone(client, pipeline):
    """The token of `~` is made NaN where it is read: who writes it gets an error, the others their answers."""
    wanted = say(client, message="Hello").json()["response"]
    model = pipeline.model.language_model.model
    kept, (token,) = model.embed_tokens, pipeline.processor.tokenizer.encode("~")
    poisoned = kept.weight.detach().clone()
    poisoned[token] = math.nan
    model.embed_tokens = torch.nn.Embedding.from_pretrained(poisoned)
    try:
        with ThreadPoolExecutor(3) as clients:
            messages = ("Hello", "~", "Hello")
            answers = list(clients.map(lambda message: say(client, message=message), messages))
    finally:
        model.embed_tokens = kept
    assert fault(answers[1])[:2] == (500, "generation_failed")
    assert [answers[i].json()["response"] for i in (0, 2)] == [wanted, wanted]


def test_when_the_model_thread_dies_all_who_wait_hear_at_once(tmp_path, caplog):
    pipeline = load_pipeline(write_model(tmp_path / "model", max_position_embeddings=32768), device="cpu")
    limits = {"slots": 1, "max_new_tokens": FOREVER, "max_context": 32768}
    with TestClient(app(pipeline, **limits)) as client, ThreadPoolExecutor(3) as others:
        ready(client)
        waiting = [others.submit(say, client, max_new_tokens=FOREVER) for _ in range(3)]
        until(lambda: client.get("/health").json()["queue"]["waiting"] == 2)
        pipeline.model.language_model.model.norm = torch.nn.Linear(3, 3)  # no layer of this model
        assert [fault(request.result(60))[:2] for request in waiting] == [(500, "engine_dead")] * 3
        assert client.get("/health").json()["status"] == "engine_dead"
        assert fault(say(client))[:2] == (503, "engine_dead")
    assert "mat1 and mat2" in caplog.text


# --- over real sockets ---


@pytest.fixture(scope="module")
def server(pipeline):
    """uvicorn with four slots, in a thread."""
    settings = Settings(model="tiny", max_new_tokens=FOREVER, max_context=32768, slots=4)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        running = Server(create_app(lambda: pipeline, settings), settings)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        real = Real(listener.getsockname()[1], None)
        until(lambda: real.call("GET", "/health")[1]["status"] == "ok", 60)
        yield real
        running.should_exit = True
        thread.join()


def stream(server: Real, **values) -> str:
    """The whole text of a streamed answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = json.dumps({"message": "Hello", "stream": True} | values)
    connection.request("POST", "/chat", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    assert response.status == 200
    return text


def test_eight_clients_at_once_are_answered_as_one_by_one(server):
    def request(i: int) -> str:
        values = {"message": f"word {i} " * (i + 1), "max_new_tokens": 10 + 5 * i, "seed": i}
        values |= {"image_base64": BASE64} if i % 3 == 0 else {}
        values |= {"temperature": 1.0, "top_k": 40, "top_p": 0.9} if i % 2 else {}
        if i % 4 < 2:
            return server.chat(**values)[1]["response"]
        content = events(stream(server, **values))
        assert told(content) == content[-2]["response"]
        return content[-2]["response"]

    alone = [request(i) for i in range(8)]
    with ThreadPoolExecutor(8) as clients:
        assert list(clients.map(request, [*range(8), *range(8)])) == alone * 2
    until(lambda: server.state() == (0, 0))


def test_four_are_served_side_by_side_and_a_fifth_gets_the_first_free_slot(server):
    running = [server.begin(temperature=1.0) for _ in range(4)]
    until(lambda: server.state() == (4, 0))
    fifth = server.begin(max_new_tokens=5)
    until(lambda: server.state() == (4, 1))
    running[2].close()
    assert answer(fifth)[0] == 200
    for connection in (*running, fifth):
        connection.close()
    until(lambda: server.state() == (0, 0))


def test_who_leaves_in_the_middle_of_a_stream_frees_the_slot(server):
    body = json.dumps({"message": "Hello", "stream": True, "max_new_tokens": FOREVER, "temperature": 1.0}).encode()
    connection = server.send(head(len(body)) + body)
    assert connection.recv(4000).startswith(b"HTTP/1.1 200 OK")
    until(lambda: server.state() == (1, 0))
    connection.close()
    until(lambda: server.state() == (0, 0))
    assert server.chat()[0] == 200


# --- the stream itself ---


class Patient:
    """The part of a request that a stream asks for: a client that stays."""

    scope = {"request_id": "1", "log": {}}

    async def receive(self) -> dict:
        await asyncio.Event().wait()
        return {}


async def sent(work, pieces: Pieces, ping_s: float, until_text: str = "[DONE]") -> str:
    """What a stream sends until `until_text` is in it."""
    pieces.made_by(asyncio.ensure_future(work))
    bodies = []

    async def send(message: dict) -> None:
        bodies.append(message.get("body", b"").decode())
        if until_text in "".join(bodies):
            raise EOFError

    with pytest.raises(EOFError):
        await EventStream(Patient(), "", pieces, ping_s)({"log": {}}, None, send)
    return "".join(bodies)


def test_who_waits_for_the_next_word_gets_a_sign_of_life():
    async def work() -> dict:
        await asyncio.Event().wait()
        return {}

    assert ": ping\n\n: ping\n\n" in asyncio.run(asyncio.wait_for(sent(work(), Pieces(), 0.01, ": ping\n\n: ping"), 10))


@pytest.mark.parametrize(
    "error, code", [(HttpError(503, "draining", "going"), "draining"), (KeyError("bug"), "internal_error")]
)
def test_a_failure_in_the_stream_is_told_in_our_words(error, code):
    async def work() -> dict:
        raise error

    content = events(asyncio.run(sent(work(), Pieces(), 10)))
    assert content[0]["error"]["code"] == code and "bug" not in content[0]["error"]["message"]


def test_work_for_a_client_who_does_not_read_is_given_up():
    async def scene() -> bool:
        pieces = Pieces()
        task = asyncio.ensure_future(asyncio.sleep(100))
        pieces.made_by(task)
        pieces.put("x" * MOST_UNSENT)
        before = task.cancelling()
        pieces.put("x")
        return before == 0 and task.cancelling() == 1

    assert asyncio.run(scene())
