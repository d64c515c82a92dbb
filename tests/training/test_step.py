"""The learning rate is a pure function of the step; groups decide what decays."""

import pytest
import torch
from torch import nn

from mmllm.training.step import adamw, learning_rate_at, parameter_groups, set_learning_rates_


def test_the_rate_rises_to_its_peak_and_falls_to_nearly_nothing():
    rates = [learning_rate_at(step, 1.0, warmup=4, total=12) for step in range(12)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == pytest.approx(0.5)
    assert rates == sorted(rates[:5]) + sorted(rates[5:], reverse=True)
    assert 0 < rates[11] < 0.05


def test_without_warm_up_the_first_step_is_at_the_peak():
    assert learning_rate_at(0, 2e-5, warmup=0, total=10) == 2e-5


@pytest.mark.parametrize("step", [-1, 12, 13])
def test_a_step_outside_the_schedule_is_a_bug(step):
    with pytest.raises(ValueError, match="outside a schedule of 12"):
        learning_rate_at(step, 1.0, warmup=4, total=12)


def test_only_trainable_matrices_decay_and_each_part_has_its_rate():
    model = nn.ModuleDict({"projector": nn.Linear(2, 2), "language": nn.Linear(2, 2), "vision": nn.Linear(2, 2)})
    model["vision"].requires_grad_(False)
    groups = parameter_groups(model.named_parameters(), {"projector": 1e-3, "language": 1e-5}, weight_decay=0.1)
    found = {(g["peak"], g["weight_decay"]): [tuple(p.shape) for p in g["params"]] for g in groups}
    assert found == {
        (1e-3, 0.1): [(2, 2)],
        (1e-3, 0.0): [(2,)],
        (1e-5, 0.1): [(2, 2)],
        (1e-5, 0.0): [(2,)],
    }


def test_a_trainable_parameter_without_a_rate_is_refused():
    with pytest.raises(ValueError, match=r"no learning rate for weight; rates are given for projector"):
        parameter_groups(nn.Linear(2, 2).named_parameters(), {"projector": 1e-3}, weight_decay=0.0)


def test_every_group_follows_the_schedule_from_its_own_peak():
    groups = [{"params": [nn.Parameter(torch.ones(1))], "peak": p, "weight_decay": 0.0} for p in (1.0, 0.1)]
    optimizer = adamw(groups, 0.9, 0.95)
    assert set_learning_rates_(optimizer, 0, warmup=2, total=10) == 0.5
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.05]


def test_the_fused_form_is_the_plain_loop():
    """Ten steps of both from the same gradients, in float64, where only another formula would show."""
    rng = torch.Generator().manual_seed(0)
    ends = []
    gradients = torch.randn(10, 7, 5, generator=rng, dtype=torch.float64)
    for is_fused in (True, False):
        weight = nn.Parameter(torch.ones(7, 5, dtype=torch.float64))
        optimizer = adamw([{"params": [weight], "peak": 0.1, "weight_decay": 0.1}], 0.9, 0.95)
        optimizer.param_groups[0]["fused"] = is_fused
        for step, gradient in enumerate(gradients):
            set_learning_rates_(optimizer, step, warmup=3, total=10)
            weight.grad = gradient.clone()
            optimizer.step()
        ends.append(weight.detach())
    torch.testing.assert_close(*ends, atol=1e-12, rtol=0)


def test_a_step_moves_each_parameter_by_about_its_rate():
    weight = nn.Parameter(torch.ones(3))
    optimizer = adamw([{"params": [weight], "peak": 0.1, "weight_decay": 0.0}], 0.9, 0.95)
    set_learning_rates_(optimizer, 0, warmup=0, total=10)
    weight.grad = torch.tensor([1.0, -2.0, 3.0])
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([0.9, 1.1, 0.9]), atol=1e-6, rtol=0)
