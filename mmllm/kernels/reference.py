"""The formulas of the kernels in torch: what cpu.cpp is tested against, and what runs where it cannot be compiled.

Weights: int8 is symmetric with a scale per row, as in https://github.com/pytorch-labs/gpt-fast (quantize.py); int4 is like
Q4_0 of https://github.com/ggml-org/llama.cpp, where the number of largest magnitude in a group becomes -8, whatever its
sign; here a smaller scale is taken where the squared error is less (on normal weights the error falls by 4 %). An int8 scale
is rounded up to 16 bits of mantissa: then q * scale is exact in float32, and quantising that product gives the same q and
scale again. So a checkpoint of a quantised model holds plain float32 weights and resumes bit for bit. An int4 scale is
bfloat16, to the same effect.

Activations: a row becomes integers of 16 bits or 8 ("int8-dynamic"), cut into signed bytes whose products are summed
without rounding. So a row does not depend on other rows, on threads or on the processor. The rounding of the weights moves
the logits, and 24 bits instead of 16 change that by 0.2 % at most (docs/weights.md).

M rows, O outputs, K inputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_INT8 = 127
SCALE_BITS = 16  # of an int8 scale's mantissa: with 7 bits of q they fit the 24 of float32
GROUP = 32  # weights that share an int4 scale
CUTS = 12  # scales to choose from
DAMPING = 0.01  # of the mean second moment, as in gptq.py
DIGIT_BITS = 8  # of one signed digit of an activation
MAX_ACTIVATION = {16: 0x7F7F, 8: 127}  # as an integer, by its bits; as in cpu.cpp


def quantize_int8(weight_OK: Tensor) -> tuple[Tensor, Tensor]:
    """int8 (O, K) and float32 scales (O, 1): the weight is about q * scale, off by at most scale / 2."""
    peak_O1 = weight_OK.float().abs().amax(1, keepdim=True)
    fraction, exponent = torch.frexp(peak_O1 / MAX_INT8)
    scale_O1 = torch.ldexp(torch.ceil(fraction * 2**SCALE_BITS), exponent - SCALE_BITS)
    scale_O1 = scale_O1.masked_fill(scale_O1 == 0, 1)  # not finite: stays, and so do the results
    return (weight_OK.float() / scale_O1).round().clamp(-MAX_INT8, MAX_INT8).to(torch.int8), scale_O1


def quantize_int4(weight_OK: Tensor) -> tuple[Tensor, Tensor]:
    """int8 (O, K) of -8 .. 7 and bfloat16 scales (O, K/32), which may be negative.

    The scale of a group makes its peak -8, or -8.25 .. -10.75 and cuts it off: the one with the least squared error.
    """
    parts = [quantize_groups(part.float().unflatten(1, (-1, GROUP))) for part in weight_OK.split(256)]  # fit the cache
    q, scale = (torch.cat(part) for part in zip(*parts, strict=True))
    return q.flatten(1), scale


def quantize_groups(groups: Tensor) -> tuple[Tensor, Tensor]:
    peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best_q = best_scale = least = None
    for quarters in range(CUTS):
        scale = (peak / -(8 + quarters / 4)).bfloat16().float()
        scale = torch.where(scale == 0, 1, scale)
        q = (groups / scale).round().clamp(-8, 7)
        difference = (q * scale - groups).view(torch.int32) & ~0xFFF  # 12 bits, whose squares are exact:
        error = difference.view(torch.float32).square()  # a fused multiply-add in cpu.cpp gives the same bits
        while error.shape[-1] > 1:
            low, high = error.chunk(2, -1)
            error = low + high
        if least is None:
            best_q, best_scale, least = q, scale, error
            continue
        is_less = error < least
        best_q, best_scale = torch.where(is_less, q, best_q), torch.where(is_less, scale, best_scale)
        least = torch.where(is_less, error, least)
    return best_q.to(torch.int8), best_scale[..., 0].bfloat16()


def quantize_int4_for(weight_OK: Tensor, moments_KK: Tensor) -> tuple[Tensor, Tensor]:
    """The same for inputs of these second moments: later columns are changed to make up for the rounding of earlier ones.

    GPTQ, https://arxiv.org/abs/2210.17323, code https://github.com/IST-DASLab/gptq (gptq.py).
    """
    rest_KO, K = weight_OK.T.float().contiguous(), len(moments_KK)
    damping = DAMPING * moments_KK.diag().mean().clamp(min=1e-30)  # inputs may all be 0
    damped_KK = moments_KK.double() + damping * torch.eye(K, device=moments_KK.device)
    inverse_KK = torch.cholesky_inverse(torch.linalg.cholesky(damped_KK))
    factor_KK = torch.linalg.cholesky(inverse_KK, upper=True).float()
    q_KO, scales = torch.empty_like(rest_KO, dtype=torch.int8), []
    for start in range(0, K, GROUP):
        end = start + GROUP
        scales.append(quantize_groups(rest_KO[start:end].T[:, None])[1])
        for k in range(start, end):
            q_KO[k] = q_O = (rest_KO[k] / scales[-1][:, 0]).round().clamp(-8, 7)
            rest_KO[k] = (rest_KO[k] - q_O * scales[-1][:, 0]) / factor_KK[k, k]
            rest_KO[k + 1 : end] -= factor_KK[k, k + 1 : end, None] * rest_KO[k]
        rest_KO[end:] -= factor_KK[start:end, end:].T @ rest_KO[start:end]
    return q_KO.T.contiguous(), torch.cat(scales, 1)


def int4_matrix(q_OK: Tensor, scale: Tensor) -> Tensor:
    """The float32 (O, K) that the results of `quantize_int4` stand for."""
    return (q_OK.unflatten(1, (-1, GROUP)) * scale[..., None].float()).flatten(1)


def int4_linear(x: Tensor, matrix_OK: Tensor, bias_O: Tensor | None) -> Tensor:
    """The product of cpu.cpp with an `int4_matrix`: x (..., K), rounded to int8 with a scale per group of 32 -> (..., O)."""
    groups = x.unflatten(-1, (-1, GROUP))
    peak = groups.abs().amax(-1, keepdim=True)
    integers = (groups * (MAX_INT8 / peak).clamp(max=3e38).masked_fill(peak == 0, 0)).round()
    return F.linear((integers * (peak / MAX_INT8)).flatten(-2), matrix_OK, bias_O)


def int8_linear(x: Tensor, q_OK: Tensor, scale_O: Tensor, bias_O: Tensor | None, bits: int) -> Tensor:
    """The product of cpu.cpp, bit for bit, from torch's integer product: x (..., K) float32 -> (..., O)."""
    x_MK = x.reshape(-1, x.shape[-1])
    X_MK, unit_M1 = activation_integers(x_MK, bits)
    digits = signed_digits(X_MK, bits // DIGIT_BITS)
    sums = torch._int_mm(torch.cat(digits), q_OK.T).double().chunk(len(digits))
    total_MO = sum(piece * 2 ** (DIGIT_BITS * place) for place, piece in enumerate(sums))
    y_MO = (total_MO * (unit_M1 * scale_O.double())).float()
    return (y_MO if bias_O is None else y_MO + bias_O).unflatten(0, x.shape[:-1])


def activation_integers(x_MK: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Each row as int32 X and a float64 unit (M, 1): x is about X * unit. The unit of a row that is not finite is NaN."""
    peak_M1 = x_MK.abs().amax(1, keepdim=True)
    step_M1 = peak_M1.double() / MAX_ACTIVATION[bits]
    scale_M1 = (1 / step_M1).clamp(max=3e38).float().masked_fill(step_M1 == 0, 0)
    is_finite_M1 = peak_M1.isfinite()
    unit_M1 = (1 / scale_M1.double()).masked_fill(scale_M1 == 0, 0).masked_fill(~is_finite_M1, torch.nan)
    return torch.where(is_finite_M1, x_MK * scale_M1, 0).round().int(), unit_M1


def signed_digits(X_MK: Tensor, count: int) -> list[Tensor]:
    """X as `count` signed bytes, the lowest first."""
    digits = []
    for _ in range(count):
        low = ((X_MK + 128) & 255) - 128
        digits.append(low.to(torch.int8))
        X_MK = (X_MK - low) >> DIGIT_BITS
    return digits
