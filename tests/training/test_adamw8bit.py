"""AdamW with moments of 8 bits: the path of torch's, a quarter of its memory, the same bits after a resumed run."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from mmllm.config.schema import ExperimentConfig
from mmllm.errors import CheckpointError
from mmllm.storage import checkpoint as disk
from mmllm.training import adamw8bit
from mmllm.training.adamw8bit import (
    BLOCK,
    AdamW8bit,
    blocks,
    empty_moments,
    pieces,
    read_moments,
    rounding_noise,
    write_moments_,
)
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
    first, second = torch.randn(20, BLOCK), 10.0 ** torch.empty(20, BLOCK).uniform_(-7, 0)
    piece, means = slice(0, p.numel()), torch.zeros(2, 20, BLOCK)
    for number in range(400):
        state = empty_moments(p)
        write_moments_(state, piece, first, second, rounding_noise(p.numel(), number, p.device))
        found = read_moments(state, piece)
        assert ((found[1] / second).log2().abs() < 24 / 254 + 1e-3).all(), "at most one code away"
        means += torch.stack(found) / 400
    assert (means[0] - first).abs().max() < 0.01 * first.abs().max()
    assert ((means[1] / second) - 1).abs().max() < 0.02


def test_the_largest_value_of_a_block_keeps_its_sign_with_the_largest_noise():
    p = torch.zeros(20, BLOCK)
    first = torch.randn(20, BLOCK)
    state, piece, noise = empty_moments(p), slice(0, p.numel()), torch.ones(2, p.numel()) * (1 - 2**-12)
    write_moments_(state, piece, first, first.square(), noise)
    assert (read_moments(state, piece)[0] * first >= 0).all()
    assert state["exp_avg"].abs().amax(1).tolist() == [127] * 20
    assert state["exp_avg_sq"].amax(1).tolist() == [255] * 20
    assert max(rounding_noise(2**20, seed, p.device).max() for seed in range(8)) <= 1 - 2**-12


def test_the_last_block_may_be_shorter_and_zeros_stay_zeros():
    p = torch.zeros(4096 + 100)
    state, parts = empty_moments(p), list(pieces(p.numel(), 1024))
    assert state["exp_avg_scale"].shape == (17,)
    assert parts == [slice(0, 1024), slice(1024, 2048), slice(2048, 3072), slice(3072, 4096), slice(4096, 4196)]
    for piece in parts:
        zeros = blocks(p, piece)
        write_moments_(state, piece, zeros, zeros, rounding_noise(1024, 0, p.device))
        assert all((moment == 0).all() and moment.shape == zeros.shape for moment in read_moments(state, piece))


def test_a_step_in_pieces_is_that_of_torch_until_a_moment_has_been_rounded(monkeypatch):
    monkeypatch.setitem(adamw8bit.PIECE, "cpu", 1024)
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(4, (4096 + 300) // 4)) for _ in range(2)]
    parameters[1].data.copy_(parameters[0].data)
    for kind, p in zip((torch.optim.AdamW, AdamW8bit), parameters, strict=True):
        p.grad = torch.randn(p.T.shape, generator=torch.Generator().manual_seed(1)).T  # not contiguous
        kind([{"params": [p], "weight_decay": 0.1}], lr=1e-2, betas=(0.9, 0.95), eps=1e-8).step()
    assert_close(parameters[1], parameters[0], atol=1e-6, rtol=0)


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
