"""Beam search: several hypotheses of one answer side by side, each in its own slot.

As in transformers, the end token counts: a hypothesis scores its sum of log-probabilities over its number of tokens to
the power of `length_penalty`, and the token that ends it is one of them. Without it other answers win.

A hypothesis is finished when its end token ranks among the first B candidates of a step; an end token ranked lower is
dropped. The search ends when B hypotheses are finished and no live beam can beat the worst of them: at its present
length (`early_stopping` False), at the greatest length allowed ("never"), or immediately (True).

B beams, V vocabulary.
"""

import math

import torch
from torch import Tensor

from mmllm.data.tokenizer import Tokenizer
from mmllm.inference.request import GenerationConfig, Hypothesis
from mmllm.inference.sampling import forbid, non_finite_error, penalise_repetition, seen_in
from mmllm.inference.text_stream import whole_text


class BeamSearch:
    """The beams of one request, by their ids, and the `finished` hypotheses, best first."""

    def __init__(
        self,
        config: GenerationConfig,
        prompt_ids: tuple[int, ...],
        tokenizer: Tokenizer,
        vocab_size: int,
        device: torch.device,
    ):
        self.config, self.tokenizer, self.vocab_size, self.device = config, tokenizer, vocab_size, device
        self.beams: list[tuple[int, ...]] = [()] * config.num_beams
        dead = [-math.inf] * (config.num_beams - 1)  # all begin equal, so one lives
        self.logprobs_B = torch.tensor([0.0, *dead], device=device)
        self.finished: list[Hypothesis] = []
        self.seen_BV: Tensor | None = None
        if config.repetition_penalty != 1:
            self.seen_BV = seen_in(prompt_ids, vocab_size, device).expand(config.num_beams, -1)

    def advance(self, logits_BV: Tensor) -> tuple[list[int], list[int]] | None:
        """The next beams, as the row that each continues and the token that it adds; None at the end of the search."""
        num_beams, stop_ids = self.config.num_beams, self.tokenizer.stop_ids
        length = len(self.beams[0]) + 1
        is_last = length == self.config.max_new_tokens
        candidates = self._candidates(logits_BV, length)
        for logprob, row, token in candidates[:num_beams]:
            if token in stop_ids:
                self._finish(logprob, length, self.beams[row], "stop")
            elif is_last:
                self._finish(logprob, length, (*self.beams[row], token), "length")
        self.finished = sorted(self.finished, key=lambda hypothesis: -hypothesis.score)[:num_beams]
        live = [candidate for candidate in candidates if candidate[2] not in stop_ids][:num_beams]
        if is_last or self._is_beaten(live[0][0], length):
            return None
        logprobs, rows, tokens = (list(column) for column in zip(*live, strict=True))
        self.logprobs_B = torch.tensor(logprobs, device=self.device)
        self.beams = [(*self.beams[row], token) for row, token in zip(rows, tokens, strict=True)]
        if self.seen_BV is not None:
            self.seen_BV = self.seen_BV[rows]
            self.seen_BV[range(len(rows)), tokens] = True
        return rows, tokens

    def cancel(self) -> None:
        """Ends the search with the best live beam as its only hypothesis."""
        self.finished = []
        self._finish(float(self.logprobs_B[0]), max(1, len(self.beams[0])), self.beams[0], "cancelled")

    def _candidates(self, logits_BV: Tensor, length: int) -> list[tuple[float, int, int]]:
        """The best continuations: (sum of log-probabilities, row, token), best first."""
        stop_ids = list(self.tokenizer.stop_ids)
        log_BV = logits_BV.log_softmax(-1)
        if self.seen_BV is not None:
            log_BV = penalise_repetition(log_BV, self.seen_BV, self.config.repetition_penalty)
        if length <= self.config.min_new_tokens:
            log_BV = forbid(log_BV, list(range(len(log_BV))), stop_ids)
        sums_N = (self.logprobs_B[:, None] + log_BV).flatten()
        # Even if every end token ranks first, enough candidates are left for all beams.
        best = sums_N.topk(min((1 + len(stop_ids)) * self.config.num_beams, len(sums_N)))
        logprobs, places = best.values.tolist(), best.indices.tolist()  # the one wait for the device in a step
        if not math.isfinite(logprobs[0]):  # topk ranks NaN first
            raise non_finite_error(length - 1)
        pairs = zip(logprobs, places, strict=True)
        return [(logprob, place // self.vocab_size, place % self.vocab_size) for logprob, place in pairs]

    def _finish(self, logprob: float, length: int, ids: tuple[int, ...], reason: str) -> None:
        score = logprob / length**self.config.length_penalty
        self.finished.append(Hypothesis(ids, whole_text(self.tokenizer, ids), reason, logprob, score))

    def _is_beaten(self, best_logprob: float, length: int) -> bool:
        """Whether the best live beam can no longer enter the finished hypotheses."""
        config = self.config
        if len(self.finished) < config.num_beams:
            return False
        if config.early_stopping is True:
            return True
        longest = config.max_new_tokens if config.early_stopping == "never" and config.length_penalty > 0 else length
        return best_logprob / longest**config.length_penalty <= self.finished[-1].score
