"""AdamW whose two moments take a byte each: 2.03 bytes a parameter where AdamW's take 8.

Moments are stored in blocks of 256 values, each block with its largest value in float32. The first moment is stored as a
signed square root, so that small values keep their precision. The second is stored as a logarithm: it is divided by, so
what counts is its relative error, the same over 24 powers of two. An update changes a moment by less than one code, and
rounding to the nearest would lose it for ever. So codes are rounded up or down at random, right on average, by a generator
that depends on the update and the parameter alone: a resumed run, and every process, rounds the same way.

A parameter is updated in pieces that stay in the processor's cache; on a GPU by one kernel. All of its pieces are rounded
by the same random numbers: to draw them takes longer than the rest, and no value's mean depends on those of others.

Block-wise 8-bit optimizers: https://arxiv.org/abs/2110.02861 (whose codes are those of a table, rounded to the nearest).
K blocks of L values.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from mmllm.kernels.gpu import native

BLOCK = 256
SMALLEST = 4096  # values; the moments of smaller parameters, such as biases, stay in float32
PIECE = {"cpu": 2**17}  # values that are float32 at a time
LARGEST_PIECE = 2**24  # on other devices, where the start of an operation takes longer than its work
BLOCKS = 4  # of a program of the fused update
FUSED_NOISE = 2**20  # random numbers for each moment, which stay in a GPU's cache
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
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state.update(step=torch.zeros(()), **empty_moments(p))
        state["step"] = state["step"].cpu() + 1
        update, is_fused = int(state["step"]), native(p.device)
        size = min(FUSED_NOISE if is_fused else PIECE.get(p.device.type, LARGEST_PIECE), p.numel())
        noise = rounding_noise(size, update * 1_000_003 + number, p.device)
        grad = p.grad.contiguous()
        if is_fused:
            fused_update_(p.data.view(-1), grad, state, noise, group, update)
            return
        for piece in pieces(p.numel(), size):
            grad_KL, p_KL = blocks(grad, piece), blocks(p.data, piece)
            first_KL, second_KL = read_moments(state, piece)
            first_KL.lerp_(grad_KL, 1 - beta1)
            second_KL.mul_(beta2).addcmul_(grad_KL, grad_KL, value=1 - beta2)
            write_moments_(state, piece, first_KL, second_KL, noise)
            p_KL.mul_(1 - group["lr"] * group["weight_decay"])
            second_KL.div_(1 - beta2**update).sqrt_().add_(group["eps"])
            p_KL.addcdiv_(first_KL, second_KL, value=-group["lr"] / (1 - beta1**update))


def fused_update_(p: Tensor, grad: Tensor, state: dict[str, Tensor], noise: Tensor, group: dict, update: int) -> None:
    """The update of a parameter as one Triton kernel."""
    from mmllm.kernels.triton_kernels import adamw8bit

    beta1, beta2 = group["betas"]
    moments = [state.get(name) for name in ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")]
    adamw8bit[(-(-p.numel() // (BLOCK * BLOCKS)),)](
        p, grad, *moments, noise, p.numel(), noise.shape[1], beta1, beta2, group["eps"],
        1 - group["lr"] * group["weight_decay"], 1 - beta2**update, -group["lr"] / (1 - beta1**update),
        OCTAVES=OCTAVES, BLOCK=BLOCK, BLOCKS=BLOCKS,
    )  # fmt: skip


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


def pieces(numel: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` values in whole blocks, then one of the last block where that is shorter."""
    whole = numel - numel % BLOCK
    yield from (slice(begin, min(begin + size, whole)) for begin in range(0, whole, size))
    if whole < numel:
        yield slice(whole, numel)


def blocks(x: Tensor, piece: slice) -> Tensor:
    """The values of a piece, (K, L)."""
    return x.view(-1)[piece].view(-1, min(BLOCK, piece.stop - piece.start))


def scales(state: dict[str, Tensor], moment: str, piece: slice) -> Tensor:
    """The scales of a piece's blocks, (K, 1)."""
    return state[f"{moment}_scale"][piece.start // BLOCK : -(-piece.stop // BLOCK), None]


def rounding_noise(size: int, seed: int, device: torch.device) -> Tensor:
    """Two times `size` random numbers from 0 to 1; no sum of one with a code is rounded up to the code after the next."""
    rng = torch.Generator(device).manual_seed(seed)
    return torch.rand(2, size, generator=rng, device=device).mul_(1 - 2**-12)


def read_moments(state: dict[str, Tensor], piece: slice) -> tuple[Tensor, Tensor]:
    """Both moments of a piece in float32, (K, L)."""
    first_KL, second_KL = (
        blocks(state[name], piece).to(torch.float32, copy=True) for name in ("exp_avg", "exp_avg_sq")
    )
    if "exp_avg_scale" in state:
        first_KL.mul_(first_KL.abs()).mul_(scales(state, "exp_avg", piece) / 127**2)
        is_there_KL = second_KL.clamp(max=1)
        second_KL.sub_(255).mul_(OCTAVES / 254).exp2_().mul_(scales(state, "exp_avg_sq", piece)).mul_(is_there_KL)
    return first_KL, second_KL


def write_moments_(state: dict[str, Tensor], piece: slice, first_KL: Tensor, second_KL: Tensor, noise: Tensor) -> None:
    """Store both moments of a piece, rounded by `rounding_noise`."""
    if "exp_avg_scale" in state:
        noise1_KL, noise2_KL = noise[:, : first_KL.numel()].view(2, *first_KL.shape)
        share_KL = shares(first_KL.abs(), scales(state, "exp_avg", piece))
        first_KL = torch.add(noise1_KL, share_KL.sqrt_(), alpha=127).copysign_(first_KL)
        share_KL = shares(second_KL.clone(), scales(state, "exp_avg_sq", piece))
        is_there_KL = share_KL.sign()
        code_KL = torch.add(noise2_KL, share_KL.log2_(), alpha=254 / OCTAVES)
        second_KL = code_KL.add_(255).clamp_(min=1).mul_(is_there_KL)
    blocks(state["exp_avg"], piece).copy_(first_KL)  # to an integer: towards zero
    blocks(state["exp_avg_sq"], piece).copy_(second_KL)


def shares(value_KL: Tensor, scale_K1: Tensor) -> Tensor:
    """Turn values into shares of the largest of their block, which becomes the block's scale."""
    torch.amax(value_KL, 1, keepdim=True, out=scale_K1)
    return value_KL.div_(scale_K1.clamp(min=torch.finfo(torch.float32).tiny))
