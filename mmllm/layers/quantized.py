"""A frozen weight in a quarter of its memory: int8 with one scale per output row; or an eighth: int4, a scale for 32.

The surprising fact: rounding the scale makes everything else exact. With 16 bits of mantissa, q * scale fits float32 to
the last bit, and quantising that again gives the same q and scale. So a checkpoint of an int8 run is written as plain
float32 weights that any program reads, and resumes bit for bit.

The same holds for int4, whose scales are bfloat16.

Only the weights are rounded: the products are those of the rounded matrix. Formulas: int8 symmetric, per row, as in
https://github.com/pytorch-labs/gpt-fast (quantize.py); int4 like Q4_0 of https://github.com/ggml-org/llama.cpp, where the
largest number of a group is -8 whatever its sign. O outputs, I inputs. Next: lora.py; packed.py for inference.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.errors import ConfigError

MANTISSA_BITS = 16  # of a scale: 7 bits of q and these fit the 24 of float32
LARGEST = 127
GROUP = 32  # weights that share an int4 scale


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight` (O, I) as int8 (O, I) and float32 scales (O, 1): weight is about q * scale, off by at most scale / 2."""
    largest = weight.float().abs().amax(1, keepdim=True)
    fraction, exponent = torch.frexp(largest / LARGEST)
    scale = torch.ldexp(torch.ceil(fraction * 2**MANTISSA_BITS), exponent - MANTISSA_BITS)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (weight.float() / scale).round().clamp(-LARGEST, LARGEST).to(torch.int8), scale


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight` (O, I) as int8 (O, I) of -8 .. 7 and bfloat16 scales (O, I/32), which may be negative."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = (peak / -8).bfloat16()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (groups / scale.float()).round().clamp(-8, 7).to(torch.int8).flatten(1), scale[..., 0]


class FrozenProduct(torch.autograd.Function):
    """x W^T for a frozen quantised W, and its gradient for x; what is kept for it is W alone, as the layer holds it.

    W is `matrix(*held, dtype)`, (O, I), times `row` (O) where that is not None.
    """

    @staticmethod
    def forward(ctx, x: Tensor, matrix: Callable[..., Tensor], row: Tensor | None, *held: Tensor) -> Tensor:
        ctx.save_for_backward(row, *held)
        ctx.matrix = matrix
        y = F.linear(x, matrix(*held, x.dtype))
        return y if row is None else y * row.to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        row, *held = ctx.saved_tensors
        pulled = gradient if row is None else gradient * row.to(gradient.dtype)
        return pulled @ ctx.matrix(*held, gradient.dtype), None, None, *(None for _ in held)


class FrozenLinear(nn.Module):
    """A frozen linear layer with a rounded weight. Its state dict holds the weight as float32, under its old name."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.training = base.in_features, base.out_features, base.training
        self.bias = base.bias

    def dequantized(self) -> Tensor:
        """The matrix that it stands for, float32 (O, I)."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        with torch.autocast(x.device.type, enabled=False):
            y = self.product(x)
            return y if self.bias is None else y + self.bias.to(y.dtype)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.dequantized()


class Int8Linear(FrozenLinear):
    """int8 weights, one scale a row."""

    def __init__(self, base: nn.Linear):
        super().__init__(base)
        q, scale = quantize(base.weight.detach())
        self.register_buffer("weight", q, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def dequantized(self) -> Tensor:
        return self.weight * self.scale

    def product(self, x: Tensor) -> Tensor:
        return FrozenProduct.apply(x, Tensor.to, self.scale[:, 0], self.weight)


class Int4Linear(FrozenLinear):
    """int4 weights, two in a byte (columns c and I/2 + c), and a scale for 32 of a row."""

    def __init__(self, base: nn.Linear):
        super().__init__(base)
        if base.in_features % GROUP:
            raise ConfigError(f"int4 needs rows of a multiple of {GROUP} weights, this model has {base.in_features}")
        q, scale = quantize_int4(base.weight.detach())
        low, high = (q + 8).view(torch.uint8).chunk(2, dim=1)
        self.register_buffer("weight", low | high << 4, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def dequantized(self) -> Tensor:
        return int4_matrix(self.weight, self.scale, torch.float32)

    def product(self, x: Tensor) -> Tensor:
        return FrozenProduct.apply(x, int4_matrix, None, self.weight, self.scale)


def int4_matrix(pairs: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    q = torch.cat([pairs & 15, pairs >> 4], dim=1).view(torch.int8) - 8
    return (q.unflatten(1, (-1, GROUP)) * scale[..., None].float()).flatten(1).to(dtype)


ROUNDINGS = {"int8": Int8Linear, "int4": Int4Linear}


def quantize_(language_model: nn.Module, rounding: str = "int8") -> None:
    """Makes every linear layer but the head int8 or int4. The embedding and its tied head stay: they hold the first and last
    word."""
    for name, layer in list(language_model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            parent, _, last = name.rpartition(".")
            setattr(language_model.get_submodule(parent), last, ROUNDINGS[rounding](layer))


def count_weights(module: nn.Module) -> int:
    """Number of parameters, those that are held as int8 or int4 included."""
    frozen = (layer for layer in module.modules() if isinstance(layer, FrozenLinear))
    return count_parameters(module) + sum(layer.in_features * layer.out_features for layer in frozen)


def count_parameters(module: nn.Module, only_trainable: bool = False) -> int:
    """Number of parameters; one that is used twice (a tied head) counts once."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not only_trainable)
