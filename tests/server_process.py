"""What the tests of the server share: an application in this process, a real server in another, ways to speak with both."""

import base64
import http.client
import io
import json
import socket
import subprocess
import sys
import time

from PIL import Image
from starlette.testclient import TestClient

from conftest import ROOT
from mmllm.serving.app import create_app
from mmllm.serving.settings import Settings

FOREVER = 30_000  # tokens: more than a minute of work for the small model


def encoded(kind: str = "PNG", image: Image.Image | None = None, **options) -> bytes:
    file = io.BytesIO()
    (image or Image.radial_gradient("L").convert("RGB")).save(file, kind, **options)
    return file.getvalue()


PICTURE = encoded()
BASE64 = base64.b64encode(PICTURE).decode()


def until(condition, seconds: float = 10) -> float:
    """Seconds that it took `condition` to come true."""
    start = time.perf_counter()
    while not condition():
        assert time.perf_counter() - start < seconds, "it did not happen"
        time.sleep(0.01)
    return time.perf_counter() - start


def app(pipeline, **settings):
    return create_app(lambda: pipeline, Settings(model="outputs/tiny/best_model", **settings))


def ready(client: TestClient) -> TestClient:
    while client.get("/health").json()["status"] == "loading":
        time.sleep(0.01)
    return client


def ask(client: TestClient, path: str = "/caption", image: bytes = PICTURE, **fields):
    return client.post(path, files={"image": ("x.png", image)}, data={"max_new_tokens": "5"} | fields)


def say(client: TestClient, **values):
    return client.post("/chat", json={"message": "Hello", "max_new_tokens": 5} | values)


def fault(response) -> tuple[int, str, str | None]:
    """Status, code and field of an error, which must have the one shape that all errors have."""
    error = response.json()["error"]
    assert response.headers["content-type"] == "application/json" and response.headers["x-request-id"]
    assert list(error) == ["message", "type", "param", "code"]
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    default = "server_error" if response.status_code >= 500 else "invalid_request_error"
    assert error["type"] == kinds.get(response.status_code, default)
    assert "0x" not in error["message"] and "\n" not in error["message"] and "Traceback" not in error["message"]
    return response.status_code, error["code"], error["param"]


def start(folder, log, **environ) -> tuple[subprocess.Popen, int]:
    """The process and its port, once it listens."""
    command = [sys.executable, "serve.py", "--model", str(folder), "--port", "0", "--device", "cpu"]
    settings = {f"MMLLM_{name.upper()}": str(value) for name, value in environ.items()}
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command, cwd=ROOT, stderr=stderr, env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"} | settings
        )
    until(lambda: "http://" in log.read_text() or process.poll() is not None, 60)
    return process, int(log.read_text().partition("127.0.0.1:")[2].partition(" ")[0])


class Real:
    """A running server, and the raw ways to speak with it."""

    def __init__(self, port: int, log):
        self.port, self.log = port, log

    def call(self, method: str, path: str, body: bytes | None = None, **headers) -> tuple[int, dict]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        body = json.loads(response.read())
        connection.close()
        return response.status, body

    def chat(self, **values) -> tuple[int, dict]:
        body = json.dumps({"message": "Hello", "max_new_tokens": 5} | values).encode()
        return self.call("POST", "/chat", body, **{"Content-Type": "application/json"})

    def begin(self, **values) -> socket.socket:
        """A question whose answer nobody has read yet."""
        body = json.dumps({"message": "Hello", "max_new_tokens": FOREVER} | values)
        head = (
            f"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return self.send((head + body).encode())

    def send(self, data: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        connection.sendall(data)
        return connection

    def state(self) -> tuple[int, int]:
        health = self.call("GET", "/health")[1]
        return health["slots"]["busy"], health["queue"]["waiting"]


def answer(connection: socket.socket) -> tuple[int, http.client.HTTPMessage, dict]:
    """Status, headers and body of what the server sends back."""
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, response.headers, json.loads(response.read())


def head(length: int | str, *more: str, path: str = "/chat") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *more]
    lines += [f"Content-Length: {length}"] if length != "" else []
    return ("\r\n".join(lines) + "\r\n\r\n").encode()
