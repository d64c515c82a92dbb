"""Linear layers for inference only: int8, int4 or bfloat16 weights, in the order in which the kernels read them.

int8: y = x (q s)^T, one scale per row; x is rounded to 16 bits, by "int8-dynamic" to 8. int4: one scale per 32 weights; the
head stays int8. bfloat16: only the weights are rounded. Activations are float32 on a CPU. Formulas: kernels/reference.py;
layers to train beside: quantized.py.

An embedding and its tied head are one int8 matrix (27 % of what Qwen2.5-0.5B reads for a token): a row that is looked up
is a row of q times its scale.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmllm.errors import UserError
from mmllm.kernels import cpu as kernels
from mmllm.kernels import gpu, reference
from mmllm.layers.lora import has_adapter, move_adapter_
from mmllm.layers.quantized import FrozenLinear, linear_layers

BITS = {"int8": 16, "int8-dynamic": 8}  # of an activation as an integer


class Packed(nn.Module):
    """A linear layer with its bias in float32. `mixes_rows`: whether the last bits of a row depend on the other rows."""

    mixes_rows = False

    def __init__(self, layer: nn.Module, panels: Tensor, scale: Tensor | None = None):
        super().__init__()
        self.in_features, self.out_features, self.training = layer.in_features, layer.out_features, False
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float())
        self.register_buffer("panels", panels)
        self.register_buffer("scale", scale)


class Int8Packed(Packed):
    """int8 rows: `panels` where the kernels run, plain rows `q` elsewhere. A state dict always holds panels."""

    def __init__(self, layer: nn.Module, panels: Tensor, scale: Tensor, bits: int = BITS["int8"]):
        super().__init__(layer, panels, scale)
        self.bits = bits
        self.register_buffer("q", None, persistent=False)

    @classmethod
    def of(cls, layer: nn.Module, bits: int = BITS["int8"]) -> "Int8Packed":
        weight = weight_of(layer)
        if is_native(weight):
            return cls(layer, *torch.ops.mmllm.int8_pack(weight), bits)
        q, scale = reference.quantize_int8(weight)
        return cls(layer, kernels.panels(q), scale[:, 0], bits).to_device_layout_()

    @classmethod
    def empty(cls, layer: nn.Module) -> "Int8Packed":
        """Only the shapes, to load into."""
        shape = (-(-layer.out_features // 16), -(-layer.in_features // 4), 16, 4)
        panels = torch.empty(shape, dtype=torch.uint8, device="meta")
        return cls(layer, panels, torch.empty(layer.out_features, device="meta"))

    def to_device_layout_(self) -> "Int8Packed":
        if not is_native(self.panels):
            self.q = self.int8_rows(torch.arange(self.out_features, device=self.panels.device)).contiguous()
            self.panels = self.panels[:0]
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.q is not None:
            destination[f"{prefix}panels"] = kernels.panels(self.q)

    def int8_rows(self, numbers: Tensor) -> Tensor:
        rows = kernels.rows_of_panels(self.panels, numbers) if self.q is None else self.q[numbers]
        return rows[..., : self.in_features]

    def rows(self, numbers: Tensor) -> Tensor:
        """The rows with these numbers, (..., in_features): float32, on a GPU bfloat16."""
        rows = self.int8_rows(numbers) * self.scale[numbers, None]
        return rows.bfloat16() if rows.is_cuda else rows

    def forward(self, x: Tensor) -> Tensor:
        if self.q is None:
            return torch.ops.mmllm.int8_linear(x, self.panels, self.scale, self.bias, self.bits)
        if x.is_cuda:
            return gpu.int8_linear(x, self.q, self.scale, self.bias)
        return reference.int8_linear(x, self.q, self.scale, self.bias, self.bits)


class Int4Packed(Packed):
    """int4 with one scale per 32 weights; without the kernels each product makes the float matrix again."""

    @property
    def mixes_rows(self) -> bool:
        return not is_native(self.panels)

    @classmethod
    def of(cls, layer: nn.Module, moments: dict[nn.Module, Tensor]) -> "Int4Packed":
        """`moments`: the second moments (K, K) of what a layer reads, for those to be rounded by them."""
        weight = weight_of(layer)
        if weight.shape[1] % reference.GROUP:
            raise UserError(
                f"int4 needs rows of a multiple of {reference.GROUP} weights, this model has {weight.shape[1]}; use int8"
            )
        if layer in moments:
            return cls(layer, *kernels.int4_panels(*reference.quantize_int4_for(weight, moments[layer])))
        if is_native(weight):
            return cls(layer, *torch.ops.mmllm.int4_pack(weight))
        return cls(layer, *kernels.int4_panels(*reference.quantize_int4(weight)))

    @classmethod
    def empty(cls, layer: nn.Module) -> "Int4Packed":
        """Only the shapes, to load into."""
        count, groups = -(-layer.out_features // 16), layer.in_features // reference.GROUP
        panels = torch.empty(count, groups, 4, 64, dtype=torch.uint8, device="meta")
        return cls(layer, panels, torch.empty(count, groups, 16, dtype=torch.bfloat16, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        if is_native(x):
            return torch.ops.mmllm.int4_linear(x, self.panels, self.scale, self.bias, self.out_features)
        q, scale = kernels.rows_of_int4_panels(self.panels, self.scale, self.out_features)
        return reference.int4_linear(x, reference.int4_matrix(q, scale), self.bias)


class Bf16Packed(Packed):
    """bfloat16 weights under float32 activations."""

    def __init__(self, layer: nn.Module):
        super().__init__(layer, torch.ops.mmllm.bf16_pack(weight_of(layer)))

    def rows(self, numbers: Tensor) -> Tensor:
        return self.panels[numbers // 16, :, numbers % 16].float()[..., : self.in_features]

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mmllm.bf16_linear(x, self.panels, self.bias, self.out_features)


class PackedEmbedding(nn.Module):
    """Looks rows up in a packed matrix. A tied head is that matrix: it belongs to the head, and is saved once."""

    def __init__(self, matrix: Packed, is_tied: bool):
        super().__init__()
        if is_tied:
            self.held = (matrix,)  # in a tuple it is no child, so that a state dict has no second copy
        else:
            self.matrix = matrix
        self.is_tied = is_tied

    def forward(self, ids: Tensor) -> Tensor:
        return (self.held[0] if self.is_tied else self.matrix).rows(ids)


def is_native(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and kernels.native()


def weight_of(layer: nn.Module) -> Tensor:
    """The matrix of a layer in float32 or bfloat16."""
    weight = layer.dequantized() if isinstance(layer, FrozenLinear) else layer.weight.detach()
    return weight if weight.dtype in (torch.float32, torch.bfloat16) else weight.float()


# A whole language model -----------------------------------------------------------------------------------------------

Make = Callable[[nn.Module], Packed]


def pack_(language_model: nn.Module, make: Make, make_head: Make) -> None:
    """Replaces every linear layer by `make` of it, head and embedding by `make_head`; a tied head stays tied."""
    replace_linear_(language_model, make)
    embedding, is_tied = language_model.model.embed_tokens, language_model.config.tie_word_embeddings
    head = language_model.lm_head = make_head(language_model.lm_head)
    matrix = head if is_tied else make_head(as_linear(embedding))
    language_model.model.embed_tokens = PackedEmbedding(matrix, is_tied)


def replace_linear_(module: nn.Module, make: Make) -> None:
    """Replaces every linear layer but a head by `make` of it. Adapters stay beside their layers."""
    for name, layer in linear_layers(module).items():
        new = make(layer)
        if has_adapter(layer):
            move_adapter_(layer, new)
        module.set_submodule(name, new)


def as_linear(embedding: nn.Embedding) -> nn.Linear:
    layer = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False, device="meta")
    layer.weight = embedding.weight
    return layer


def empty_(model: nn.Module, precision: str) -> None:
    """The shapes of a model packed in int8 or int4, to load its file into."""
    layer = Int4Packed if precision == "int4" else Int8Packed
    pack_(model.language_model, layer.empty, Int8Packed.empty)
    replace_linear_(model.vision_tower, Int8Packed.empty)


def to_device_layout_(module: nn.Module, bits: int = BITS["int8"]) -> None:
    """Gives int8 layers that were loaded the layout of their device, and activations of `bits`."""
    for layer in module.modules():
        if isinstance(layer, Int8Packed):
            layer.to_device_layout_().bits = bits
