"""Keys and values of earlier tokens, in slots: decoding a token then computes one token, not the whole text.

How many rows are computed together changes the last bits of most matrix products, and so now and then the choice between
two nearly equal tokens. `PerSlot` computes each row alone, over exactly its own keys, so that the result of a row does not
depend on the other requests in the pass.

Position p of slot s is at index p. So slots of different lengths share one tensor, and whatever padding or an earlier
request left there is overwritten before anything attends to it.

L layers, S slots, B rows of one pass, T tokens, H query heads, G key/value heads, C capacity in tokens, K head size.
"""

import math
import mmap

import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm.models.config import Qwen2Config


class KVCache:
    """Keys and values of every layer and slot, two tensors (L, S, G, C, K)."""

    def __init__(self, config: Qwen2Config, slots: int, length: int, *, device: torch.device, dtype: torch.dtype):
        shape = (config.num_hidden_layers, slots, config.num_key_value_heads, length, config.head_dim)
        self._take(zeros(shape, device, dtype), zeros(shape, device, dtype))

    def _take(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        # views (1, G, C, K) of each layer's slots: making them in every step takes 1 % of its time
        self.slot_keys = [layer.split(1) for layer in keys]
        self.slot_values = [layer.split(1) for layer in values]

    @property
    def length(self) -> int:
        return self.keys.shape[3]

    def grow_(self, length: int) -> None:
        """Makes room for `length` tokens in every slot and keeps the contents."""
        more = length - self.length
        self._take(F.pad(self.keys, (0, 0, 0, more)), F.pad(self.values, (0, 0, 0, more)))

    def clear_(self, slots: list[int]) -> None:
        """Sets slots to 0: `AllSlots` also reads masked positions, where a NaN of an earlier request would spread."""
        for tensor in (self.keys, self.values):
            tensor[:, slots] = 0

    def copy_(self, sources: list[int], slots: list[int], length: int) -> None:
        """Copies slot `sources[i]` to slot `slots[i]`, up to `length` tokens, all at once (beam search)."""
        for tensor in (self.keys, self.values):
            tensor[:, slots, :, :length] = tensor[:, sources, :, :length]

    def read(self, slot: int, start: int, end: int) -> Tensor:
        """A copy of the keys and values of positions `start` to `end` of a slot, (2, L, G, end - start, K)."""
        return torch.stack([tensor[:, slot, :, start:end] for tensor in (self.keys, self.values)])

    def write(self, slot: int, start: int, block_2LGTK: Tensor) -> None:
        """Puts what `read` returned at position `start` of a slot."""
        for tensor, block_LGTK in zip((self.keys, self.values), block_2LGTK, strict=True):
            tensor[:, slot, :, start : start + block_LGTK.shape[2]] = block_LGTK


def zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Zeros, which on a CPU take memory only where they are written: torch.zeros writes all of them, and numpy.zeros takes
    huge pages, so that the first token of a slot would write 100 MB.
    """
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)


class PerSlot:
    """The cache of one forward pass: row b continues slot `slots[b]` at position `starts[b]`."""

    def __init__(self, cache: KVCache, slots: list[int], starts: list[int]):
        self.cache, self.rows = cache, list(zip(slots, starts, strict=True))

    def attend(self, layer: int, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
        slot_keys, slot_values = self.cache.slot_keys[layer], self.cache.slot_values[layer]
        tokens = q_BHTK.shape[2]
        each = zip(self.rows, q_BHTK.split(1), k_BGTK.split(1), v_BGTK.split(1), strict=True)
        outputs = []
        for (slot, start), q_1HTK, k_1GTK, v_1GTK in each:
            keys, values = slot_keys[slot], slot_values[slot]
            keys.narrow(2, start, tokens).copy_(k_1GTK)
            values.narrow(2, start, tokens).copy_(v_1GTK)
            outputs.append(attend_row(q_1HTK, keys.narrow(2, 0, start + tokens), values.narrow(2, 0, start + tokens)))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def attend_row(q_1HTK: Tensor, k_1GSK: Tensor, v_1GSK: Tensor) -> Tensor:
    """Causal attention of the last T of S positions."""
    tokens, positions = q_1HTK.shape[2], k_1GSK.shape[2]
    if tokens == 1:
        return attend_once(q_1HTK, k_1GSK, v_1GSK, None)
    if tokens == positions:
        return F.scaled_dot_product_attention(q_1HTK, k_1GSK, v_1GSK, is_causal=True, enable_gqa=True)
    sees_TS = torch.ones(tokens, positions, dtype=torch.bool, device=q_1HTK.device).tril(positions - tokens)
    return F.scaled_dot_product_attention(q_1HTK, k_1GSK, v_1GSK, attn_mask=sees_TS, enable_gqa=True)


def attend_once(q_BH1K: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, sees_B11S: Tensor | None) -> Tensor:
    """Attention of one query per head. The H/G heads that share a key head become H/G queries of it, which is faster and,
    on a GPU, works with a mask."""
    q_BGNK = q_BH1K.reshape(len(q_BH1K), k_BGSK.shape[1], -1, q_BH1K.shape[-1])
    return F.scaled_dot_product_attention(q_BGNK, k_BGSK, v_BGSK, attn_mask=sees_B11S).reshape(q_BH1K.shape)


class AllSlots:
    """The cache of one decoding step of fixed shape, for compiled code and CUDA graphs: row s is slot s.

    Each row writes its one token at `positions_S` and attends to the first `length` positions, masked.
    """

    def __init__(self, cache: KVCache, positions_S: Tensor, length: int):
        self.cache, self.positions_S, self.length = cache, positions_S, length
        self.rows_S = torch.arange(len(positions_S), device=positions_S.device)
        self.sees_S11C = (torch.arange(length, device=positions_S.device) <= positions_S[:, None])[:, None, None]

    def attend(self, layer: int, q_SH1K: Tensor, k_SG1K: Tensor, v_SG1K: Tensor) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.rows_S, :, self.positions_S] = k_SG1K[:, :, 0]
        values[self.rows_S, :, self.positions_S] = v_SG1K[:, :, 0]
        return attend_once(q_SH1K, keys[:, :, : self.length], values[:, :, : self.length], self.sees_S11C)
