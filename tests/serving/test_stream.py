"""Streamed answers, and many answers at once, over real sockets: each as if it had been asked alone."""

import asyncio
import http.client
import json
import math
import re
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from starlette.testclient import TestClient

from mmllm.inference.counters import MIN_TOKENS
from mmllm.inference.pipeline import load_pipeline
from mmllm.kernels import cpu as kernels
from mmllm.serving.events import EventStream
from mmllm.serving.http import HttpError
from official import write_model
from server_process import (
    BASE64,
    FOREVER,
    RealServer,
    app,
    error_of,
    post_chat,
    post_image,
    read_response,
    request_head,
    serving,
    wait_until,
    wait_until_loaded,
)


@pytest.fixture(scope="module")
def client(pipeline):
    with TestClient(app(pipeline, max_new_tokens=FOREVER, max_context=32768)) as client:
        yield wait_until_loaded(client)


def events(text: str) -> list:
    """The contents of a stream: objects, then "[DONE]"."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    return [json.loads(line) if line != "[DONE]" else line for line in lines]


def joined(content: list) -> str:
    return "".join(event.get("delta", "") for event in content[:-1])


LONG = {"max_new_tokens": 60, "temperature": 1.0, "seed": 3}


def test_a_stream_has_the_pieces_and_then_the_same_answer_as_without_it(client):
    form = {name: str(value) for name, value in LONG.items()}
    asked = [
        ("caption", lambda **more: post_image(client, **form | more)),
        ("answer", lambda **more: post_image(client, "/question", question="What?", **form | more)),
        (
            "response",
            lambda **more: post_chat(client, image_base64=BASE64, conversation_id="s", reset=True, **LONG | more),
        ),
    ]
    for name, request in asked:
        whole = request().json()
        response = request(stream="true" if name != "response" else True)
        assert response.headers["content-type"] == "text/event-stream"
        assert (response.headers["cache-control"], response.headers["x-accel-buffering"]) == ("no-cache", "no")
        *pieces, last, done = events(response.text)
        assert done == "[DONE]" and len(pieces) > 1
        assert last.pop("id") != whole.pop("id") and last == whole
        assert joined([*pieces, last, done]) == whole[name]


def test_a_streamed_turn_is_stored(client):
    post_chat(client, conversation_id="t", stream=True)
    assert post_chat(client, conversation_id="t").json()["turn"] == 2


@pytest.mark.parametrize("value", ["yes", 1, "true"])
def test_stream_is_true_or_false(client, value):
    assert error_of(post_chat(client, stream=value)) == (400, "invalid_value", "stream")
    assert (
        post_image(client, stream="maybe").status_code == 400 and post_image(client, stream="false").status_code == 200
    )


def test_an_answer_ends_before_its_stop_string(client):
    whole = post_chat(client, **LONG).json()["response"]
    stop = whole[len(whole) // 2 :][:2]
    for more in ({"stop": stop}, {"stop": ["\x01\x01", stop]}):
        content = events(post_chat(client, **LONG | more, stream=True).text)
        assert joined(content) == content[-2]["response"] == whole[: whole.index(stop)]
        assert content[-2]["finish_reason"] == "stop"


def test_a_form_may_repeat_its_stop_string(client):
    whole = post_image(client, max_new_tokens="60").json()["caption"]
    stop = whole[len(whole) // 2 :][:2]
    answer = post_image(client, max_new_tokens="60", stop=["\x01\x01", stop]).json()
    assert answer["caption"] == whole[: whole.index(stop)]


@pytest.mark.parametrize("stop", ["", [""], ["a", "b", "c", "d", "e"], "x" * 65, [1], 5, {"a": 1}, ["\ud800"]])
def test_stop_strings_are_few_and_short(client, stop):
    body = json.dumps({"message": "Hello", "stop": stop})
    response = client.post("/chat", content=body, headers={"Content-Type": "application/json"})
    code = "invalid_unicode" if stop == ["\ud800"] else "invalid_value"
    assert error_of(response) == (400, code, "stop")


def test_a_failure_before_the_first_piece_is_an_ordinary_error(client):
    assert error_of(post_chat(client, message="word " * 1500, max_new_tokens=FOREVER, stream=True))[:2] == (
        400,
        "context_length_exceeded",
    )


def test_a_later_failure_is_an_event_and_the_stream_ends(client, pipeline):
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
    wait_until(lambda: client.get("/health").json()["slots"]["busy"] == 0)
    wait_until(lambda: client.app.state.service.admitted == 0)


def test_when_the_model_thread_dies_every_request_fails(tmp_path, caplog):
    pipeline = load_pipeline(write_model(tmp_path / "model", max_position_embeddings=32768), device="cpu")
    limits = {"slots": 1, "max_new_tokens": FOREVER, "max_context": 32768}
    with TestClient(app(pipeline, **limits)) as client, ThreadPoolExecutor(3) as others:
        wait_until_loaded(client)
        waiting = [others.submit(post_chat, client, max_new_tokens=FOREVER) for _ in range(3)]
        wait_until(lambda: client.get("/health").json()["queue"]["waiting"] == 2)
        pipeline.model.language_model.model.norm = torch.nn.Linear(3, 3)  # of another shape
        assert [error_of(request.result())[:2] for request in waiting] == [(500, "engine_dead")] * 3
        assert client.get("/health").json()["status"] == "engine_dead"
        assert error_of(post_chat(client))[:2] == (503, "engine_dead")
    assert "mat1 and mat2" in caplog.text


# --- over real sockets ---


@pytest.fixture(scope="module")
def server(pipeline):
    with serving(pipeline, max_new_tokens=FOREVER, max_context=32768, slots=4) as server:
        yield server


def stream(server: RealServer, **values) -> str:
    """The whole text of a streamed answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = json.dumps({"message": "Hello", "stream": True} | values)
    connection.request("POST", "/chat", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    assert response.status == 200
    return text


def test_eight_clients_at_once_get_the_answers_they_get_alone(server):
    def request(i: int) -> str:
        values = {"message": f"word {i} " * (i + 1), "max_new_tokens": 10 + 5 * i, "seed": i}
        values |= {"image_base64": BASE64} if i % 3 == 0 else {}
        values |= {"temperature": 1.0, "top_k": 40, "top_p": 0.9} if i % 2 else {}
        if i % 4 < 2:
            return server.chat(**values)[1]["response"]
        content = events(stream(server, **values))
        assert joined(content) == content[-2]["response"]
        return content[-2]["response"]

    alone = [request(i) for i in range(8)]
    with ThreadPoolExecutor(8) as clients:
        assert list(clients.map(request, [*range(8), *range(8)])) == alone * 2
    wait_until(lambda: server.busy_and_waiting() == (0, 0))


def test_four_requests_run_side_by_side_and_a_fifth_gets_the_first_free_slot(server):
    running = [server.start_chat(temperature=1.0) for _ in range(4)]
    wait_until(lambda: server.busy_and_waiting() == (4, 0))
    fifth = server.start_chat(max_new_tokens=5)
    wait_until(lambda: server.busy_and_waiting() == (4, 1))
    running[2].close()
    assert read_response(fifth)[0] == 200
    for connection in (*running, fifth):
        connection.close()
    wait_until(lambda: server.busy_and_waiting() == (0, 0))


def test_a_client_that_leaves_a_stream_frees_its_slots(server):
    common = {"stream": True, "temperature": 1.0}
    chat = {"message": "Hello", "max_new_tokens": FOREVER}
    completions = {"messages": [{"role": "user", "content": "Hello"}], "n": 3}
    for path, slots, values in (("/chat", 1, chat), ("/v1/chat/completions", 3, completions)):
        body = json.dumps(common | values).encode()
        connection = server.send(request_head(len(body), path=path) + body)
        assert connection.recv(4000).startswith(b"HTTP/1.1 200 OK")
        wait_until(lambda slots=slots: server.busy_and_waiting() == (slots, 0))
        connection.close()
        wait_until(lambda: server.busy_and_waiting() == (0, 0))
    assert server.chat()[0] == 200


def test_a_stream_that_outlasts_the_drain_ends_with_an_error_event(pipeline):
    with serving(pipeline, drain_s=0.2, max_new_tokens=FOREVER, max_context=32768) as server:
        connection = server.start_chat(stream=True)
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
    with connection:
        text = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    assert '"code": "draining"' in text and "data: [DONE]" in text


def test_a_client_that_does_not_read_loses_its_connection_and_its_slots(pipeline, monkeypatch):
    create_server = socket.create_server

    def with_small_buffer(address: tuple[str, int]) -> socket.socket:
        listener = create_server(address)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # else the system takes megabytes
        return listener

    monkeypatch.setattr("server_process.socket.create_server", with_small_buffer)
    limits = {"max_new_tokens": FOREVER, "max_context": 32768, "body_timeout_s": 0.1}
    with serving(pipeline, **limits) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        messages = [{"role": "user", "content": "Hello"}]
        body = json.dumps({"messages": messages, "temperature": 1, "stream": True, "n": 7}).encode()
        client.sendall(request_head(len(body), path="/v1/chat/completions") + body)
        wait_until(lambda: server.busy_and_waiting() == (7, 0))
        assert server.chat()[0] == 200
        wait_until(lambda: server.busy_and_waiting() == (0, 0))
        assert server.chat()[0] == 200


@pytest.mark.skipif(not kernels.native(), reason="needs a compiler for the int8 kernels")
def test_a_stream_goes_on_while_a_long_prompt_is_read_in_pieces(folder, monkeypatch):
    monkeypatch.setattr("mmllm.serving.worker.STEP_S", 1e-9)  # each step has time for the fewest tokens
    pipeline = load_pipeline(folder, device="cpu", dtype="int8")
    with (
        serving(pipeline, max_new_tokens=FOREVER, max_context=32768) as server,
        server.start_chat(stream=True, temperature=1.0),
    ):
        wait_until(lambda: server.busy_and_waiting() == (1, 0))
        before = generated_tokens(server)
        usage = server.chat(message="word " * 400, max_new_tokens=1)[1]["usage"]
        assert usage["prompt_tokens"] > 2000
        assert generated_tokens(server) - before > 2000 / (2 * MIN_TOKENS)


def generated_tokens(server: RealServer) -> float:
    return float(re.search(r"^mmllm_generated_tokens_total (\S+)$", server.read("GET", "/metrics")[1], re.M)[1])


# --- the stream itself ---


class ConnectedClient:
    """The part of a request that an EventStream uses; the client stays connected."""

    scope = {"request_id": "1", "log": {}}

    async def receive(self) -> dict:
        await asyncio.Event().wait()
        return {}


def sent_until(text: str, work, ping_s: float = 60) -> str:
    """What a stream sends, up to the message that contains `text`."""

    async def scene() -> str:
        queue, bodies, task = asyncio.Queue(), [], asyncio.create_task(work)
        task.add_done_callback(lambda _: queue.put_nowait(None))

        async def send(message: dict) -> None:
            bodies.append(message.get("body", b"").decode())
            if text in "".join(bodies):
                raise EOFError

        with pytest.raises(EOFError):
            await EventStream(ConnectedClient(), task, queue, "", ping_s)({"log": {}}, None, send)
        return "".join(bodies)

    return asyncio.run(scene())


def test_a_stream_without_text_gets_pings():
    assert sent_until(": ping\n\n: ping\n\n", asyncio.sleep(1000), ping_s=0.01)


@pytest.mark.parametrize(
    "error, code", [(HttpError(503, "draining", "going"), "draining"), (KeyError("bug"), "internal_error")]
)
def test_a_failure_in_a_stream_has_our_own_message(error, code):
    async def work() -> dict:
        raise error

    content = events(sent_until("[DONE]", work()))
    assert content[0]["error"]["code"] == code and "bug" not in content[0]["error"]["message"]
