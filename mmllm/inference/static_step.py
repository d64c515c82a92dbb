"""A decoding step of one fixed shape, for GPUs that spend more time launching kernels than running them.

On a large GPU a step of this model is some 300 kernels of a few microseconds each, and launching them takes four times
as long as their work. A CUDA graph launches all of them at once. It needs the same addresses and shapes each time, so
every slot takes part, in use or not. `torch.compile` uses the same fixed shape to make fewer, larger kernels.

S slots, V vocabulary.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from mmllm.models.kv_cache import AllSlots, KVCache
from mmllm.models.qwen import Qwen2
from mmllm.runtime.machine import cache_folder

BUCKET = 256  # the cache and the length of attention are multiples of this: few shapes, little waste


def round_up(length: int) -> int:
    return -(-length // BUCKET) * BUCKET


class StaticStep:
    """Logits of the next tokens, by a CUDA graph or by compiled code for each length of attention."""

    def __init__(self, language_model: Qwen2, cache: KVCache, slots: int, is_compiled: bool):
        self.language_model, self.cache = language_model, cache
        device = cache.keys.device
        self.tokens_S = torch.zeros(slots, dtype=torch.long, device=device)
        self.positions_S = torch.zeros(slots, dtype=torch.long, device=device)
        self.forward = compile_step(self._forward) if is_compiled else self._forward
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.captured_keys = cache.keys

    def __call__(self, slots: list[int], tokens: list[int], positions: list[int]) -> Tensor:
        """Logits (B, V) of what follows `tokens`, which go to `positions` of `slots`."""
        # A slot that takes no part writes to the last position, which its request overwrites before it is read.
        all_tokens, all_positions = [0] * len(self.tokens_S), [self.cache.length - 1] * len(self.tokens_S)
        for slot, token, position in zip(slots, tokens, positions, strict=True):
            all_tokens[slot], all_positions[slot] = token, position
        self.tokens_S.copy_(torch.tensor(all_tokens))
        self.positions_S.copy_(torch.tensor(all_positions))
        length = min(round_up(max(positions) + 1), self.cache.length)
        logits_SV = self._replay(length) if self.tokens_S.is_cuda else self.forward(length)
        if slots == list(range(len(logits_SV))):
            return logits_SV
        return torch.stack([logits_SV[slot] for slot in slots])  # indexing by a list would wait for the device

    def _forward(self, length: int) -> Tensor:
        cache = AllSlots(self.cache, self.positions_S, length)
        x_S1D = self.language_model.embed(self.tokens_S[:, None])
        return self.language_model.logits(self.language_model(x_S1D, self.positions_S[:, None], cache=cache)[:, 0])

    def _replay(self, length: int) -> Tensor:
        """Runs the graph for `length`, captured when the length is new or the cache has been reallocated."""
        if self.captured_keys is not self.cache.keys:
            self.graphs.clear()
            self.captured_keys = self.cache.keys
        if length not in self.graphs:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # the work of first calls must not become part of the graph
                for _ in range(2):
                    self.forward(length)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits_SV = self.forward(length)
            self.graphs[length] = graph, logits_SV
        graph, logits_SV = self.graphs[length]
        graph.replay()
        return logits_SV


def compile_step(step: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    """`step` compiled anew for each length. The results are kept on disk beside our own kernels."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
    lengths = 2**15 // BUCKET
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, lengths)
    return torch.compile(step, dynamic=False)
