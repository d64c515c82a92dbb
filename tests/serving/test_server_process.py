"""A server in its own process: the curl commands of the README, broken connections, clients that leave, signals."""

import base64
import json
import select
import shutil
import signal
import socket
import subprocess

import pytest

from mmllm.kernels import cpu as kernels
from server_process import FOREVER, RealServer, encode, read_response, request_head, start_server, wait_until

pytestmark = pytest.mark.slow  # 12 s in all: a server is started four times, and silence is waited for


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "stderr"
    limits = {"slots": 1, "queue": 2, "max_new_tokens": FOREVER, "max_context": 32768, "max_body_mb": 1}
    process, port = start_server(folder, log, **limits, header_timeout_s=1, body_timeout_s=1)
    yield RealServer(port, log).wait_until_loaded()
    process.kill()
    process.wait()


def test_the_four_curl_commands_work_as_typed(server, tmp_path):
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    (tmp_path / "image.jpg").write_bytes(encode("JPEG"))
    uri = "data:image/jpeg;base64," + base64.b64encode(encode("JPEG")).decode()
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


def test_weights_are_int8_on_a_cpu_where_the_kernels_can_be_built(server):
    assert kernels.native() == ("weights in int8" in server.log.read_text())


def test_a_declared_body_above_the_limit_is_refused_before_it_is_read(server):
    for more in ((), ("Expect: 100-continue",)):
        with server.send(request_head(41_000_000, *more)) as connection:
            assert connection.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 413"
            assert "41.0 MB; the limit is 1 MB" in read_response(connection)[2]["error"]["message"]


def test_a_chunked_body_above_the_limit_is_refused(server):
    with server.send(request_head("", "Transfer-Encoding: chunked")) as connection:
        for _ in range(17):
            connection.sendall(b"10000\r\n" + bytes(65536) + b"\r\n")
        status, _, body = read_response(connection)
    assert (status, body["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("data", [b"", b"POST /chat HTTP/1.1\r\nHost: x\r\nX-Ha"])
def test_a_connection_without_a_complete_header_is_closed(server, data):
    with server.send(data) as connection:
        assert connection.recv(100) == b""


def test_a_body_that_does_not_arrive_is_a_timeout(server):
    with server.send(request_head(1000) + b'{"mess') as connection:
        status, headers, body = read_response(connection)
        assert (status, body["error"]["code"], headers["connection"]) == (408, "request_timeout", "close")
        assert connection.recv(100) == b""


def test_a_body_that_arrives_byte_by_byte_has_the_same_time(server):
    with server.send(request_head(1000) + b'{"mess') as connection:
        while not select.select([connection], [], [], 0.1)[0]:
            connection.sendall(b" ")
        assert read_response(connection)[0] == 408


def test_clients_that_send_slowly_take_no_place_from_others(server):
    slow = [server.send(request_head(1000) + b"{") for _ in range(20)]
    assert server.chat()[0] == 200
    for connection in slow:
        connection.close()


def test_a_long_answer_is_not_cut_by_the_header_timeout(server):
    status, body = server.chat(max_new_tokens=1800)  # takes longer than the header may
    assert status == 200 and body["usage"]["completion_tokens"] > 900


BOTH_LENGTHS = "Transfer-Encoding: chunked\r\nContent-Length: 2"


@pytest.mark.parametrize("header", ["X: a\0b", "Transfer-Encoding: gzip", BOTH_LENGTHS])
def test_a_request_that_is_not_plain_http_is_refused_in_the_error_shape(server, header):
    with server.send(request_head("", header) + b"2\r\n{}\r\n0\r\n\r\n") as connection:
        status, headers, body = read_response(connection)
        assert status in (400, 501) and body["error"]["code"] == "invalid_http"
        assert headers["x-request-id"] and headers["connection"] == "close"
        assert connection.recv(100) == b""


def test_bytes_after_the_body_do_not_hide_a_client_that_leaves(server):
    client = server.start_chat()
    client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    wait_until(lambda: server.busy_and_waiting() == (1, 0))
    client.close()
    wait_until(lambda: server.busy_and_waiting() == (0, 0))


def test_a_pipelined_request_is_answered_after_the_first(server):
    health = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with server.send(health + health.replace(b"1.1\r\n", b"1.1\r\nConnection: close\r\n")) as connection:
        text = b"".join(iter(lambda: connection.recv(65536), b""))
    assert text.count(b"HTTP/1.1 200") == 2


def test_a_client_that_leaves_while_sending_is_one_log_line(server):
    before = server.log.read_text()
    server.send(request_head(1000) + b'{"mess').close()
    wait_until(lambda: '"status": 499' in server.log.read_text()[len(before) :])
    assert server.log.read_text()[len(before) :].count("\n") == 1


def test_a_client_that_leaves_frees_its_slot_or_its_place_in_the_queue(server):
    served = server.start_chat()
    wait_until(lambda: server.busy_and_waiting() == (1, 0))
    waiting = server.start_chat()
    wait_until(lambda: server.busy_and_waiting() == (1, 1))
    waiting.close()
    wait_until(lambda: server.busy_and_waiting() == (1, 0))
    served.close()
    wait_until(lambda: server.busy_and_waiting() == (0, 0))
    assert server.chat()[0] == 200
    assert "Traceback" not in server.log.read_text()


def test_a_cancelled_turn_is_not_part_of_the_conversation(server):
    assert server.chat(conversation_id="cancelled")[1]["turn"] == 1
    leaving = server.start_chat(conversation_id="cancelled")
    wait_until(lambda: server.busy_and_waiting()[0] == 1)
    leaving.close()
    assert server.chat(conversation_id="cancelled")[1]["turn"] == 2


def test_beyond_the_queue_a_request_is_refused_before_its_body_with_retry_after(server):
    clients = [server.start_chat()]
    wait_until(lambda: server.busy_and_waiting() == (1, 0))
    clients += [server.start_chat(), server.start_chat()]
    wait_until(lambda: server.busy_and_waiting() == (1, 2))
    with server.send(request_head(900_000)) as connection:  # not a byte of the body is sent
        status, headers, body = read_response(connection)
    assert (status, body["error"]["code"]) == (429, "overloaded") and int(headers["retry-after"]) >= 1
    kind = {"Content-Type": "application/json"}
    assert server.call("POST", "/chat", bytes(900_000), **kind)[0] == 429  # also to a client that sends all of it first
    assert server.call("POST", "/chat", bytes(5_000_000), **kind)[0] == 429
    for connection in clients:
        connection.close()
    wait_until(lambda: server.busy_and_waiting() == (0, 0))
    assert server.chat()[0] == 200


def test_sigterm_lets_running_requests_and_streams_finish_and_exits_with_0(folder, tmp_path):
    process, port = start_server(folder, tmp_path / "log", max_new_tokens=FOREVER, max_context=32768)
    real = RealServer(port, tmp_path / "log").wait_until_loaded()
    running = real.start_chat(max_new_tokens=300)
    stream = real.start_chat(max_new_tokens=300, stream=True)
    wait_until(lambda: real.busy_and_waiting()[0] == 2)
    process.send_signal(signal.SIGTERM)
    with running, stream:
        assert read_response(running)[0] == 200
        text = b"".join(iter(lambda: stream.recv(65536), b""))
        assert text.startswith(b"HTTP/1.1 200") and b"[DONE]" in text and b'"error"' not in text
    assert process.wait(60) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()
    with pytest.raises(ConnectionRefusedError):
        real.send(b"")


def test_a_second_signal_ends_the_server_at_once_without_a_traceback(folder, tmp_path):
    process, port = start_server(folder, tmp_path / "log", max_new_tokens=FOREVER, max_context=32768)
    real = RealServer(port, tmp_path / "log").wait_until_loaded()
    with real.start_chat(), real.start_chat(stream=True):
        wait_until(lambda: real.busy_and_waiting()[0] == 2)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(OSError):
            wait_until(lambda: real.send(b"").close())  # until it no longer listens
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_model_that_cannot_be_loaded_exits_with_2(tmp_path):
    process, _ = start_server(tmp_path, tmp_path / "log")
    assert process.wait(60) == 2
    log = (tmp_path / "log").read_text()
    first, *_, last = log.splitlines()
    assert "http://127.0.0.1" in first and last.startswith("error: ") and str(tmp_path) in last
    assert "Traceback" not in log
