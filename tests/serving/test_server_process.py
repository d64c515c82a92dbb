"""A real server, in a process of its own: the four curl lines, broken connections, clients who leave, signals."""

import base64
import json
import shutil
import signal
import socket
import subprocess
import time

import pytest

from official import write_model
from server_process import FOREVER, Real, answer, encoded, head, start, until


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("served"), max_position_embeddings=32768)


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "stderr"
    limits = {"slots": 1, "queue": 2, "max_new_tokens": FOREVER, "max_context": 32768, "max_body_mb": 1}
    process, port = start(folder, log, **limits, header_timeout_s=0.5, body_timeout_s=0.5)
    real = Real(port, log)
    until(lambda: real.call("GET", "/health")[1]["status"] == "ok", 60)
    yield real
    process.kill()
    process.wait()


def test_the_four_curl_lines_are_answered_as_they_are_typed(server, tmp_path):
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    (tmp_path / "image.jpg").write_bytes(encoded("JPEG"))
    uri = "data:image/jpeg;base64," + base64.b64encode(encoded("JPEG")).decode()
    lines = [
        'curl -X POST "http://localhost:8000/caption" -F "image=@image.jpg" -F "prompt=Describe this image" '
        '-F "max_new_tokens=100"',
        'curl -X POST "http://localhost:8000/question" -F "image=@image.jpg" -F "question=What color is the car?"',
        'curl -X POST "http://localhost:8000/chat" -H "Content-Type: application/json" '
        f"""-d '{{"message": "What do you see?", "image_base64": "{uri}", "conversation_id": "user123"}}'""",
        "curl http://localhost:8000/health",
    ]
    for line, name in zip(lines, ("caption", "answer", "response", "status"), strict=True):
        command = line.replace("localhost:8000", f"localhost:{server.port}")
        result = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, check=True)
        assert isinstance(json.loads(result.stdout)[name], str)


def test_a_declared_body_above_the_limit_is_refused_before_a_byte_of_it(server):
    for more in ((), ("Expect: 100-continue",)):
        with server.send(head(41_000_000, *more)) as connection:
            assert connection.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 413"
            assert "41.0 MB; the limit is 1 MB" in answer(connection)[2]["error"]["message"]


def test_a_chunked_body_above_the_limit_is_refused(server):
    with server.send(head("", "Transfer-Encoding: chunked")) as connection:
        for _ in range(17):
            connection.sendall(b"10000\r\n" + bytes(65536) + b"\r\n")
        status, _, body = answer(connection)
    assert (status, body["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("data", [b"", b"POST /chat HTTP/1.1\r\nHost: x\r\nX-Ha"])
def test_a_header_that_does_not_end_is_not_waited_for(server, data):
    with server.send(data) as connection:
        begun = time.perf_counter()
        assert connection.recv(100) == b""
        assert 0.3 < time.perf_counter() - begun < 2


def test_a_body_that_does_not_come_is_not_waited_for(server):
    with server.send(head(1000) + b'{"mess') as connection:
        status, headers, body = answer(connection)
        assert (status, body["error"]["code"], headers["connection"]) == (408, "request_timeout", "close")
        assert connection.recv(100) == b""


def test_a_long_answer_is_not_mistaken_for_a_slow_header(server):
    status, body = server.chat(max_new_tokens=800)  # longer than the header's half second
    assert status == 200 and body["usage"]["completion_tokens"] > 400


@pytest.mark.parametrize("header", ["X: a\0b", "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"])
def test_a_header_that_is_no_http_is_refused(server, header):
    with server.send(head(2, header) + b"{}") as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 400")


def test_a_client_that_leaves_while_it_sends_leaves_one_line_in_the_log(server):
    before = server.log.read_text()
    server.send(head(1000) + b'{"mess').close()
    until(lambda: '"status": 499' in server.log.read_text()[len(before) :])
    assert server.log.read_text()[len(before) :].count("\n") == 1


def test_a_client_that_leaves_frees_the_model_whether_it_waited_or_was_served(server):
    served = server.begin()
    until(lambda: server.state() == (1, 0))
    waiting = server.begin()
    until(lambda: server.state() == (1, 1))
    waiting.close()
    assert until(lambda: server.state() == (1, 0)) < 0.5
    served.close()
    assert until(lambda: server.state() == (0, 0)) < 0.5
    assert server.chat()[0] == 200
    assert "Traceback" not in server.log.read_text()


def test_a_turn_that_was_given_up_is_not_part_of_the_conversation(server):
    assert server.chat(conversation_id="given-up")[1]["turn"] == 1
    leaving = server.begin(conversation_id="given-up")
    until(lambda: server.state()[0] == 1)
    leaving.close()
    assert server.chat(conversation_id="given-up")[1]["turn"] == 2


def test_beyond_the_queue_a_request_is_refused_at_once_and_told_when_to_come_back(server):
    patient = [server.begin()]
    until(lambda: server.state() == (1, 0))
    patient += [server.begin(), server.begin()]
    until(lambda: server.state() == (1, 2))
    begun = time.perf_counter()
    with server.send(head(900_000)) as connection:  # not a byte of the body is sent
        status, headers, body = answer(connection)
    assert time.perf_counter() - begun < 0.5
    assert (status, body["error"]["code"]) == (429, "overloaded") and int(headers["retry-after"]) >= 1
    for connection in patient:
        connection.close()
    until(lambda: server.state() == (0, 0))
    assert server.chat()[0] == 200


def test_a_signal_lets_the_running_request_finish_and_ends_with_0(folder, tmp_path):
    process, port = start(folder, tmp_path / "log")
    real = Real(port, tmp_path / "log")
    until(lambda: real.call("GET", "/health")[1]["status"] == "ok", 60)
    running = real.begin(max_new_tokens=400)
    until(lambda: real.state()[0] == 1)
    process.send_signal(signal.SIGTERM)
    with running:
        assert answer(running)[0] == 200
    assert process.wait(10) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()
    with pytest.raises(ConnectionRefusedError):
        real.send(b"")


def test_a_model_that_cannot_be_loaded_ends_the_server_with_2(tmp_path):
    process, _ = start(tmp_path, tmp_path / "log")
    assert process.wait(60) == 2
    first, *rest = (tmp_path / "log").read_text().splitlines()
    assert "http://127.0.0.1" in first and len(rest) == 1 and rest[0].startswith("error: ") and str(tmp_path) in rest[0]
