"""AdamW whose two moments take a byte each: 2.03 bytes a parameter where AdamW's take 8.

Moments are stored in blocks of 256 values, each block with its largest value in float32. The first moment is stored as a
signed square root, so that small values keep their precision. The second is stored as a logarithm: it is divided by, so
what counts is its relative error, the same over 24 powers of two. An update changes a moment by less than one code, and
rounding to the nearest would lose it for ever. So codes are rounded up or down at random, right on average, by a generator
that depends on the update and the parameter alone: a resumed run, and every process, rounds the same way.

Block-wise 8-bit optimizers: https://arxiv.org/abs/2110.02861 (whose codes are those of a table, rounded to the nearest).
P values of a parameter, in K blocks of BLOCK.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

BLOCK = 256
SMALLEST = 4096  # values; the moments of smaller parameters, such as biases, stay in float32
PIECE = 2**22  # values that are float32 at a time
OCTAVES = 24  # the second moment's codes 1 to 255 reach from the largest value of the block to 2**-24 of it; 0 is 0


class AdamW8bit(torch.optim.Optimizer):
    """`torch.optim.AdamW` with moments of 8 bits; the same update otherwise. For parameters that are not sharded."""

    def __init__(self, groups: Iterable[dict], betas: tuple[float, float], eps: float, lr: float = 0.0):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self) -> None:
        pairs = [(p, group) for group in self.param_groups for p in group["params"]]
        for number, (p, group) in enumerate(pairs):
            if p.grad is not None:
                self._update_(p, group, number)

    def _update_(self, p: nn.Parameter, group: dict, number: int) -> None:
        state = self.state[p]
        if not state:
            state.update(step=torch.zeros(()), **empty_moments(p))
        state["step"] = state["step"].cpu() + 1
        update = int(state["step"])
        noise = torch.Generator(p.device).manual_seed(update * 1_000_003 + number)
        grad_P, flat_P = p.grad.reshape(-1), p.data.view(-1)
        for begin in range(0, p.numel(), PIECE):
            piece = slice(begin, begin + PIECE)
            first_P, second_P = read_moments(state, piece)
            first_P.lerp_(grad_P[piece].float(), 1 - group["betas"][0])
            second_P.lerp_(grad_P[piece].float().square(), 1 - group["betas"][1])
            write_moments_(state, piece, first_P, second_P, noise)
            bias1, bias2 = (1 - beta**update for beta in group["betas"])
            flat_P[piece] *= 1 - group["lr"] * group["weight_decay"]
            flat_P[piece] -= group["lr"] / bias1 * first_P / ((second_P / bias2).sqrt_() + group["eps"])


def empty_moments(p: Tensor) -> dict[str, Tensor]:
    """Moments of zero for a parameter: codes of its shape and the scale of each block, or float32 where it is small."""
    if p.numel() < SMALLEST:
        return {name: torch.zeros_like(p, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
    scale_K = torch.zeros(-(-p.numel() // BLOCK), device=p.device)
    return {
        "exp_avg": torch.zeros_like(p, dtype=torch.int8),
        "exp_avg_sq": torch.zeros_like(p, dtype=torch.uint8),
        "exp_avg_scale": scale_K,
        "exp_avg_sq_scale": scale_K.clone(),
    }


def read_moments(state: dict[str, Tensor], piece: slice) -> tuple[Tensor, Tensor]:
    """Both moments of a piece in float32."""
    first_P, second_P = (state[name].view(-1)[piece].float() for name in ("exp_avg", "exp_avg_sq"))
    if "exp_avg_scale" not in state:
        return first_P.clone(), second_P.clone()
    root_P, code_P = first_P / 127, second_P
    first_P = root_P * root_P.abs() * scales(state["exp_avg_scale"], piece, root_P)
    second_P = torch.exp2((code_P - 255) * (OCTAVES / 254)) * scales(state["exp_avg_sq_scale"], piece, code_P)
    return first_P, second_P * (code_P > 0)


def write_moments_(
    state: dict[str, Tensor], piece: slice, first_P: Tensor, second_P: Tensor, noise: torch.Generator
) -> None:
    """Store both moments of a piece."""
    codes = {name: state[name].view(-1)[piece] for name in ("exp_avg", "exp_avg_sq")}
    if "exp_avg_scale" in state:
        share_P = shares(state["exp_avg_scale"], piece, first_P)
        first_P = rounded(share_P.sign() * share_P.abs().sqrt() * 127, noise)
        share_P = shares(state["exp_avg_sq_scale"], piece, second_P).clamp_min(2.0**-OCTAVES)
        code_P = rounded(255 + (254 / OCTAVES) * share_P.log2(), noise)
        second_P = code_P.clamp(1, 255) * (second_P > 0)
    codes["exp_avg"].copy_(first_P)
    codes["exp_avg_sq"].copy_(second_P)


def shares(scale_K: Tensor, piece: slice, value_P: Tensor) -> Tensor:
    """Values as shares of the largest of their block, which becomes the block's scale."""
    padded = nn.functional.pad(value_P.abs(), (0, -len(value_P) % BLOCK))
    scale_K[piece.start // BLOCK : piece.stop // BLOCK] = padded.view(-1, BLOCK).amax(1)
    return value_P / scales(scale_K, piece, value_P).clamp_min(torch.finfo(torch.float32).tiny)


def scales(scale_K: Tensor, piece: slice, value_P: Tensor) -> Tensor:
    """The scale of the block of each value."""
    return scale_K[piece.start // BLOCK : piece.stop // BLOCK].repeat_interleave(BLOCK)[: len(value_P)]


def rounded(x_P: Tensor, noise: torch.Generator) -> Tensor:
    """Rounded up or down, at random so that the mean is `x_P`."""
    return torch.floor(x_P + torch.rand(x_P.shape, generator=noise, device=x_P.device))
