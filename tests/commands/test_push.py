"""`mmllm push`: the folder that is uploaded, and the upload to a hub that runs here."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from peft import AutoPeftModel

from mmllm.commands import push
from mmllm.errors import RunError, UserError
from mmllm.models.multimodal import MultimodalLLM
from official import add_adapters, write_model

SCORES = {"captions": {"count": 20, "bleu_4": 0.25, "cider": 0.8125}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory as training and evaluation leave it."""
    run = tmp_path_factory.mktemp("runs") / "own"
    write_model(run / "best_model")
    (run / "best_model" / "manifest.json").write_text("{}")
    (run / "best_model" / "training").mkdir()
    (run / "best_model" / "training" / "optimizer.safetensors").write_bytes(b"0" * 100)
    settings = {"model": {"clip": "openai/clip-vit-base-patch32", "qwen": str(run), "pretrained": None}}
    (run / "experiment.json").write_text(json.dumps(settings))
    start = {
        "command": "python -m mmllm train own",
        "time": "2026-11-27T03:36:50+00:00",
        "data": ["train: 450 images"],
        "device": "cpu",
        "commit": "abc1234",
        "versions": {"torch": "2.13.0"},
    }
    (run / "run.json").write_text(json.dumps({"starts": [start]}))
    scores = {"model": "m", "data": "val.json", "scores": {"true images": SCORES}}
    (run / "evaluation" / "val").mkdir(parents=True)
    (run / "evaluation" / "val" / "scores.json").write_text(json.dumps(scores))
    return run


class Hub(BaseHTTPRequestHandler):
    """The requests of an upload without large files; `server.files` is what arrived."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.status != 200:
            return self.answer({"error": "no"}, self.server.status)
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            return self.answer({"url": "https://huggingface.co/me/own"})
        if self.path == "/api/validate-yaml":  # the head of the card
            self.server.card = json.loads(body)["content"]
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return self.answer(
                {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
            )
        for line in body.decode().splitlines():
            row = json.loads(line)
            if row["key"] == "file":
                self.server.files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
        return self.answer(
            {
                "success": True,
                "commitOid": "c0ffee",
                "commitUrl": "https://huggingface.co/me/own/commit/" + "c0ffee" * 7,
            }
        )

    def do_GET(self):
        self.answer({"id": "me/own", "sha": "0" * 40, "siblings": []})

    def answer(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        """Nothing is printed."""


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.status = {}, 200
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()
    server.server_close()


def test_the_folder_has_the_model_and_a_card_but_no_state_of_training(run, tmp_path):
    push.main([str(run / "best_model"), "me/own", "--out", str(tmp_path / "hub"), "--license", "apache-2.0"])
    MultimodalLLM.from_pretrained(tmp_path / "hub")
    names = {file.name for file in (tmp_path / "hub").iterdir()}
    assert {"README.md", "model.safetensors", "config.json"} <= names and not {"manifest.json", "training"} & names
    card = (tmp_path / "hub" / "README.md").read_text()
    head, text = card.removeprefix("---\n").split("---\n", 1)
    assert "license: apache-2.0\n" in head and "base_model:\n- openai/clip-vit-base-patch32\n" in head
    assert str(run) not in card, "a local path says nothing to others"
    for words in ("# me/own", "python -m mmllm train own", "train: 450 images", "commit abc1234", "0.812"):
        assert words in text, words


def test_the_card_says_where_nothing_was_measured(tmp_path):
    write_model(tmp_path / "model")
    push.main([str(tmp_path / "model"), "me/own", "--out", str(tmp_path / "hub")])
    assert "Not measured." in (tmp_path / "hub" / "README.md").read_text()


def test_the_hub_gets_every_file(run, hub, capsys):
    push.main([str(run / "best_model"), "me/own", "--private"])
    assert hub.created["name"] == "own" and hub.created["visibility"] == "private"
    sent = {file.name for file in (run / "best_model").iterdir() if file.is_file()} - {"manifest.json"}
    assert set(hub.files) == sent | {"README.md"}
    weights = (run / "best_model" / "model.safetensors").read_bytes()
    assert hub.files["model.safetensors"] == weights
    assert hub.card.startswith("---\nlicense: other\n")
    assert "commit/c0ffee" in capsys.readouterr().err
    assert not list(run.glob(".push-*"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # by peft
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # by transformers
def test_auto_peft_loads_a_pushed_model_with_adapters(tmp_path, monkeypatch):
    folder = add_adapters(write_model(tmp_path / "base"), tmp_path / "adapted")
    monkeypatch.chdir(tmp_path)
    push.main([str(folder), "me/own", "--out", "me/own"])  # a path of the repository's name stands for the hub
    theirs, ours = AutoPeftModel.from_pretrained("me/own").eval(), MultimodalLLM.from_pretrained(folder)
    ids = torch.arange(1, 40).remainder(250)[None]
    with torch.no_grad():
        wanted = ours.logits(ids, torch.empty(0, 3, 32, 32))
        torch.testing.assert_close(theirs(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)


def test_a_hub_that_refuses_is_one_line_with_the_reason(run, hub):
    hub.status = 401
    with pytest.raises(RunError, match="me/own: not uploaded: HTTP 401, .*log in with"):
        push.main([str(run / "best_model"), "me/own"])
    assert not list(run.glob(".push-*"))


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a model directory"):
        push.main([str(tmp_path), "me/own"])
