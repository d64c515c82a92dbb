"""Beam search: several hypotheses of one answer side by side, each in a slot of its own.

The surprising fact: the end token counts. A hypothesis is judged by its sum of log-probabilities over its number of
tokens to the power of `length_penalty`, and the token that ends it is one of them, as in transformers; leave it out and
other answers win.

A hypothesis is finished when its end token ranks among the first B candidates of a step; one ranked lower vanishes. The
search ends when B are finished and none that lives can beat the worst of them: at its present length
(`early_stopping` False), at the greatest length allowed ("never"), or at once (True).

B beams, V vocabulary. Next: engine.py.
"""

import math

import torch
from torch import Tensor

from mmllm.inference.sampling import GenerationConfig, forbid, not_finite, penalise_repetition, seen_in


class BeamSearch:
    """The hypotheses of one request. `finished` holds (score, logprob, ids, reason), best first."""

    def __init__(
        self,
        config: GenerationConfig,
        prompt_ids: tuple[int, ...],
        stop_ids: frozenset[int],
        vocab_size: int,
        device: torch.device,
    ):
        self.config, self.stop_ids, self.vocab_size, self.device = config, stop_ids, vocab_size, device
        self.scores_B = torch.tensor([0.0], device=device)  # one live beam at the start
        self.seen_BV: Tensor | None = None
        if config.repetition_penalty != 1:
            self.seen_BV = seen_in(prompt_ids, vocab_size, device)[None]
        self.live: list[tuple[int, ...]] = [()]
        self.finished: list[tuple[float, float, tuple[int, ...], str]] = []

    def advance(self, logits_BV: Tensor) -> tuple[list[int], list[int]] | None:
        """The beams of the next step, by the row that each goes on from and the token that it adds; None at the end."""
        config, beams = self.config, self.config.num_beams
        n = len(self.live[0]) + 1
        candidates = self._candidates(logits_BV, n)
        is_last = n == config.max_new_tokens
        for score, row, token in candidates[:beams]:
            if token in self.stop_ids:
                self._finish(score, n, self.live[row], "stop")
            elif is_last:
                self._finish(score, n, (*self.live[row], token), "length")
        self.finished = sorted(self.finished, key=lambda hypothesis: -hypothesis[0])[:beams]
        going_on = [candidate for candidate in candidates if candidate[2] not in self.stop_ids][:beams]
        if is_last or self._is_beaten(going_on[0][0], n):
            return None
        rows, tokens = [row for _, row, _ in going_on], [token for _, _, token in going_on]
        self.scores_B = torch.tensor([score for score, _, _ in going_on], device=self.device)
        self.live = [(*self.live[row], token) for row, token in zip(rows, tokens, strict=True)]
        if self.seen_BV is not None:
            self.seen_BV = self.seen_BV[rows]
            self.seen_BV[range(len(rows)), tokens] = True
        return rows, tokens

    def give_up(self) -> None:
        """Ends the search with the best hypothesis that lives."""
        n = max(1, len(self.live[0]))
        self._finish(float(self.scores_B[0]), n, self.live[0], "cancelled")
        self.finished = self.finished[-1:]

    def _candidates(self, logits_BV: Tensor, n: int) -> list[tuple[float, int, int]]:
        """The best continuations: (sum of log-probabilities, row, token), best first."""
        log_BV = logits_BV.log_softmax(-1)
        if self.seen_BV is not None:
            log_BV = penalise_repetition(log_BV, self.seen_BV, self.config.repetition_penalty)
        if n <= self.config.min_new_tokens:
            log_BV = forbid(log_BV, list(range(len(log_BV))), list(self.stop_ids))
        sums_N = (self.scores_B[:, None] + log_BV).flatten()
        best = sums_N.topk(min(max(2, 1 + len(self.stop_ids)) * self.config.num_beams, len(sums_N)))
        values, places = best.values.tolist(), best.indices.tolist()  # the one wait for the device in a step
        if not math.isfinite(values[0]):  # NaN counts as the largest of all
            raise not_finite(n - 1)
        return [
            (score, flat // self.vocab_size, flat % self.vocab_size) for score, flat in zip(values, places, strict=True)
        ]

    def _finish(self, logprob: float, n: int, ids: tuple[int, ...], reason: str) -> None:
        self.finished.append((logprob / n**self.config.length_penalty, logprob, ids, reason))

    def _is_beaten(self, best: float, n: int) -> bool:
        """Whether the best live sum of log-probabilities cannot enter the finished ones any more."""
        config = self.config
        if len(self.finished) < config.num_beams:
            return False
        if config.early_stopping is True:
            return True
        longest = config.max_new_tokens if config.early_stopping == "never" and config.length_penalty > 0 else n
        return best / longest**config.length_penalty <= self.finished[-1][0]
