"""A frozen weight in a quarter of its memory: int8 with one scale per output row.

The surprising fact: rounding the scale makes everything else exact. With 16 bits of mantissa, q * scale fits float32 to
the last bit, and quantising that again gives the same q and scale. So a checkpoint of an int8 run is written as plain
float32 weights that any program reads, and resumes bit for bit.

Only the weights are rounded: the products are those of the rounded matrix. Formula: symmetric, per row, as in
https://github.com/pytorch-labs/gpt-fast (quantize.py). Next: lora.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MANTISSA_BITS = 16  # of a scale: 7 bits of q and these fit the 24 of float32
LARGEST = 127


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight` (O, I) as int8 (O, I) and float32 scales (O, 1): weight is about q * scale, off by at most scale / 2."""
    largest = weight.float().abs().amax(1, keepdim=True)
    fraction, exponent = torch.frexp(largest / LARGEST)
    scale = torch.ldexp(torch.ceil(fraction * 2**MANTISSA_BITS), exponent - MANTISSA_BITS)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (weight.float() / scale).round().clamp(-LARGEST, LARGEST).to(torch.int8), scale


class Int8Product(torch.autograd.Function):
    """x W^T for a frozen int8 W, and its gradient for x; what is kept for it is W alone, in int8."""

    @staticmethod
    def forward(ctx, x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(q, scale)
        return F.linear(x, q.to(x.dtype)) * scale.to(x.dtype)[:, 0]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        q, scale = ctx.saved_tensors
        return (gradient * scale.to(gradient.dtype)[:, 0]) @ q.to(gradient.dtype), None, None


class Int8Linear(nn.Module):
    """A frozen linear layer whose weight is int8. Its state dict holds the weight as float32, under its old name."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.training = base.in_features, base.out_features, base.training
        q, scale = quantize(base.weight.detach())
        self.register_buffer("weight", q, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        with torch.autocast(x.device.type, enabled=False):
            y = Int8Product.apply(x, self.weight, self.scale)
            return y if self.bias is None else y + self.bias.to(y.dtype)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight * self.scale


def quantize_(language_model: nn.Module) -> None:
    """Makes every linear layer but the head int8. The embedding and its tied head stay: they hold the first and last word."""
    for name, layer in list(language_model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            parent, _, last = name.rpartition(".")
            setattr(language_model.get_submodule(parent), last, Int8Linear(layer))
