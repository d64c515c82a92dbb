"""What the tests of the server share: an application in this process, a server in another, and clients of both."""

import base64
import http.client
import io
import json
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from contextlib import contextmanager

from PIL import Image
from starlette.testclient import TestClient

from conftest import ROOT
from mmllm.serving.app import create_app
from mmllm.serving.server import Server
from mmllm.serving.settings import Settings

FOREVER = 30_000  # tokens: about a minute of work for the small model


def encode(kind: str = "PNG", image: Image.Image | None = None, **options) -> bytes:
    file = io.BytesIO()
    (image or Image.radial_gradient("L").convert("RGB")).save(file, kind, **options)
    return file.getvalue()


IMAGE = encode()
BASE64 = base64.b64encode(IMAGE).decode()


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def wait_until(condition, seconds: float = 60) -> None:
    start = time.perf_counter()
    while not condition():
        assert time.perf_counter() - start < seconds, "it did not happen"
        time.sleep(0.01)


def app(pipeline, **settings):
    return create_app(lambda: pipeline, Settings(model="outputs/tiny/best_model", **settings))


def wait_until_loaded(client: TestClient) -> TestClient:
    while client.get("/health").json()["status"] == "loading":
        time.sleep(0.01)
    return client


def post_image(client: TestClient, path: str = "/caption", image: bytes = IMAGE, **fields):
    return client.post(path, files={"image": ("x.png", image)}, data={"max_new_tokens": "5"} | fields)


def post_chat(client: TestClient, **values):
    return client.post("/chat", json={"message": "Hello", "max_new_tokens": 5} | values)


def error_of(response) -> tuple[int, str, str | None]:
    """Status, code and field of an error, after checking that it has the shape of all errors."""
    error = response.json()["error"]
    assert response.headers["content-type"] == "application/json" and response.headers["x-request-id"]
    assert list(error) == ["message", "type", "param", "code"]
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    default = "server_error" if response.status_code >= 500 else "invalid_request_error"
    assert error["type"] == kinds.get(response.status_code, default)
    assert "0x" not in error["message"] and "\n" not in error["message"] and "Traceback" not in error["message"]
    return response.status_code, error["code"], error["param"]


def start_server(folder, log, **environ) -> tuple[subprocess.Popen, int]:
    """The process and its port, once it listens; the model may still be loading."""
    command = [sys.executable, "serve.py", "--model", str(folder), "--port", "0", "--device", "cpu"]
    settings = {f"MMLLM_{name.upper()}": str(value) for name, value in environ.items()}
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command, cwd=ROOT, stderr=stderr, env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"} | settings
        )
    wait_until(lambda: "http://" in log.read_text() or process.poll() is not None)
    return process, int(log.read_text().partition("127.0.0.1:")[2].partition(" ")[0])


@contextmanager
def serving(pipeline, **settings):
    """A server on a real socket, in a thread."""
    settings = Settings(model="outputs/tiny/best_model", **settings)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(create_app(lambda: pipeline, settings), settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield RealServer(listener.getsockname()[1], None).wait_until_loaded()
        finally:
            server.should_exit = True
            thread.join()


class RealServer:
    """A client of a server in another process or thread."""

    def __init__(self, port: int, log):
        self.port, self.log = port, log

    def call(self, method: str, path: str, body: bytes | None = None, **headers) -> tuple[int, dict]:
        status, text = self.read(method, path, body, **headers)
        return status, json.loads(text)

    def read(self, method: str, path: str, body: bytes | None = None, **headers) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, text

    def chat(self, **values) -> tuple[int, dict]:
        body = json.dumps({"message": "Hello", "max_new_tokens": 5} | values).encode()
        return self.call("POST", "/chat", body, **{"Content-Type": "application/json"})

    def start_chat(self, **values) -> socket.socket:
        """Sends a question and does not wait for the answer."""
        body = json.dumps({"message": "Hello", "max_new_tokens": FOREVER} | values)
        head = (
            f"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return self.send((head + body).encode())

    def send(self, data: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(data)
        return connection

    def wait_until_loaded(self) -> "RealServer":
        wait_until(lambda: self.call("GET", "/health")[1]["status"] == "ok")
        return self

    def busy_and_waiting(self) -> tuple[int, int]:
        health = self.call("GET", "/health")[1]
        return health["slots"]["busy"], health["queue"]["waiting"]


def read_response(connection: socket.socket) -> tuple[int, http.client.HTTPMessage, dict]:
    """Status, headers and body of the response."""
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, response.headers, json.loads(response.read())


def request_head(length: int | str, *more: str, path: str = "/chat") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *more]
    lines += [f"Content-Length: {length}"] if length != "" else []
    return ("\r\n".join(lines) + "\r\n\r\n").encode()
