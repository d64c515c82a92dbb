"""AdamW with moments of 8 bits: the path of torch's, a quarter of its memory, the same bits after a resumed run."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mmllm.config.schema import ExperimentConfig
from mmllm.errors import CheckpointError
from mmllm.storage import checkpoint as disk
from mmllm.training.adamw8bit import BLOCK, AdamW8bit, empty_moments, read_moments, write_moments_
from mmllm.training.experiment import train
from mmllm.training.out_of_memory import changes
from tiny_run import directory_of, weights, write_world


def losses_with(kind: type[torch.optim.Optimizer], steps: int = 300) -> tuple[list[float], torch.optim.Optimizer]:
    """Of a small classifier whose classes are those of a fixed random one."""
    torch.manual_seed(0)
    x, teacher = torch.randn(512, 64), nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    labels = teacher(x).argmax(1)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 10))
    optimizer = kind([{"params": list(model.parameters()), "weight_decay": 0.01}], lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step in range(steps):
        rows = torch.randint(512, (64,), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(x[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, optimizer


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    states = [(p, state) for p, state in optimizer.state.items() if p.ndim == 2 and p.numel() >= 4096]
    return sum(value.nbytes for _, state in states for name, value in state.items() if name != "step")


def test_the_loss_falls_as_with_torchs_adamw_at_a_quarter_of_the_memory():
    expected, full = losses_with(torch.optim.AdamW)
    found, small = losses_with(AdamW8bit)
    for end in range(30, 301, 30):
        mean, wanted = (sum(losses[end - 30 : end]) / 30 for losses in (found, expected))
        assert mean == pytest.approx(wanted, rel=0.02), f"steps {end - 30} to {end}"
    assert expected[-1] < 0.5 * expected[0]
    assert state_bytes(small) / state_bytes(full) == pytest.approx(0.254, abs=0.001)


def test_codes_are_right_on_average_and_no_small_second_moment_becomes_zero():
    p = torch.zeros(20, BLOCK)
    first, second = torch.randn(p.numel()), 10.0 ** torch.empty(p.numel()).uniform_(-7, 0)
    piece, noise, means = slice(0, p.numel()), torch.Generator().manual_seed(0), torch.zeros(2, p.numel())
    for _ in range(400):
        state = empty_moments(p)
        write_moments_(state, piece, first, second, noise)
        found = read_moments(state, piece)
        assert ((found[1] / second).log2().abs() < 24 / 254 + 1e-3).all(), "at most one code away"
        means += torch.stack(found) / 400
    assert (means[0] - first).abs().max() < 0.01 * first.abs().max()
    assert ((means[1] / second) - 1).abs().max() < 0.02


def test_the_last_block_may_be_shorter_and_zeros_stay_zeros():
    p = torch.zeros(4096 + 100)
    state, noise, piece = empty_moments(p), torch.Generator().manual_seed(0), slice(0, 2**22)
    assert state["exp_avg_scale"].shape == (17,)
    write_moments_(state, piece, p, p, noise)
    assert all((moment == 0).all() and len(moment) == 4196 for moment in read_moments(state, piece))


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits_and_keeps_its_optimizer(tmp_path):
    world = write_world(tmp_path)
    whole = world.config(tmp_path / "whole", optimizer="adamw8bit")
    assert train(whole) == 0
    expected = weights(whole)
    assert expected["language_model.model.layers.0.mlp.up_proj.weight.exp_avg"].dtype == torch.int8
    parts = world.config(tmp_path / "parts", optimizer="adamw8bit", save_steps=1, keep_checkpoints=10)
    assert train(parts) == 0
    middle = next(path for path in disk.checkpoints(directory_of(parts)) if disk.step_of(path) == 7)
    assert (
        load_file(middle / disk.OPTIMIZER).keys()
        == load_file(disk.checkpoints(directory_of(parts))[-1] / disk.OPTIMIZER).keys()
    )
    assert train(parts, resume=str(middle)) == 0
    found = weights(parts)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    parts.training.optimizer = "adamw"
    with pytest.raises(CheckpointError, match="another training.optimizer: 'adamw8bit' at the checkpoint, 'adamw' now"):
        train(parts, resume=str(middle))


def test_moments_of_8_bits_are_among_the_changes_that_save_memory():
    names = [name for family, _ in changes(ExperimentConfig(), 2) for name in family[0]]
    assert "training.optimizer" in names
    assert not any("training.optimizer" in family[0] for family, _ in changes(ExperimentConfig(), 1))
