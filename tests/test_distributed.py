"""Several processes on one machine: the same gradient, the same run, one voice, one end."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from split_gradient import gradients, model_for
from tiny_run import write_world

from mmllm import checkpoint as disk
from mmllm.distributed import World
from mmllm.errors import UserError
from mmllm.experiment import train
from mmllm.trainer import accumulate_gradients

ALONE = World(torch.device("cpu"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def torchrun(processes: int, *command: object) -> subprocess.Popen:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.Popen(
        [*launch, *map(str, command)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(("processes", "size"), [(2, 4), (2, 2), (4, 1)])
def test_any_split_into_processes_gives_the_same_gradient(world, tmp_path, processes, size):
    """Half of the processes have nothing to learn, and the last one no picture."""
    process = torchrun(processes, ROOT / "tests" / "split_gradient.py", world.folder, tmp_path / "out", size)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    split, whole = load_file(tmp_path / "out"), gradients(ALONE, world.folder, 8)
    assert split.keys() == whole.keys()
    for name, wanted in whole.items():
        tolerance = 1e-6 if name.endswith("loss") else 1e-12  # a loss is told in float32
        assert (split[name] - wanted).norm() <= tolerance * wanted.norm(), name
    assert {name.rpartition(" ")[0] for name in whole} == {"stage 1", "full", "lora", "int8"}


def run_directory(config) -> Path:
    return Path(config.output_dir) / config.experiment_name


def start_training(processes: int, config, *arguments: str) -> subprocess.Popen:
    file = Path(config.output_dir) / "my.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    config.save(file)
    return torchrun(processes, ROOT / "train.py", file, *arguments)


def last_weights(config) -> dict[str, torch.Tensor]:
    return load_file(disk.checkpoints(run_directory(config))[-1] / "model.safetensors")


def test_two_processes_train_the_same_model_and_one_goes_on_where_they_stopped(world, tmp_path):
    alone = world.config(tmp_path / "alone")
    assert train(alone) == 0
    config = world.config(tmp_path / "both", save_steps=1, keep_checkpoints=100)
    config.data.batch_size = 1
    process = start_training(2, config)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert out.count("stage 2: 5 steps of 1 x 2 x 2 processes samples") == 1, "one voice"
    wanted, got = last_weights(alone), last_weights(config)
    assert max((got[name] - wanted[name]).abs().max().item() for name in wanted) < 1e-6
    rest = world.config(tmp_path / "rest", save_steps=1, keep_checkpoints=100)
    shutil.copytree(run_directory(config), run_directory(rest), symlinks=True)
    for checkpoint in disk.checkpoints(run_directory(rest))[7:]:
        shutil.rmtree(checkpoint)
    assert train(rest, resume="auto") == 0
    got = last_weights(rest)
    assert max((got[name] - wanted[name]).abs().max().item() for name in wanted) < 1e-6


def test_a_signal_to_one_process_saves_and_stops_them_all(world, tmp_path):
    config = world.config(tmp_path)
    config.data.batch_size = 1
    config.training.stage1.epochs = 200
    process = start_training(2, config)
    metrics = run_directory(config) / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 2:
        assert process.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "stopped by SIGTERM; saved" in out, errors
    assert disk.newest(run_directory(config)) is not None


def test_bad_input_is_told_once(world, tmp_path):
    config = world.config(tmp_path)
    config.data.train_data_path = "nowhere.json"
    process = start_training(2, config)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert errors.count("error: nowhere.json: cannot be read") == 1


def test_one_process_adds_nothing(world):
    model = model_for(world.folder, "stage 1")
    assert ALONE.sum([3, 4]) == [3, 4] and ALONE.largest(15) == 15 and ALONE.by_first(lambda: "x") == "x"
    ALONE.sum_gradients_(model.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert accumulate_gradients(model, [], targets=5) == 0


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("mmllm.distributed.choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match="torchrun started process 2 for 1 GPUs; lower --nproc_per_node"):
        World.start("auto")
