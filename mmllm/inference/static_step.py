"""Passes of fixed shapes, for GPUs that spend more time launching kernels than running them.

A CUDA graph launches all kernels of a pass at once. It needs the same addresses and shapes each time, so in a decoding
step every slot takes part, in use or not. Where our own kernels run (kernels/gpu.py) the step is one graph, and pieces of
prompts are padded to one of a few lengths; in torch's operators, for models that they do not know, the step is a graph for
each length of attention.

S slots, T tokens of a piece, D hidden size, V vocabulary, B rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmllm.kernels import gpu
from mmllm.kernels.gpu import Matrix
from mmllm.layers.lora import has_adapter
from mmllm.layers.packed import Int8Packed
from mmllm.models.kv_cache import AllSlots, KVCache
from mmllm.models.qwen import Qwen2, rope_tables
from mmllm.runtime.console import stderr_rank0

BUCKET = 256  # the cache and the length of attention are multiples of this: few shapes, little waste
PIECES = 16, 64, 128, 192, 256  # tokens of a piece of a prompt, with padding
LONGEST = PIECES[-1]


def round_up(length: int) -> int:
    return -(-length // BUCKET) * BUCKET


class StaticStep:
    """The language model's passes, each in one of few shapes; on a GPU a pass is a CUDA graph, captured when it is new."""

    def __init__(self, language_model: Qwen2, cache: KVCache, slots: int):
        self.language_model, self.cache, device = language_model, cache, cache.keys.device
        self.ours = None
        if gpu.native(device):
            self.ours = step_of(language_model, cache.keys.dtype)
            if self.ours is None:
                stderr_rank0("kernels: torch's own for this model, whose layers or dtype ours do not know")
        self.inputs_2S = torch.zeros(2, slots, dtype=torch.long, device=device)  # tokens and their positions
        self.slots_S = torch.arange(slots, device=device)
        self.piece_3T = torch.zeros(3, LONGEST, dtype=torch.long, device=device)  # slot, positions, the last of them
        self.piece_TD = torch.zeros(LONGEST, language_model.config.hidden_size, device=device)
        self.pixels_3SS: Tensor | None = None
        self.graphs: dict[object, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.captured_keys = self.rope = None

    def __call__(self, slots: list[int], tokens: list[int], positions: list[int]) -> Tensor:
        """Logits (B, V) of what follows `tokens`, which go to `positions` of `slots`."""
        # In torch's operators a slot that takes no part writes to the last position, which its request overwrites before
        # it is read.
        count, unused = len(self.slots_S), self.cache.length - 1 if self.ours is None else -1
        all_tokens, all_positions = [0] * count, [unused] * count
        for slot, token, position in zip(slots, tokens, positions, strict=True):
            all_tokens[slot], all_positions[slot] = token, position
        self.inputs_2S.copy_(torch.tensor([all_tokens, all_positions]))
        length = round_up(max(positions) + 1) if self.ours is None else self.cache.length
        length = min(length, self.cache.length)
        logits_SV = self._run(length, lambda: self._decode(length))
        if slots == list(range(count)):
            return logits_SV
        return torch.stack([logits_SV[slot] for slot in slots])  # indexing by a list would wait for the device

    def read(self, slot: int, start: int, x_TD: Tensor) -> Tensor:
        """Logits (1, V) of what follows a piece of a prompt, of at most LONGEST tokens; needs our kernels."""
        tokens = len(x_TD)
        rows = next(rows for rows in PIECES if rows >= tokens)
        positions = [*range(start, start + tokens), *[-1] * (rows - tokens)]
        self.piece_3T[:, :rows].copy_(torch.tensor([[slot] * rows, positions, [tokens - 1] * rows]))
        self.piece_TD[:tokens].copy_(x_TD)
        return self._run(("piece", rows), lambda: self._read(rows))

    def encode_image(self, encode: Callable[[Tensor], Tensor], pixels_3SS: Tensor) -> Tensor:
        """encode(pixels_3SS[None])[0]."""
        if self.pixels_3SS is None:
            self.pixels_3SS = torch.empty_like(pixels_3SS, device=self.slots_S.device)
        self.pixels_3SS.copy_(pixels_3SS)
        return self._run("image", lambda: encode(self.pixels_3SS[None])[0]).clone()

    def _decode(self, length: int) -> Tensor:
        tokens_S, positions_S = self.inputs_2S
        model, cache = self.language_model, self.cache
        if self.ours is not None:
            x_SD = model.embed(tokens_S).float()
            return self.ours(x_SD, self.slots_S, positions_S, cache.keys, cache.values, self.rope)
        attention = AllSlots(cache, positions_S, length)
        return model.logits(model(model.embed(tokens_S[:, None]), positions_S[:, None], cache=attention)[:, 0])

    def _read(self, rows: int) -> Tensor:
        slots_T, positions_T, last_T = self.piece_3T[:, :rows]
        x_TD = self.piece_TD[:rows].clone()
        return self.ours(x_TD, slots_T, positions_T, self.cache.keys, self.cache.values, self.rope, last_T[:1])

    def _run(self, name: object, work: Callable[[], Tensor]) -> Tensor:
        """What `work` returns: on a GPU by its graph, captured when the name is new or the cache has been reallocated."""
        if self.captured_keys is not self.cache.keys:
            self.graphs.clear()
            self.captured_keys = self.cache.keys
            positions_1C = torch.arange(self.cache.length, device=self.slots_S.device)[None]
            self.rope = tuple(table[0, 0] for table in rope_tables(self.language_model.config, positions_1C))
        if not self.inputs_2S.is_cuda:
            return work()
        if name not in self.graphs:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # the work of first calls must not become part of the graph
                for _ in range(2):
                    work()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = work()
            self.graphs[name] = graph, result
        graph, result = self.graphs[name]
        graph.replay()
        return result


def step_of(language_model: Qwen2, dtype: torch.dtype) -> gpu.Step | None:
    """The language model for our kernels; None with layers, a head size or a dtype that they do not know."""
    size, layers = language_model.config.head_dim, language_model.model.layers
    linears = [*(module for layer in layers for module in layer.modules()), language_model.lm_head]
    linears = [module for module in linears if hasattr(module, "out_features")]
    is_known = all(isinstance(each, nn.Linear | Int8Packed) and not has_adapter(each) for each in linears)
    if not is_known or size < 16 or size & (size - 1) or dtype not in (torch.bfloat16, torch.float32):
        return None
    made = []
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        norms += [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        matrices = [matrix_of(attention.q_proj, attention.k_proj, attention.v_proj)]
        matrices += map(matrix_of, (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        made.append(gpu.Layer(*matrices, *(norm if norm is None else norm.weight.detach() for norm in norms)))
    norm, config = language_model.model.norm, language_model.config
    head = matrix_of(language_model.lm_head)
    return gpu.Step(made, norm.weight.detach(), head, norm.eps, config.num_attention_heads, dtype)


def matrix_of(*layers: nn.Module) -> Matrix:
    """The matrix of a layer, or of several one below the other."""
    rows = [layer.q if isinstance(layer, Int8Packed) else layer.weight.detach() for layer in layers]
    scales = [getattr(layer, "scale", None) for layer in layers]
    biases = [None if layer.bias is None else layer.bias.detach() for layer in layers]
    together = ((each[0] if len(each) == 1 or each[0] is None else torch.cat(each)) for each in (rows, scales, biases))
    return Matrix(*together)
