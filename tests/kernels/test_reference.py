"""The formulas in torch: what rounding keeps of a weight, and how exact the integer product is."""

import pytest
import torch

from mmllm.kernels.reference import (
    int4_linear,
    int4_matrix,
    int8_linear,
    quantize_int4,
    quantize_int4_for,
    quantize_int8,
)


def some_weight() -> torch.Tensor:
    weight = torch.randn(50, 33, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 50)[:, None]
    weight[7] = 0
    return weight


def test_a_weight_is_off_by_half_a_scale_at_most():
    weight = some_weight()
    q, scale = quantize_int8(weight)
    assert q.dtype == torch.int8 and scale.shape == (50, 1)
    assert ((q * scale - weight).abs() <= scale / 2 * (1 + 1e-6)).all()
    rows = weight.abs().amax(1) > 0
    assert (scale[rows] / (weight.abs().amax(1, keepdim=True)[rows] / 127) - 1).abs().max() < 2**-14
    assert (q[7] == 0).all()


def test_quantising_what_was_quantised_changes_no_bit():
    q, scale = quantize_int8(some_weight())
    exact = q.double() * scale.double()
    assert torch.equal((q * scale).double(), exact), "float32 holds the product"
    again, same = quantize_int8(q * scale)
    rows = (q != 0).any(1)
    assert torch.equal(again, q) and torch.equal(same[rows], scale[rows])


def test_int4_is_off_by_half_a_scale_but_at_the_ends():
    weight = some_weight()[:, :32] + 0.01
    q, scale = quantize_int4(weight)
    assert scale.shape == (50, 1) and scale.dtype == torch.bfloat16 and (q.amin(), q.amax()) == (-8, 7)
    off = (q * scale.float() - weight).abs() / scale.float().abs()
    assert (off <= 0.5 + 1e-5)[(q > -8) & (q < 7)].all() and (off <= 3.8).all()


def test_int4_takes_the_scale_of_least_squared_error():
    weight = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    groups = weight.unflatten(1, (2, 32))
    peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scales = (peak / -torch.arange(8, 11, 0.25)).bfloat16().float()[..., None]  # (O, K/32, 12, 1)
    errors = ((groups[:, :, None] / scales).round().clamp(-8, 7) * scales - groups[:, :, None]).square().sum(-1)
    error = (int4_matrix(*quantize_int4(weight)) - weight).unflatten(1, (2, 32)).square().sum(-1)
    assert (error <= errors.amin(-1) * (1 + 1e-3)).all(), "compared by 12 bits"
    assert error.sum() < errors[:, :, 0].sum() * 0.95


def test_quantising_int4_again_changes_no_bit():
    weight = torch.randn(50, 96)
    weight[3, :32] = 0
    q, scale = quantize_int4(weight)
    again, same = quantize_int4(int4_matrix(q, scale))
    assert torch.equal(again, q) and torch.equal(same, scale)


def a_case(outputs: int, inputs: int) -> tuple[torch.Tensor, ...]:
    """Activations with an outlier and a row of zeros, an int8 weight of uneven rows, its scales, a bias."""
    rng = torch.Generator().manual_seed(outputs)
    x = torch.randn(9, inputs, generator=rng)
    x[0, 3], x[-1] = 30.0, 0.0
    weight = torch.randn(outputs, inputs, generator=rng) * torch.logspace(-3, 1, outputs)[:, None]
    q, scale = quantize_int8(weight)
    return x, q, scale[:, 0], torch.randn(outputs, generator=rng)


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("bits", "largest"), [(16, 32639), (8, 127)])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (37, 64), (200, 896), (1152, 160)])
def test_int8_rounds_each_row_of_activations_by_itself_and_nothing_else(outputs, inputs, bits, largest):
    x, q, scale, bias = a_case(outputs, inputs)
    step = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / largest
    wanted = ((x / step).round() * step).double() @ (q * scale[:, None]).double().T + bias.double()
    assert relative(int8_linear(x, q, scale, bias, bits), wanted) < 5e-6


def test_int4_rounds_each_group_of_activations_by_itself():
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    x[0, :32] *= 1e4
    x[1, 32:] = 0.0
    x[2, 0] = float("inf")
    y = int4_linear(x, torch.eye(64), None)
    step = x.unflatten(1, (2, 32)).abs().amax(-1).repeat_interleave(32, 1) / 127
    assert ((y - x).abs() <= step * 0.5001)[:2].all() and not y[2].isfinite().any()


def correlated_rows(M: int, K: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(M, 8, generator=rng) @ torch.randn(8, K, generator=rng) + 0.3 * torch.randn(M, K, generator=rng)


def test_int4_for_known_inputs_changes_the_columns_to_come_by_the_inverse_moments():
    """The formula of the paper: after each column, the inverse of the moments of those that are left."""
    weight, x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)), correlated_rows(200, 64)
    moments = (x.T @ x).double()
    q, scale = quantize_int4_for(weight, moments.float())
    damped = moments + 0.01 * moments.diag().mean() * torch.eye(64)
    rest = weight.double()
    for k in range(64):
        if k % 32 == 0:
            assert torch.equal(quantize_int4(rest[:, k : k + 32].float())[1][:, 0], scale[:, k // 32])
        step = scale[:, k // 32].double()
        wanted = (rest[:, k] / step).round().clamp(-8, 7)
        assert (q[:, k] == wanted).float().mean() > 0.9, "float32 may fall to the other side"
        inverse = torch.linalg.inv(damped[k:, k:])
        off = (rest[:, k] - q[:, k] * step) / inverse[0, 0]
        rest[:, k:] -= off[:, None] * inverse[0]


def test_int4_for_known_inputs_is_nearer_on_such_inputs_and_the_same_where_they_are_not_correlated():
    weight, x = torch.randn(48, 96, generator=torch.Generator().manual_seed(0)), correlated_rows(500, 96)
    plain = quantize_int4(weight)
    chosen = quantize_int4_for(weight, x[:400].T @ x[:400])
    errors = [(x[400:] @ (int4_matrix(*each) - weight).T).norm() for each in (chosen, plain)]
    assert errors[0] < 0.5 * errors[1]
    for moments in (torch.eye(96), torch.zeros(96, 96)):
        assert all(map(torch.equal, quantize_int4_for(weight, moments), plain))
