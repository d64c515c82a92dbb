"""The model and its KV cache as the engine uses them: read pieces of prompts into slots, and one more token per slot.

The last bits of a matrix product depend on the number of rows computed together, and a near tie between two words then
falls differently. Our CPU kernels give each row the same bits in any batch, so there everything that a step has to read,
tokens of answers and of prompts, goes through the model in one pass, each token as a row of its own (`is_row_exact`).
torch's products do not: there a prompt is read alone, in blocks of a fixed length, and each answer's token alone
(`is_exact`). On a GPU every decoding step has the same shape (static_step.py).

Either way a prompt gets the same bits however it is cut, so keys and values of whole blocks may be used again.

B rows of a step, T tokens of a piece, D hidden size, V vocabulary, N images of side S, Q visual tokens each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmllm.inference.optimize import step_of
from mmllm.inference.static_step import LONGEST, StaticStep, round_up
from mmllm.layers.lora import has_adapter
from mmllm.layers.packed import Packed
from mmllm.layers.quantized import FrozenLinear
from mmllm.models.kv_cache import KVCache, PerSlot
from mmllm.models.multimodal import MultimodalLLM
from mmllm.models.qwen import rope_tables

ROW_EXACT_BLOCK = 16  # tokens of a block where a piece may end anywhere: the unit in which prefixes are kept
BLOCKS = {"cpu": 64, "cuda": LONGEST, "mps": 256}  # elsewhere also the piece in which prompts are read


@dataclass(frozen=True)
class Piece:
    """The next tokens of a prompt, as embeddings, and where they go; `is_last` where the prompt ends with them."""

    slot: int
    start: int
    x_TD: Tensor
    is_last: bool


class ModelRunner:
    """Computes logits for `slots` slots; the arguments are those of `Engine`, `is_static` its `use_static_step`."""

    def __init__(self, model: MultimodalLLM, slots: int, max_length: int, is_exact: bool, is_static: bool):
        self.model, device = model, model.device
        with torch.inference_mode():
            self.cache = KVCache(model.config.text, slots, round_up(max_length), device=device, dtype=model.dtype)
        self.rope = torch.empty(2, 0)
        self.static_step = StaticStep(model.language_model, self.cache, slots) if is_static else None
        mixes_rows = has_batch_dependent_layer(model.language_model)
        self.is_row_by_row = is_exact and device.type == "cpu" and mixes_rows
        self.step = None if is_static else step_of(model.language_model)
        self.is_row_exact = self.step is not None
        self.make_room(max_length)
        self.block = ROW_EXACT_BLOCK if self.is_row_exact else BLOCKS[device.type]

    def make_room(self, length: int) -> None:
        """Lets every slot hold at least `length` tokens."""
        if length > self.cache.length:
            self.cache.grow_(round_up(length))
        if self.step is not None and len(self.rope[0]) < self.cache.length:
            positions = torch.arange(self.cache.length)[None]
            self.rope = [table[0, 0] for table in rope_tables(self.model.config.text, positions)]

    def encode_image(self, pixels_3SS: Tensor) -> Tensor:
        """The visual tokens of one image, (Q, D): alone, so that its bits do not depend on other images."""
        if self.static_step is not None:
            return self.static_step.encode_image(self.model.encode_images, pixels_3SS)
        return self.model.encode_images(pixels_3SS[None])[0]

    def embed(self, ids: list[int] | tuple[int, ...], images_ND: Tensor | None = None) -> Tensor:
        """Embeddings (T, D) of tokens, in which `images_ND` takes the places of images."""
        ids_T = torch.tensor(ids, dtype=torch.long, device=self.model.device)
        x_TD = self.model.language_model.embed(ids_T).to(self.model.dtype)  # it may be held in bfloat16
        if images_ND is None:
            return x_TD
        is_image_T1 = (ids_T == self.model.config.image_token_id)[:, None]
        return x_TD.masked_scatter(is_image_T1, images_ND.to(x_TD.dtype))

    def run(self, slots: list[int], tokens: list[int], positions: list[int], pieces: list[Piece]) -> Tensor:
        """One pass. `tokens`, the last ones of answers, go to `positions` of `slots`; several things to read together
        need `is_row_exact`.

        Returns the logits of what follows each of `tokens` and each last piece, in this order, (B, V).
        """
        if not pieces:
            return self.decode(slots, tokens, positions)
        if self.is_row_exact:
            return self._run_together(slots, tokens, positions, pieces)
        (piece,) = pieces
        if self.static_step is not None and self.static_step.ours is not None:
            logits_1V = self.static_step.read(piece.slot, piece.start, piece.x_TD)
            return logits_1V[: piece.is_last]
        x_1TD, cache = piece.x_TD[None], PerSlot(self.cache, [piece.slot], [piece.start])
        positions_1T = torch.arange(piece.start, piece.start + x_1TD.shape[1], device=x_1TD.device)[None]
        return self._logits(x_1TD, positions_1T, cache, [(0, x_1TD.shape[1] - 1)] if piece.is_last else [])

    def decode(self, slots: list[int], tokens: list[int], positions: list[int]) -> Tensor:
        """Logits (B, V) of what follows `tokens`, which go to `positions` of `slots`."""
        if self.static_step is not None:
            return self.static_step(slots, tokens, positions)
        if self.is_row_by_row and len(slots) > 1:
            rows = zip(slots, tokens, positions, strict=True)
            return torch.cat([self.decode([slot], [token], [position]) for slot, token, position in rows])
        return self._run_together(slots, tokens, positions, [])

    def _run_together(self, slots: list[int], tokens: list[int], positions: list[int], pieces: list[Piece]) -> Tensor:
        """Every token is a row of its own; those of one slot are in order, so that each finds the earlier ones."""
        slots, positions, keep = list(slots), list(positions), [(row, 0) for row in range(len(tokens))]
        x_BD = torch.cat([self.embed(tokens), *(piece.x_TD for piece in pieces)])
        for piece in pieces:
            slots += [piece.slot] * len(piece.x_TD)
            positions += range(piece.start, piece.start + len(piece.x_TD))
            if piece.is_last:
                keep.append((len(positions) - 1, 0))
        if self.step is not None:
            rows = [row for row, _ in keep]
            return self.step.run(x_BD, slots, positions, rows, *self.rope, self.cache.keys, self.cache.values)
        positions_B1 = torch.tensor(positions, device=x_BD.device)[:, None]
        cache = PerSlot(self.cache, slots, positions)
        return self._logits(x_BD[:, None], positions_B1, cache, keep)

    def _logits(self, x_BTD: Tensor, positions_BT: Tensor, cache: PerSlot, keep: list[tuple[int, int]]) -> Tensor:
        """Logits of the tokens `keep`, given as (row, column), (M, V)."""
        rows_M, columns_M = torch.tensor(keep, dtype=torch.long, device=x_BTD.device).view(-1, 2).unbind(1)
        x_MD = self.model.language_model(x_BTD, positions_BT, cache=cache, keep=(rows_M, columns_M))
        return self.model.language_model.logits(x_MD)


def has_batch_dependent_layer(module: nn.Module) -> bool:
    """Whether some layer is one of torch's matrix products, whose last bits depend on the number of rows."""
    return any(
        isinstance(layer, nn.Linear | FrozenLinear)
        or (isinstance(layer, Packed) and (layer.mixes_rows or has_adapter(layer)))
        for layer in module.modules()
    )
