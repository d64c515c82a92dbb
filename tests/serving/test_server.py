"""How a server loads, starts, is limited and stops."""

import base64
import signal
import socket
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from starlette.testclient import TestClient

from mmllm.commands import serve
from mmllm.data.image import decode
from mmllm.errors import CheckpointError, UserError, run
from mmllm.inference.pipeline import load_pipeline
from mmllm.runtime.memory import peak_memory, return_freed_memory
from mmllm.serving.app import create_app
from mmllm.serving.server import Server
from mmllm.serving.settings import Settings
from official import write_model
from server_process import (
    BASE64,
    FOREVER,
    IMAGE,
    RealServer,
    app,
    encode,
    error_of,
    png_chunk,
    post_chat,
    post_image,
    read_response,
    request_head,
    serving,
    wait_until,
    wait_until_loaded,
)


def busy_and_waiting(client: TestClient) -> tuple[int, int]:
    health = client.get("/health").json()
    return health["slots"]["busy"], health["queue"]["waiting"]


def test_while_the_model_loads_the_server_says_so(pipeline):
    may_load = threading.Event()

    def load():
        may_load.wait()
        return pipeline

    with TestClient(create_app(load, Settings(model="models/start"))) as client:
        assert client.get("/health").status_code == 503 and client.get("/health").json()["status"] == "loading"
        response = post_chat(client)
        assert error_of(response)[:2] == (503, "loading") and response.headers["retry-after"] == "5"
        may_load.set()
        assert post_chat(wait_until_loaded(client)).status_code == 200


def test_a_model_that_does_not_load_is_reported_by_health(caplog):
    def load():
        raise CheckpointError("models/start: no such directory")

    with TestClient(create_app(load, Settings(model="models/start"))) as client:
        assert wait_until_loaded(client).get("/health").json()["status"] == "engine_dead"
        assert error_of(post_chat(client))[:2] == (503, "engine_dead")
    assert "error: models/start: no such directory" in caplog.text


def test_logits_that_are_not_finite_fail_one_request_and_not_the_server(client, pipeline):
    norm = pipeline.model.language_model.model.norm.weight
    healthy = norm.data.clone()
    norm.data.fill_(float("nan"))
    response = post_image(client)
    norm.data.copy_(healthy)
    assert error_of(response)[:2] == (500, "generation_failed")
    assert post_image(client).status_code == 200


def test_running_out_of_memory_fails_one_request_and_not_the_server(pipeline, monkeypatch):
    def encode_images(pixels_N3SS):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with TestClient(app(pipeline)) as client:
        wait_until_loaded(client)
        with monkeypatch.context() as full:
            full.setattr(pipeline.model, "encode_images", encode_images)
            response = post_image(client)
            assert error_of(response)[:2] == (503, "out_of_memory") and response.headers["retry-after"] == "5"
            assert post_chat(client).status_code == 200
        assert post_image(client).status_code == 200


def test_a_server_whose_model_fails_ends_with_1(tmp_path, caplog):
    pipeline = load_pipeline(write_model(tmp_path / "model"), device="cpu")
    settings, handler = Settings(model="outputs/tiny/best_model"), signal.getsignal(signal.SIGTERM)

    def ask(port: int) -> int:
        server = RealServer(port, None).wait_until_loaded()
        pipeline.model.language_model.model.norm = torch.nn.Linear(3, 3)  # of another shape
        return server.chat()[0]

    with serve.listen("127.0.0.1", 0) as listener, ThreadPoolExecutor(1) as others:
        status = others.submit(ask, listener.getsockname()[1])
        assert Server(create_app(lambda: pipeline, settings), settings).serve_until_signal(listener) == 1
        assert status.result() == 500
    signal.signal(signal.SIGTERM, handler)


def test_retry_after_is_the_wait_that_the_last_answers_took(pipeline):
    limits = {"slots": 1, "queue": 4, "max_new_tokens": FOREVER, "max_context": 32768}
    with serving(pipeline, **limits) as server:

        def retry_after() -> int:
            clients = [server.start_chat() for _ in range(5)]
            wait_until(lambda: server.busy_and_waiting() == (1, 4))
            with server.send(request_head(100)) as connection:
                status, headers, _ = read_response(connection)
            for client in clients:
                client.close()
            wait_until(lambda: server.busy_and_waiting() == (0, 0))
            assert status == 429
            return int(headers["retry-after"])

        assert retry_after() == 5  # before the first answer each is taken to last a second
        for _ in range(20):
            server.chat(max_new_tokens=1)
        assert retry_after() < 5


def test_an_image_that_costs_out_of_all_proportion_is_refused_or_takes_little_memory(pipeline):
    header = struct.pack(">IIBBBBB", 7000, 7000, 8, 6, 0, 0, 0)  # RGBA: 196 MB
    pixels = zlib.compress(bytes(7000 * 28_001), 1)
    large = IMAGE[:8] + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")
    many_scans = encode("JPEG") + b"\xff\xda" * 100
    with serving(pipeline) as server:
        status, body = server.chat(image_base64=base64.b64encode(many_scans).decode())
        assert (status, body["error"]["code"]) == (400, "image_too_complex")
        return_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = peak_memory(torch.device("cpu"))
        assert server.chat(image_base64=base64.b64encode(large).decode())[0] == 200
        assert peak_memory(torch.device("cpu")) - before < 300e6


def test_text_does_not_wait_behind_images(pipeline, monkeypatch):
    decoding, may_go_on = threading.Semaphore(0), threading.Event()

    def slow_decode(data, name, **options):
        decoding.release()
        may_go_on.wait()
        return decode(data, name, **options)

    monkeypatch.setattr("mmllm.serving.service.decode", slow_decode)
    with serving(pipeline) as server, ThreadPoolExecutor(2) as others:
        waiting = [others.submit(server.chat, image_base64=BASE64) for _ in range(2)]
        for _ in waiting:
            decoding.acquire()
        assert server.chat()[0] == 200
        may_go_on.set()
        assert [request.result()[0] for request in waiting] == [200, 200]


def test_an_answer_beyond_the_deadline_is_cancelled(pipeline):
    limits = {"deadline_s": 0.3, "max_new_tokens": FOREVER, "max_context": 32768}
    with TestClient(app(pipeline, **limits)) as client:
        wait_until_loaded(client)
        assert error_of(post_chat(client, max_new_tokens=FOREVER))[:2] == (504, "deadline_exceeded")
        wait_until(lambda: busy_and_waiting(client) == (0, 0))


def test_a_request_does_not_wait_longer_than_the_queue_timeout(pipeline):
    limits = {"slots": 1, "queue_timeout_s": 0.2, "max_new_tokens": FOREVER, "max_context": 32768}
    with TestClient(app(pipeline, **limits)) as client, ThreadPoolExecutor(1) as others:
        wait_until_loaded(client)
        first = others.submit(post_chat, client, max_new_tokens=FOREVER)
        wait_until(lambda: busy_and_waiting(client) == (1, 0))
        response = post_chat(client)
        assert error_of(response)[:2] == (503, "queue_timeout") and response.headers["retry-after"] == "1"
        client.app.state.service.worker.stop()
        assert error_of(first.result())[:2] == error_of(post_chat(client))[:2] == (503, "draining")
        health = client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "draining")


def test_a_conversation_takes_one_question_at_a_time(pipeline):
    limits = {"max_new_tokens": FOREVER, "max_context": 32768}
    with TestClient(app(pipeline, **limits)) as client, ThreadPoolExecutor(2) as others:
        wait_until_loaded(client)
        service = client.app.state.service
        first = others.submit(post_chat, client, conversation_id="a", max_new_tokens=FOREVER)
        wait_until(lambda: busy_and_waiting(client)[0] == 1)
        second = others.submit(post_chat, client, conversation_id="a")
        wait_until(lambda: service.conversations.locks["a"].users == 2)
        assert error_of(post_chat(client, conversation_id="a")) == (409, "conversation_busy", "conversation_id")
        service.worker.stop()
        assert error_of(first.result())[:2] == error_of(second.result())[:2] == (503, "draining")
        assert service.conversations.locks == {}


@pytest.mark.parametrize(
    "environ, named",
    [
        ({"MMLLM_QUEUE": "abc"}, "MMLLM_QUEUE is 'abc'; it must be a whole number"),
        ({"MMLLM_DEADLINE_S": "0"}, "MMLLM_DEADLINE_S is '0'; it must be above 0"),
        ({"MMLLM_DEADLINE_S": "nan"}, "MMLLM_DEADLINE_S is 'nan'"),
        ({"MMLLM_PORT": "99999"}, "MMLLM_PORT is '99999'; it must be at most 65535"),
        ({"MMLLM_DTYPE": "int3"}, "MMLLM_DTYPE is 'int3'"),
        ({"MMLLM_API_KEY": ""}, "MMLLM_API_KEY is empty or has spaces around it"),
        ({"MMLLM_API_KEY": "secret\n"}, "MMLLM_API_KEY is empty or has spaces around it"),
        ({"MMLLM_REQUIRE_KEY": "1"}, "a key is required here; set MMLLM_API_KEY"),
    ],
)
def test_a_wrong_environment_variable_is_named(environ, named):
    with pytest.raises(UserError, match=named):
        Settings.from_environment(environ)


def test_the_environment_sets_and_the_command_line_wins(monkeypatch):
    monkeypatch.setenv("MMLLM_PORT", "9000")
    monkeypatch.setenv("MMLLM_QUEUE", "3")
    settings = serve.settings_for({"model": "user/model", "port": 9001})
    assert (settings.port, settings.queue, settings.model_name) == (9001, 3, "user/model")


@pytest.mark.parametrize("model, name", [("/home/someone/cat", "cat"), ("/x/demo/best_model", "demo/best_model")])
def test_the_model_name_does_not_show_paths_of_the_machine(model, name):
    assert Settings(model=model).model_name == name


def test_a_taken_port_is_reported_before_the_model_loads(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as left:
            run(lambda: serve.main(["--model", "/nowhere", "--port", str(port)]))
    assert left.value.code == 1
    assert capsys.readouterr().err == f"error: port {port} is taken; choose another one, such as --port {port + 1}\n"


def test_an_address_that_cannot_be_bound_is_bad_input():
    with pytest.raises(UserError, match="cannot listen on 203.0.113.1 port 8000"):
        serve.listen("203.0.113.1", 8000)
