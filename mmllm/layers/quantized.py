"""Frozen linear layers to train adapters beside: int8 in a quarter of the memory of float32, or int4 in an eighth.

Only the weights are rounded; the products are those of the rounded matrix, which a checkpoint holds as plain float32. Why
that loses nothing, and the formulas: kernels/reference.py. Quantised layers for inference: packed.py.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.errors import ConfigError
from mmllm.kernels.reference import GROUP, int4_matrix, quantize_int4, quantize_int8


class FrozenProduct(torch.autograd.Function):
    """x W^T for a frozen quantised W, and its gradient for x. Only W is kept for the backward pass, as the layer holds it.

    W is `matrix(*held, dtype)`, (out, in), times `row` (out) where that is not None.
    """

    @staticmethod
    def forward(ctx, x: Tensor, matrix: Callable[..., Tensor], row: Tensor | None, *held: Tensor) -> Tensor:
        ctx.save_for_backward(row, *held)
        ctx.matrix = matrix
        y = F.linear(x, matrix(*held, x.dtype))
        return y if row is None else y * row.to(x.dtype)

    @staticmethod
    def backward(ctx, of_y: Tensor) -> tuple[Tensor | None, ...]:
        row, *held = ctx.saved_tensors
        of_y = of_y if row is None else of_y * row.to(of_y.dtype)
        return of_y @ ctx.matrix(*held, of_y.dtype), None, None, *(None for _ in held)


class FrozenLinear(nn.Module):
    """A frozen linear layer with a rounded weight. Its state dict holds the weight as float32, under the usual name."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.training = base.in_features, base.out_features, base.training
        self.bias = base.bias

    def dequantized(self) -> Tensor:
        """The rounded matrix, float32 (out, in)."""
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
    """int8 weights, one scale per row."""

    def __init__(self, base: nn.Linear):
        super().__init__(base)
        q, scale = quantize_int8(base.weight.detach())
        self.register_buffer("weight", q, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def dequantized(self) -> Tensor:
        return self.weight * self.scale

    def product(self, x: Tensor) -> Tensor:
        return FrozenProduct.apply(x, Tensor.to, self.scale[:, 0], self.weight)


class Int4Linear(FrozenLinear):
    """int4 weights, two in a byte (columns c and in/2 + c), one scale per 32 of a row."""

    def __init__(self, base: nn.Linear):
        super().__init__(base)
        if base.in_features % GROUP:
            raise ConfigError(f"int4 needs rows of a multiple of {GROUP} weights, this model has {base.in_features}")
        q, scale = quantize_int4(base.weight.detach())
        low, high = (q + 8).view(torch.uint8).chunk(2, dim=1)
        self.register_buffer("weight", low | high << 4, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def dequantized(self) -> Tensor:
        return unpacked_matrix(self.weight, self.scale, torch.float32)

    def product(self, x: Tensor) -> Tensor:
        return FrozenProduct.apply(x, unpacked_matrix, None, self.weight, self.scale)


def unpacked_matrix(pairs: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    q = torch.cat([pairs & 15, pairs >> 4], dim=1).view(torch.int8) - 8
    return int4_matrix(q, scale).to(dtype)


ROUNDINGS = {"int8": Int8Linear, "int4": Int4Linear}


def linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The linear layers but the head, by name."""
    layers = module.named_modules()
    return {name: layer for name, layer in layers if isinstance(layer, nn.Linear | FrozenLinear) and name != "lm_head"}


def quantize_(language_model: nn.Module, rounding: str = "int8") -> None:
    """Makes every linear layer but the head int8 or int4. Head and embedding stay, as rounding costs most there."""
    for name, layer in linear_layers(language_model).items():
        language_model.set_submodule(name, ROUNDINGS[rounding](layer))


def count_weights(module: nn.Module) -> int:
    """Number of parameters, including those that are held as int8 or int4, also by layers of packed.py."""
    held = [each for each in module.modules() if hasattr(each, "out_features") and not isinstance(each, nn.Linear)]
    biases = sum(layer.out_features for layer in held if "bias" in layer._buffers and layer.bias is not None)
    return count_parameters(module) + biases + sum(layer.in_features * layer.out_features for layer in held)


def count_parameters(module: nn.Module, only_trainable: bool = False) -> int:
    """Number of parameters; one that is used twice (a tied head) counts once."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not only_trainable)
