"""The Ray example, on a local Ray of two workers of which one is killed."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT
from mmllm.inference.pipeline import load_pipeline
from mmllm.inference.request import GenerationConfig
from official import write_model

pytest.importorskip("ray", reason="ray is not installed")


@pytest.mark.slow
def test_two_workers_caption_a_folder_although_one_is_killed(tmp_path):
    write_model(tmp_path / "model")
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(60):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(
            tmp_path / "photos" / f"{number:02}.png"
        )
    (tmp_path / "photos" / "bad.png").write_text("no image")
    command = [sys.executable, "-m", "examples.caption_with_ray", "photos", "--model", "model", "--out", "out"]
    options = ["--workers", "2", "--cpus", "0.5", "--batch-size", "4", "--max-new-tokens", "5"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_DEDUP_LOGS": "0"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, *options], cwd=tmp_path, env=environment, stdout=log, stderr=log)
        killed = None
        while process.poll() is None:
            if killed is None and (workers := captioners()):
                killed = workers[0]
                os.kill(killed, signal.SIGKILL)
            time.sleep(0.05)
    assert process.returncode == 0, (tmp_path / "log").read_text()
    assert killed is not None
    lines = [line for file in (tmp_path / "out").glob("*.json") for line in file.read_text().split("\n") if line]
    rows = {row["image"]: row for row in map(json.loads, lines)}
    assert len(rows) == len(lines) == 61 and rows["bad.png"]["error"]
    pipeline = load_pipeline(tmp_path / "model", device="cpu", dtype="int8")
    for name in ("00.png", "37.png"):
        wanted = pipeline.caption_image(tmp_path / "photos" / name, config=GenerationConfig(max_new_tokens=5))
        assert rows[name]["caption"] == wanted.strip()


def captioners() -> list[int]:
    """The processes of Ray that hold or run the captioner, by their titles."""
    found = []
    for folder in os.listdir("/proc"):
        if folder.isdecimal():
            try:
                title = open(f"/proc/{folder}/cmdline", "rb").read()  # noqa: SIM115
            except OSError:
                continue
            if title.startswith(b"ray::") and b"Captioner" in title:
                found.append(int(folder))
    return found
