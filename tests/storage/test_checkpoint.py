"""Checkpoints are whole or they are not used; what they hold comes back bit for bit."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from mmllm.errors import CheckpointError, RunError
from mmllm.runtime.distributed import ALONE
from mmllm.storage import checkpoint as disk
from mmllm.storage.checkpoint_writer import CheckpointWriter
from mmllm.training.step import adamw


class Model(nn.Linear):
    """Two trained tensors, one frozen, and the two methods that a checkpoint asks of a model."""

    def __init__(self):
        super().__init__(3, 2)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def tensor_files(self):
        return {"model.safetensors": self.state_dict()}

    def write_small_files(self, folder):
        (folder / "config.json").write_text("{}")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def optimizer_of(model):
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "peak": 0.1, "weight_decay": 0.0}]
    return adamw(groups, 0.9, 0.95)


def step(model, optimizer):
    (model(torch.ones(1, 3)) ** 2).sum().backward()
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    optimizer.zero_grad()


def save(directory, model, number, optimizer=None):
    folder = directory / disk.checkpoint_name(1, number)
    with CheckpointWriter(ALONE) as writer:
        writer.begin(folder, model, optimizer or optimizer_of(model), {"step": number, "config": {"seed": 0}})
        writer.wait()
    return folder


def damage(checkpoint, how):
    file = checkpoint / "training" / "optimizer.safetensors"
    content = file.read_bytes()
    if how == "truncated":
        file.write_bytes(content[:-1])
    elif how == "flipped":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "missing":
        file.unlink()
    elif how == "no manifest":
        (checkpoint / "manifest.json").unlink()
    elif how == "empty manifest":
        (checkpoint / "manifest.json").write_text("")
    elif how == "other manifest":
        (checkpoint / "manifest.json").write_text("{}")


def test_the_moments_come_back_bit_for_bit_and_the_next_step_is_the_same(model, tmp_path):
    optimizer = optimizer_of(model)
    for _ in range(3):
        step(model, optimizer)
    folder = save(tmp_path, model, 3, optimizer)
    twin = Model()
    twin.load_state_dict(model.state_dict())
    other = optimizer_of(twin)
    disk.load_optimizer_(folder, twin, other, disk.read_state(folder)["updates"], ALONE)
    step(model, optimizer)
    step(twin, other)
    assert torch.equal(model.weight, twin.weight) and torch.equal(model.bias, twin.bias)
    assert all(torch.equal(optimizer.state[model.weight][m], other.state[twin.weight][m]) for m in disk.MOMENTS)


def test_a_checkpoint_holds_no_pickle_and_lists_every_file(model, tmp_path):
    folder = save(tmp_path, model, 1)
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found - {"manifest.json"} == listed.keys()
    assert {path.rpartition(".")[2] for path in found} == {"safetensors", "json"}


def test_the_state_is_what_was_given(model, tmp_path):
    folder = save(tmp_path, model, 7)
    assert disk.read_state(folder) == {"step": 7, "config": {"seed": 0}, "format": 1, "updates": 0}
    assert json.loads((folder / "training" / "experiment.json").read_text()) == {"seed": 0}


@pytest.mark.parametrize(
    "how, words",
    [
        ("truncated", "bytes, .* were written"),
        ("flipped", "checksum"),
        ("missing", "missing, but the manifest lists it"),
        ("no manifest", "no such file; this checkpoint was not written to its end"),
        ("empty manifest", "not JSON; the file is damaged"),
        ("other manifest", "manifest.json: format is missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_with_its_reason_and_the_one_before_is_used(model, tmp_path, capsys, how, words):
    good, bad = save(tmp_path, model, 9), save(tmp_path, model, 10)
    damage(bad, how)
    with pytest.raises(CheckpointError, match=words):
        disk.verify(bad)
    assert disk.newest(tmp_path) == good
    warnings = capsys.readouterr().out.splitlines()
    assert len(warnings) == 1
    assert warnings[0].startswith(f"warning: {bad}")


def test_the_newest_is_that_of_the_highest_step_not_of_the_last_name(model, tmp_path):
    for number in (9, 10, 100):
        save(tmp_path, model, number)
    assert disk.newest(tmp_path).name == "checkpoint-epoch-1-step-100"


def test_a_directory_without_checkpoints_has_no_newest(tmp_path):
    (tmp_path / "checkpoint-notes").mkdir()
    assert disk.newest(tmp_path) is None


def test_pruning_keeps_the_newest_and_the_best(model, tmp_path):
    for number in (1, 2, 3, 4):
        save(tmp_path, model, number)
    disk.prune(tmp_path, keep=2, best="checkpoint-epoch-1-step-1")
    assert [disk.step_of(path) for path in disk.checkpoints(tmp_path)] == [1, 3, 4]
    assert not list(tmp_path.glob(".*"))


def test_best_model_names_one_checkpoint_and_can_change(tmp_path):
    for name in ("checkpoint-epoch-1-step-1", "checkpoint-epoch-1-step-2"):
        (tmp_path / name).mkdir()
        disk.point_best(tmp_path, name)
        assert (tmp_path / "best_model").resolve().name == name


@pytest.mark.parametrize("has_hard_links", [True, False])
def test_without_symbolic_links_best_model_is_a_copy_made_once(model, tmp_path, monkeypatch, has_hard_links):
    first, second = save(tmp_path, model, 1), save(tmp_path, model, 2)
    disk.point_best(tmp_path, second.name)  # a link, of a time when the disk had them

    def refuse(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    with monkeypatch.context() as drive:
        drive.setattr(Path, "symlink_to", refuse)
        if not has_hard_links:
            drive.setattr(os, "link", refuse)
        for checkpoint in (first, second):
            disk.point_best(tmp_path, checkpoint.name)
            assert not (tmp_path / "best_model").is_symlink()
            assert disk.is_copy(tmp_path / "best_model", checkpoint)
            assert not (tmp_path / "best_model" / "training").exists()
        inode = (tmp_path / "best_model").stat().st_ino
        disk.point_best(tmp_path, second.name)
        assert (tmp_path / "best_model").stat().st_ino == inode
    disk.point_best(tmp_path, first.name)
    assert (tmp_path / "best_model").resolve() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best_model", first.name, second.name]


def test_what_a_killed_save_left_is_never_taken_for_a_checkpoint_and_goes(model, tmp_path):
    folder = save(tmp_path, model, 1)
    shutil.copytree(folder, tmp_path / ".checkpoint-epoch-1-step-2.tmp-123")
    assert disk.newest(tmp_path) == folder
    disk.clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_checkpoints_of_an_abandoned_future_are_set_aside(model, tmp_path, capsys):
    for number in (1, 2, 3):
        save(tmp_path, model, number)
    disk.set_aside_later(tmp_path, 2)
    assert [disk.step_of(path) for path in disk.checkpoints(tmp_path)] == [1, 2]
    assert (tmp_path / "set-aside-checkpoint-epoch-1-step-3").is_dir()
    assert "renamed" in capsys.readouterr().out


def test_moments_of_another_model_are_refused(model, tmp_path):
    folder = save(tmp_path, model, 1)
    optimizer = optimizer_of(model)
    step(model, optimizer)
    folder = save(tmp_path, model, 2, optimizer)
    wide = nn.Linear(4, 2)
    with pytest.raises(CheckpointError, match=r"weight is \[2, 3\] where \[2, 4\] is needed"):
        disk.load_optimizer_(folder, wide, optimizer_of(wide), 1, ALONE)
    model.bias.requires_grad_(False)
    with pytest.raises(CheckpointError, match="moments of bias, which this run does not train"):
        disk.load_optimizer_(folder, model, optimizer_of(model), 1, ALONE)


def test_a_full_disk_is_noticed_before_anything_is_written(model, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(RunError, match="no space left on .*: a checkpoint needs 0.0 GB, has 0.0 GB"):
        save(tmp_path, model, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_while_writing_leaves_nothing_behind(model, tmp_path):
    resource = pytest.importorskip("resource")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, old[1]))
    try:
        with pytest.raises(RunError, match="cannot be written"):
            save(tmp_path, model, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list(tmp_path.iterdir()) == []
