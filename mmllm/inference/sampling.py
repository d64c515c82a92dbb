"""How the next token is chosen: what the options of a request do to logits.

Every option means what it means in transformers, applied in the same order: repetition penalty, min_new_tokens,
temperature, top-k, top-p, min-p; the form of an answer (answer_form.py) before temperature. Options differ from row to
row; a row without options costs one argmax.

Logits that are not finite are an error. `argmax` of NaN is 0, and token 0 of Qwen is "!": an unchecked loop answers
"!!!!!!". torch ranks NaN above every number, so it is enough to look at the largest logit of each row.

B rows, V vocabulary, K tokens that a filter looks at.
"""

import math
import random

import torch
from torch import Tensor

from mmllm.errors import GenerationError
from mmllm.inference.answer_form import FormState
from mmllm.inference.request import GenerationConfig

TOP_P_TOKENS = 1024  # the likeliest tokens, which are sorted before the whole vocabulary is
NOT_FINITE = -1  # in place of a token: the row's logits are not finite


class SamplerState:
    """What one request's sampling remembers from token to token."""

    def __init__(self, config: GenerationConfig, prompt_ids: tuple[int, ...], vocab_size: int, device: torch.device):
        self.config, self.num_chosen = config, 0
        self.rng = random.Random(config.seed)  # its own generator, so that slot and batch do not matter
        self.form = config.form and FormState(config.form)
        has_penalty = config.repetition_penalty != 1
        self.seen_V = seen_in(prompt_ids, vocab_size, device) if has_penalty else None  # in the prompt or the answer


def seen_in(ids: tuple[int, ...], vocab_size: int, device: torch.device) -> Tensor:
    seen_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
    seen_V[list(ids)] = True
    return seen_V


def non_finite_error(token: int) -> GenerationError:
    return GenerationError(
        f"logits are not finite at token {token}; try float32 (--dtype float32), or check the weights"
    )


def choose(logits_BV: Tensor, states: list[SamplerState], stop_ids: list[int]) -> list[int]:
    """The next token of each row, or NOT_FINITE. The one place where a step waits for the device."""
    max_B, tokens_B = logits_BV.max(-1)
    with_options = [i for i, state in enumerate(states) if not state.config.is_argmax]
    if with_options:
        rows = torch.tensor(with_options, device=logits_BV.device)
        tokens_B[rows] = choose_by_options(logits_BV[rows], [states[i] for i in with_options], stop_ids)
    for state in states:
        state.num_chosen += 1
    tokens = torch.where(max_B.isfinite(), tokens_B, NOT_FINITE).tolist()
    for state, token in zip(states, tokens, strict=True):
        if state.form and token != NOT_FINITE:
            state.form.accept(token)
    return tokens


def choose_by_options(logits_BV: Tensor, states: list[SamplerState], stop_ids: list[int]) -> Tensor:
    """The next tokens of rows that have options; any token where logits are not finite."""
    scores_BV = restricted(penalised(logits_BV, states, stop_ids), states)
    tokens_B = scores_BV.argmax(-1)
    sampled = [i for i, state in enumerate(states) if not state.config.is_greedy]
    if sampled:
        kept_BV = filtered(scores_BV[sampled], [states[i].config for i in sampled])
        uniform_B = torch.tensor([states[i].rng.getrandbits(32) / 2**32 for i in sampled], dtype=torch.float64)
        tokens_B[sampled] = draw(kept_BV.softmax(-1), uniform_B.to(kept_BV.device))
    for state, token_1 in zip(states, tokens_B.split(1), strict=True):
        if state.seen_V is not None:
            state.seen_V.index_fill_(0, token_1, True)
    return tokens_B


def token_logprobs(logits_BV: Tensor, tokens: list[int]) -> list[float]:
    """The logarithm of each token's probability by the model alone: before temperature, penalty and filters."""
    tokens_B1 = torch.tensor(tokens, device=logits_BV.device).clamp(min=0)[:, None]
    return logits_BV.float().log_softmax(-1).gather(1, tokens_B1)[:, 0].tolist()


def likeliest(logits_BV: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """The `count` likeliest tokens of each row with the logarithms of their probabilities, best first."""
    best = logits_BV.float().log_softmax(-1).topk(min(count, logits_BV.shape[-1]))
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [list(zip(tokens, logprobs, strict=True)) for tokens, logprobs in rows]


def penalised(logits_BV: Tensor, states: list[SamplerState], stop_ids: list[int]) -> Tensor:
    """Logits after the options that greedy rows may have too: repetition penalty and `min_new_tokens`."""
    scores_BV = logits_BV
    rows = [i for i, state in enumerate(states) if state.seen_V is not None]
    if rows:
        seen_BV = torch.stack([states[i].seen_V for i in rows])
        penalty_B1 = column([states[i].config.repetition_penalty for i in rows], scores_BV.device)
        scores_BV = scores_BV.clone()
        scores_BV[rows] = penalise_repetition(scores_BV[rows], seen_BV, penalty_B1)
    return forbid(scores_BV, [i for i, s in enumerate(states) if s.num_chosen < s.config.min_new_tokens], stop_ids)


def restricted(scores_BV: Tensor, states: list[SamplerState]) -> Tensor:
    """-inf for tokens that do not continue an answer of its form."""
    rows = [i for i, state in enumerate(states) if state.form]
    if rows:
        scores_BV = scores_BV.clone()
    for row in rows:
        allowed = states[row].form.allowed().to(scores_BV.device)
        kept = scores_BV[row, allowed]
        scores_BV[row] = -math.inf
        scores_BV[row, allowed] = kept
    return scores_BV


def filtered(scores_BV: Tensor, configs: list[GenerationConfig]) -> Tensor:
    """Scores divided by the temperature, -inf for tokens that top-k, top-p or min-p exclude."""
    device = scores_BV.device
    scores_BV = scores_BV / column([config.temperature for config in configs], device)
    if any(config.top_k for config in configs):
        scores_BV = filter_top_k(scores_BV, [config.top_k for config in configs])
    rows = [i for i, config in enumerate(configs) if config.top_p < 1]
    if rows:
        top_p_B1 = torch.tensor([[configs[i].top_p] for i in rows], dtype=torch.float64, device=device)
        scores_BV[rows] = filter_top_p(scores_BV[rows], top_p_B1)
    if any(config.min_p for config in configs):
        scores_BV = filter_min_p(scores_BV, column([config.min_p for config in configs], device))
    return scores_BV


def column(values: list[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None]


def forbid(scores_BV: Tensor, rows: list[int], tokens: list[int]) -> Tensor:
    """-inf for `tokens` in `rows`."""
    if not rows:
        return scores_BV
    scores_BV = scores_BV.clone()
    scores_BV[torch.tensor(rows, device=scores_BV.device)[:, None], tokens] = -math.inf
    return scores_BV


def penalise_repetition(scores_BV: Tensor, seen_BV: Tensor, penalty: float | Tensor) -> Tensor:
    """Seen tokens made less likely: positive scores over `penalty`, negative ones times it (https://arxiv.org/abs/1909.05858)."""
    penalised_BV = torch.where(scores_BV < 0, scores_BV * penalty, scores_BV / penalty)
    return torch.where(seen_BV, penalised_BV, scores_BV)


def filter_top_k(scores_BV: Tensor, top_k: list[int]) -> Tensor:
    """-inf for tokens below the `top_k[b]` best of row b; ties with the last stay, 0 keeps all."""
    vocab = scores_BV.shape[-1]
    sizes = torch.tensor([min(k, vocab) if k else vocab for k in top_k], device=scores_BV.device)[:, None]
    limited = [k for k in top_k if 0 < k < vocab]
    best_BK = scores_BV.topk(max(limited, default=1)).values
    kth_B1 = best_BK.gather(1, sizes.clamp(max=best_BK.shape[1]) - 1)
    return scores_BV.masked_fill((scores_BV < kth_B1) & (sizes < vocab), -math.inf)


def filter_top_p(scores_BV: Tensor, top_p_B1: Tensor) -> Tensor:
    """-inf for the tail beyond probability `top_p`; the token that crosses the threshold stays.

    Sorting the vocabulary takes a CPU as long as the model does, so only the likeliest tokens are sorted if they suffice.
    """
    vocab = scores_BV.shape[-1]
    best = scores_BV.topk(min(vocab, TOP_P_TOKENS))
    probabilities_BK = (best.values.double() - scores_BV.double().logsumexp(-1, keepdim=True)).exp()
    above_BK = probabilities_BK.cumsum(-1) - probabilities_BK
    if best.values.shape[1] < vocab and not (above_BK[:, -1:] >= top_p_B1).all():
        best = scores_BV.sort(descending=True)
        probabilities_BK = best.values.double().softmax(-1)
        above_BK = probabilities_BK.cumsum(-1) - probabilities_BK
    kept_BK = best.values.masked_fill(above_BK >= top_p_B1, -math.inf)  # the likeliest token has nothing above it
    return torch.full_like(scores_BV, -math.inf).scatter(-1, best.indices, kept_BK)


def filter_min_p(scores_BV: Tensor, min_p_B1: Tensor) -> Tensor:
    """-inf for tokens less likely than `min_p` times the likeliest."""
    probabilities_BV = scores_BV.softmax(-1)
    return scores_BV.masked_fill(probabilities_BV < min_p_B1 * probabilities_BV.amax(-1, keepdim=True), -math.inf)


def draw(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token at which each row's cumulative probability exceeds `uniform_B`, which is uniform in [0, 1)."""
    cumulative_BV = probabilities_BV.double().cumsum(-1)
    threshold_B1 = uniform_B[:, None].double() * cumulative_BV[:, -1:]
    tokens_B1 = torch.searchsorted(cumulative_BV, threshold_B1, right=True)
    return tokens_B1[:, 0].clamp(max=probabilities_BV.shape[-1] - 1)  # NaN is found behind the last token
