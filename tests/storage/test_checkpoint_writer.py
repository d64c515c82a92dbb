"""A checkpoint is written while training goes on: it holds the moment at which it was begun."""

import threading

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import Model, optimizer_of, step

from mmllm.errors import RunError
from mmllm.runtime.distributed import ALONE
from mmllm.storage import checkpoint as disk
from mmllm.storage.checkpoint_writer import BUSY, IDLE, CheckpointWriter

STATE = {"step": 1, "config": {"seed": 0}}


@pytest.fixture
def held(monkeypatch):
    """An event without which nothing is written."""
    event, write = threading.Event(), CheckpointWriter._write

    def wait_and_write(*arguments):
        assert event.wait(60)
        write(*arguments)

    monkeypatch.setattr(CheckpointWriter, "_write", wait_and_write)
    return event


def test_training_goes_on_while_the_past_is_written(tmp_path, held):
    model, said = Model(), []
    optimizer = optimizer_of(model)
    step(model, optimizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moment = optimizer.state[model.weight]["exp_avg"].clone()
    folder = tmp_path / disk.checkpoint_name(1, 1)
    with CheckpointWriter(ALONE) as writer:
        writer.begin(folder, model, optimizer, STATE, lambda: said.append("whole"))
        step(model, optimizer)  # before a byte is written
        assert writer.state() == BUSY and not folder.exists() and said == []
        held.set()
        writer.wait()
        assert writer.state() == IDLE and said == ["whole"]
    disk.verify(folder)
    assert not torch.equal(model.weight, before["weight"])
    written = load_file(folder / "model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in before.items())
    assert torch.equal(load_file(folder / "training" / "optimizer.safetensors")["weight.exp_avg"], moment)


def test_what_is_being_written_when_a_run_ends_is_written_to_its_end(tmp_path):
    model = Model()
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(ALONE) as writer:
        writer.begin(tmp_path / disk.checkpoint_name(1, 1), model, optimizer_of(model), STATE)
        raise KeyboardInterrupt
    assert disk.newest(tmp_path) is not None


def test_where_a_copy_does_not_fit_into_memory_the_checkpoint_is_written_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("mmllm.storage.checkpoint_writer.free_memory", lambda: 0)
    model = Model()
    with CheckpointWriter(ALONE) as writer:
        writer.begin(tmp_path / disk.checkpoint_name(1, 1), model, optimizer_of(model), STATE)
        assert writer.save is None
    assert disk.newest(tmp_path) is not None


@pytest.mark.parametrize("free", [0, 10**12], ids=["at once", "in the background"])
def test_a_disk_that_fills_up_is_reported_and_leaves_nothing(tmp_path, monkeypatch, free):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr("mmllm.storage.checkpoint_writer.free_memory", lambda: free)
    model = Model()
    big = {"big": torch.ones(10**5)}
    monkeypatch.setattr(model, "tensor_files", lambda: {"model.safetensors": big})
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    with CheckpointWriter(ALONE) as writer:
        writer.begin(tmp_path / disk.checkpoint_name(1, 1), model, optimizer_of(model), STATE)
        writer.wait()
        create = disk.create

        def create_and_fill(path, plan):
            create(path, plan)  # the room is promised, and then the disk is full all the same
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))

        monkeypatch.setattr(disk, "create", create_and_fill)
        try:
            with pytest.raises(RunError, match=r"step-2: cannot be written \(File too large\); nothing was left"):
                writer.begin(tmp_path / disk.checkpoint_name(1, 2), model, optimizer_of(model), STATE)
                writer.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        assert writer.state() == IDLE and writer.save is None
    assert [path.name for path in tmp_path.iterdir()] == [disk.checkpoint_name(1, 1)]


def test_a_second_checkpoint_does_not_begin_before_the_first_is_whole(tmp_path, held):
    model = Model()
    with CheckpointWriter(ALONE) as writer:
        writer.begin(tmp_path / disk.checkpoint_name(1, 1), model, optimizer_of(model), STATE)
        with pytest.raises(ValueError, match="step-1 is still being written"):
            writer.begin(tmp_path / disk.checkpoint_name(1, 2), model, optimizer_of(model), STATE)
        held.set()
