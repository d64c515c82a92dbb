"""The model and its KV cache as the engine uses them: read a prompt into a slot, then one more token per slot.

The last bits of a matrix product depend on the number of rows computed together, and a near tie between two words then
falls differently. Our CPU kernels give each row the same bits in any batch; torch's products do not, so there each row
is computed alone (`is_exact`). On a GPU every step has the same shape (static_step.py).

B rows of a step, T prompt tokens, D hidden size, V vocabulary, N images of side S.
"""

import torch
from torch import Tensor, nn

from mmllm.inference.request import Prefix, Prompt
from mmllm.inference.static_step import StaticStep, round_up
from mmllm.layers.lora import has_adapter
from mmllm.layers.packed import Packed
from mmllm.layers.quantized import FrozenLinear
from mmllm.models.kv_cache import KVCache, PerSlot
from mmllm.models.multimodal import MultimodalLLM


class ModelRunner:
    """Computes logits for `slots` slots; the arguments are those of `Engine`, `is_static` its `use_static_step`."""

    def __init__(
        self, model: MultimodalLLM, slots: int, max_length: int, is_exact: bool, is_compiled: bool, is_static: bool
    ):
        self.model, device = model, model.device
        with torch.inference_mode():
            self.cache = KVCache(model.config.text, slots, round_up(max_length), device=device, dtype=model.dtype)
        self.static_step = StaticStep(model.language_model, self.cache, slots, is_compiled) if is_static else None
        self.is_row_by_row = is_exact and device.type == "cpu" and has_batch_dependent_layer(model.language_model)

    def prefill(self, slot: int, prompt: Prompt, max_new_tokens: int) -> Tensor:
        """Reads a prompt into a slot, with room for its answer. Logits of its first new token, (1, V)."""
        self.make_room(len(prompt.ids) + max_new_tokens)
        prefix, start, pixels_N3SS = prompt.prefix, 0, prompt.pixels
        if prefix is not None and prefix.begins(prompt.ids):
            self.cache.write(slot, prefix.keys_LGTK, prefix.values_LGTK)
            start, pixels_N3SS = len(prefix.ids), prompt.pixels[len(prefix.pixels) :]
        return self._read(self.cache, slot, start, prompt.ids[start:], pixels_N3SS)

    def make_room(self, length: int) -> None:
        """Lets every slot hold at least `length` tokens."""
        if length > self.cache.length:
            self.cache.grow_(round_up(length))

    @torch.inference_mode()
    def encode_prefix(self, ids: tuple[int, ...], pixels_N3SS: Tensor) -> Prefix:
        """The keys and values of a beginning of prompts, computed in a cache of its own."""
        cache = KVCache(self.model.config.text, 1, len(ids), device=self.model.device, dtype=self.model.dtype)
        self._read(cache, 0, 0, ids, pixels_N3SS)
        return Prefix(ids, pixels_N3SS, *cache.read(0, len(ids)))

    def decode(self, slots: list[int], tokens: list[int], positions: list[int]) -> Tensor:
        """Logits (B, V) of what follows `tokens`, which go to `positions` of `slots`."""
        if self.static_step is not None:
            return self.static_step(slots, tokens, positions)
        if self.is_row_by_row and len(slots) > 1:
            rows = zip(slots, tokens, positions, strict=True)
            return torch.cat([self.decode([slot], [token], [position]) for slot, token, position in rows])
        language_model, device = self.model.language_model, self.model.device
        x_B1D = language_model.embed(torch.tensor(tokens, device=device)[:, None])
        positions_B1 = torch.tensor(positions, device=device)[:, None]
        x_B1D = language_model(x_B1D, positions_B1, cache=PerSlot(self.cache, slots, positions))
        return language_model.logits(x_B1D[:, 0])

    def _read(self, cache: KVCache, slot: int, start: int, ids: tuple[int, ...], pixels_N3SS: Tensor) -> Tensor:
        """Reads `ids` into a slot from position `start` on. Logits of what follows them, (1, V)."""
        language_model, device = self.model.language_model, self.model.device
        x_1TD = self.model.embed(torch.tensor([ids], device=device), pixels_N3SS)
        positions_1T = torch.arange(start, start + len(ids), device=device)[None]
        last = torch.tensor([0], device=device), torch.tensor([len(ids) - 1], device=device)
        x_1D = language_model(x_1TD, positions_1T, cache=PerSlot(cache, [slot], [start]), keep=last)
        return language_model.logits(x_1D)


def has_batch_dependent_layer(module: nn.Module) -> bool:
    """Whether some layer is one of torch's matrix products, whose last bits depend on the number of rows."""
    return any(
        isinstance(layer, nn.Linear | FrozenLinear)
        or (isinstance(layer, Packed) and (layer.mixes_rows or has_adapter(layer)))
        for layer in module.modules()
    )
