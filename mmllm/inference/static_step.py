"""A decoding step of one fixed shape, for machines that are slowed down by starting work and not by doing it.

The surprising fact: on a large GPU this model's step is some 300 kernels of a few microseconds, and telling the GPU to
start them takes four times as long as the work. A CUDA graph is told once and then runs as one; it needs the same
addresses and shapes each time, so every slot takes part, taken or not. The same shape serves `torch.compile`, which
makes fewer, larger kernels.

S slots, V vocabulary. Next: engine.py.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from mmllm.models.kv_cache import AllSlots, KVCache
from mmllm.models.qwen import Qwen2
from mmllm.runtime.machine import cache_folder

BUCKET = 256  # attention goes over a multiple of so many positions: few shapes, little waste


def compiled(step: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    """Compiled for each length; what was compiled is kept from run to run where our own kernels are."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
    lengths = 2**15 // BUCKET
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, lengths)
    return torch.compile(step, dynamic=False)


class FixedStep:
    """The logits of the next tokens, from a graph (on CUDA) or from compiled code for each length of attention."""

    def __init__(self, language_model: Qwen2, cache: KVCache, slots: int, is_compiled: bool):
        self.language_model, self.cache = language_model, cache
        device = cache.keys.device
        self.tokens_S = torch.zeros(slots, dtype=torch.long, device=device)
        self.positions_S = torch.zeros(slots, dtype=torch.long, device=device)
        self.run = compiled(self._run) if is_compiled else self._run
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.captured_keys = cache.keys

    def __call__(self, slots: list[int], tokens: list[int], starts: list[int]) -> Tensor:
        """Logits (B, V) of what follows `tokens`, which go to the positions `starts` of `slots`."""
        all_tokens, all_starts = [0] * len(self.tokens_S), [0] * len(self.tokens_S)  # a free slot writes to its start
        for slot, token, start in zip(slots, tokens, starts, strict=True):
            all_tokens[slot], all_starts[slot] = token, start
        self.tokens_S.copy_(torch.tensor(all_tokens))
        self.positions_S.copy_(torch.tensor(all_starts))
        length = min(-(-(max(starts) + 1) // BUCKET) * BUCKET, self.cache.length)
        logits_SV = self._graph(length) if self.tokens_S.is_cuda else self.run(length)
        if slots == list(range(len(logits_SV))):
            return logits_SV
        return torch.stack([logits_SV[slot] for slot in slots])  # by a list of numbers it would wait for the device

    def _run(self, length: int) -> Tensor:
        rows = AllSlots(self.cache, self.positions_S, length)
        x_S1D = self.language_model.embed(self.tokens_S[:, None])
        return self.language_model.logits(self.language_model(x_S1D, self.positions_S[:, None], cache=rows)[:, 0])

    def _graph(self, length: int) -> Tensor:
        """Runs the step as a graph, which is captured when a length is new or the cache has moved."""
        if self.captured_keys is not self.cache.keys:
            self.graphs.clear()
            self.captured_keys = self.cache.keys
        if length not in self.graphs:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # what is made at the first call only must not be part of the graph
                for _ in range(2):
                    self.run(length)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits_SV = self.run(length)
            self.graphs[length] = graph, logits_SV
        graph, logits_SV = self.graphs[length]
        graph.replay()
        return logits_SV
