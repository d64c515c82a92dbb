"""Names of the Hugging Face hub: downloaded once, and found again whatever the network does."""

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import close_session, constants

from mmllm.errors import CheckpointError
from mmllm.storage.hub import cached_file, locate
from mmllm.storage.weights import read_tensors
from official import write_clip, write_qwen

LOGIN_PAGE = b"<!DOCTYPE html><html><body>Accept our conditions</body></html>"


class Hub(BaseHTTPRequestHandler):
    """The few addresses of the hub that a download asks for, over the files of one folder; or one of its `moods`."""

    folder: Path
    sha = "0" * 40
    mood = "well"

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path = self.path.partition("?")[0]
        self.asked.append((self.command, path))
        files = {file.name: file for file in self.folder.iterdir()}
        name = path.rpartition("/")[2]
        if self.mood == "drops the connection" or (self.mood == "drops weights" and name == "model.safetensors"):
            self.connection.close()
        elif self.mood == "garbage":
            self.wfile.write(b"\x00\x01\x02\r\n\r\n")
            self.connection.close()
        elif self.mood == "login page":
            self.send(LOGIN_PAGE, "text/html")
        elif self.mood.isdigit():
            self.send(b"", "text/plain", int(self.mood))
        elif path.startswith("/api/models/org/tiny/tree/"):
            sizes = [{"type": "file", "path": n, "size": f.stat().st_size, "oid": "0"} for n, f in files.items()]
            self.send(json.dumps(sizes).encode(), "application/json")
        elif path.startswith("/api/models/org/tiny"):
            siblings = [{"rfilename": name} for name in files]
            about = {"id": "org/tiny", "sha": self.sha, "siblings": siblings}
            self.send(json.dumps(about).encode(), "application/json")
        elif path.startswith("/org/tiny/resolve/") and name in files:
            self.send(files[name].read_bytes(), "application/octet-stream")
        else:
            self.send_error(404)

    def send(self, body: bytes, kind: str, status: int = 200):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"' + self.sha + self.path.rpartition("/")[2] + '"')
        self.send_header("X-Repo-Commit", self.sha)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        """No line per request."""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server of one folder, which is the hub for this test."""
    folder = tmp_path / "hub"
    folder.mkdir()
    handler = type("Handler", (Hub,), {"folder": folder, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    yield handler
    close_session()
    server.shutdown()
    server.server_close()


def test_a_repository_is_downloaded_once_and_only_the_files_that_are_read(hub):
    write_qwen(hub.folder)
    for name in ("pytorch_model.bin", "vocab.json", "merges.txt", "generation_config.json", "README.md"):
        (hub.folder / name).write_bytes(b"not needed")
    found = locate("org/tiny")
    assert sorted(path.name for path in found.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (found / "model.safetensors").read_bytes() == (hub.folder / "model.safetensors").read_bytes()
    assert locate("org/tiny") == found
    bodies = [path for method, path in hub.asked if method == "GET" and "/resolve/" in path]
    assert len(bodies) == len(set(bodies)) == 3


def test_a_revision_is_asked_for_by_its_name(hub):
    write_qwen(hub.folder)
    locate("org/tiny@refs/pr/15")
    assert any(path.endswith("/revision/refs%2Fpr%2F15") for _, path in hub.asked)


def test_the_pickled_file_is_downloaded_where_there_is_no_safetensors(hub):
    write_clip(hub.folder)
    torch.save(read_tensors(hub.folder), hub.folder / "pytorch_model.bin")
    (hub.folder / "model.safetensors").unlink()
    assert (locate("org/tiny") / "pytorch_model.bin").is_file()


def test_a_plan_needs_no_weights_and_asks_only_once(hub):
    write_qwen(hub.folder)
    assert cached_file("org/tiny", "tokenizer.json") is None
    folder = locate("org/tiny", weights=False)
    assert not (folder / "model.safetensors").exists()
    asked = len(hub.asked)
    assert locate("org/tiny", weights=False) == folder and len(hub.asked) == asked
    assert cached_file("org/tiny", "tokenizer.json") == folder / "tokenizer.json"


MOODS = {
    "drops the connection": "RemoteProtocolError",
    "garbage": "RemoteProtocolError",
    "login page": "is there a login page of the network in between",
    "401": "HTTP 401, there is no such repository, or it is private",
    "403": "HTTP 403, access is refused; accept the model's licence",
    "404": "HTTP 404, there is no such repository or revision",
    "407": "HTTP 407, the proxy wants a login",
    "429": "HTTP 429, too many requests",
    "500": "HTTP 500, try again later",
}


@pytest.mark.parametrize(("mood", "named"), MOODS.items())
def test_an_earlier_download_is_used_whatever_fails_and_without_one_the_reason_is_told(hub, mood, named):
    hub.mood = mood
    with pytest.raises(CheckpointError, match=named) as caught:
        locate("org/tiny")
    assert "\n" not in str(caught.value)
    hub.mood = "well"
    write_qwen(hub.folder)
    found = locate("org/tiny")
    hub.mood = mood
    assert locate("org/tiny") == found


@pytest.mark.parametrize("status", ["403 Forbidden", "407 Proxy Authentication Required"])
def test_a_proxy_that_refuses_is_told_apart_from_the_hub(hub, monkeypatch, status):
    monkeypatch.setenv("HTTPS_PROXY", constants.ENDPOINT)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    close_session()
    hub.do_CONNECT = lambda request: request.send_error(int(status[:3]), status[4:])
    with pytest.raises(CheckpointError, match=f"the proxy answers {status}; see HTTPS_PROXY"):
        locate("org/tiny")


def test_a_newer_commit_that_cannot_be_downloaded_leaves_the_older_one_in_use(hub, capsys, monkeypatch):
    write_qwen(hub.folder)
    found = locate("org/tiny")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the attempts of the hub library
    hub.sha, hub.mood = "1" * 40, "drops weights"
    assert locate("org/tiny") == found
    assert "warning: org/tiny: the earlier download 00000000 is used" in capsys.readouterr().err


def test_a_repository_without_weights_is_refused(hub):
    write_qwen(hub.folder)
    (hub.folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="it has no weights in a format that is read here"):
        locate("org/tiny")


def test_an_offline_hub_says_so(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        locate("org/tiny")


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("./nothing", "no such folder"),
        ("a/b/c", "no such folder"),
        ("nothing", "no such folder"),
        (__file__, "a file; name"),
    ],
)
def test_a_source_that_is_not_a_folder_is_refused(source, named):
    with pytest.raises(CheckpointError, match=named):
        locate(source)


@pytest.mark.parametrize(
    "name", ["runs/a--b", "runs/a..b", "runs/a.git", "runs/a.git@main", "runs/a-", "runs-/a", "r/" + "a" * 97]
)
def test_a_path_that_is_no_name_of_the_hub_is_a_missing_folder(name):
    with pytest.raises(CheckpointError, match="no such folder"):
        locate(name)
    assert cached_file(name, "config.json") is None
