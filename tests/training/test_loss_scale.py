"""float16 for cards without bfloat16: a factor of the loss keeps small gradients, and halves where large ones overflow."""

import shutil

import pytest
import torch
from torch.testing import assert_close

from mmllm.config.schema import TrainingConfig
from mmllm.data.batches import make_batch, read_rows
from mmllm.data.samples import load_samples
from mmllm.models.multimodal import MultimodalLLM
from mmllm.reporting.metrics import read_metrics
from mmllm.runtime import device
from mmllm.runtime.distributed import ALONE
from mmllm.storage import checkpoint as disk
from mmllm.training import experiment
from mmllm.training.experiment import train
from mmllm.training.step import GROWTH_INTERVAL, LossScale, update_
from tiny_run import directory_of, weights, write_world

FIRST = 18  # exponent of the first scale of a run: it overflows in a few steps


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def float16(monkeypatch):
    """A CPU that, like a T4, has no bfloat16."""
    for module in (device, experiment):
        monkeypatch.setattr(module, "half_type", lambda _: torch.float16)


def step_in(world, bf16, scale):
    """Loss, norm and projector after a step of gradient descent at rate 1 on four samples."""
    model = MultimodalLLM.from_towers(world.folder / "clip", world.folder / "qwen")
    samples = load_samples(world.folder / "train.json", world.folder / "images")[:4]
    batch = make_batch([read_rows(sample, model.processor)[0] for sample in samples], model.processor)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    settings = TrainingConfig(bf16=bf16, max_grad_norm=1e6)
    targets = int((batch.labels_BT[:, 1:] != -100).sum())
    before = model.multi_modal_projector.linear_2.weight.detach().clone()
    loss, norm = update_(model, optimizer, [batch], settings, targets, ALONE, scale)
    return loss, norm, model.multi_modal_projector.linear_2.weight.detach() - before


def test_a_scaled_float16_step_is_the_float32_step(world, float16):
    loss, norm, moved = step_in(world, False, None)
    scale = LossScale(2.0**10)
    half_loss, half_norm, half_moved = step_in(world, True, scale)
    assert half_loss == pytest.approx(loss, rel=1e-3) and half_norm == pytest.approx(norm, rel=1e-2)
    assert half_loss != loss  # it was computed in float16
    assert_close(half_moved, moved, rtol=0, atol=0.02 * moved.abs().max().item())
    assert scale == LossScale(2.0**10, 1)


def test_an_overflow_moves_nothing_and_halves_the_scale(world, float16):
    scale = LossScale(2.0**60, 7)
    loss, norm, moved = step_in(world, True, scale)
    assert torch.tensor(loss).isfinite() and not torch.tensor(norm).isfinite()
    assert not moved.any()
    assert scale == LossScale(2.0**59, 0)


def test_the_scale_doubles_after_many_steps_without_overflow():
    scale = LossScale(8.0, GROWTH_INTERVAL - 2)
    scale.update(overflows=False)
    assert scale == LossScale(8.0, GROWTH_INTERVAL - 1)
    scale.update(overflows=False)
    assert scale == LossScale(16.0, 0)


@pytest.mark.slow
def test_overflows_count_as_no_failure_and_a_resumed_run_keeps_the_scale(world, tmp_path, float16, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "LossScale", lambda *state: LossScale(*(state or (2.0**FIRST, 0))))
    config = world.config(tmp_path / "whole", bf16=True, save_steps=1, keep_checkpoints=99)  # max_skipped_steps=0
    assert train(config) == 0
    assert "a gradient overflows float16; skipped, the loss scale is" in capsys.readouterr().out
    rows = [row for row in read_metrics(directory_of(config)) if "val_loss" not in row]
    skipped = ["left_out" in row for row in rows]
    assert skipped[0] and not skipped[-1]
    state = disk.read_state(disk.newest(directory_of(config)))
    assert state["loss_scale"] == [2.0 ** (FIRST - sum(skipped)), skipped[::-1].index(True)]
    expected = weights(config)
    for checkpoint in disk.checkpoints(directory_of(config))[4:]:
        shutil.rmtree(checkpoint)
    assert train(config, resume="auto") == 0
    assert disk.read_state(disk.newest(directory_of(config)))["loss_scale"] == state["loss_scale"]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(config).items())
