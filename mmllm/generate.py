"""From a prompt to an answer: greedy, sampled, or by beam search.

The surprising fact: a row of NaN logits does not stop a naive loop. `argmax` of NaN is 0, and token 0 of Qwen is "!",
hence the "!!!!!!" in many bug reports. Here every step's logits are checked.

The meaning of each option is that of transformers (order: repetition penalty, temperature, top-k, top-p), and a row's
answer to a seed does not depend on the other rows of the batch.

B rows, T prompt tokens, V vocabulary. Next: pipeline.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmllm.errors import GenerationError, UserError
from mmllm.model import MultimodalLLM
from mmllm.qwen import KVCache

GREEDY_BELOW = 1e-3  # a temperature this small divides logits into overflow; it means greedy


@dataclass(frozen=True)
class GenerationConfig:
    """How to decode: `temperature` 0 is greedy, `top_k` 0 and `top_p` 1 filter nothing. Out of range: UserError."""

    max_new_tokens: int = 100
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name, is_right, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("num_beams", self.num_beams >= 1, "at least 1"),
            ("length_penalty", math.isfinite(self.length_penalty), "a finite number"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 (1 is off)"),
            ("seed", 0 <= self.seed < 2**63, "from 0 to 2**63 - 1"),
        ):
            if not is_right:
                raise UserError(f"{name} is {getattr(self, name)}; it must be {wanted}")
        if self.num_beams > 1 and not self.is_greedy:
            raise UserError(
                f"num_beams {self.num_beams} with temperature {self.temperature}: beam search does not sample"
            )

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW


@dataclass(frozen=True)
class Prompt:
    """Token ids with their image places, and the pictures that belong there: (n, 3, S, S), n may be 0."""

    ids: tuple[int, ...]
    pixels: Tensor


@dataclass(frozen=True)
class Generated:
    """An answer. `ids` are without the token that ended it; `finish_reason` is "stop", "length" or "cancelled"."""

    ids: tuple[int, ...]
    text: str
    finish_reason: str
    prompt_tokens: int


@torch.inference_mode()
def generate(
    model: MultimodalLLM,
    prompts: list[Prompt],
    config: GenerationConfig,
    *,
    on_token: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> list[Generated]:
    """One answer per prompt, in order.

    `on_token(row, id)` hears of every token as it comes (at the end under beam search); `cancelled()` is asked before
    every step. Raises UserError when a prompt leaves no room, GenerationError when logits are not finite.
    """
    check_room(model, prompts, config)
    on_token = on_token or (lambda row, token: None)
    cancelled = cancelled or (lambda: False)
    if config.num_beams == 1:
        return decode_rows(model, prompts, config, on_token, cancelled)
    answers = [beam_search(model, prompt, config, cancelled) for prompt in prompts]
    for row, answer in enumerate(answers):
        for token in answer.ids:
            on_token(row, token)
    return answers


def check_room(model: MultimodalLLM, prompts: list[Prompt], config: GenerationConfig) -> None:
    room = model.config.text.max_position_embeddings
    for prompt in prompts:
        if len(prompt.ids) + config.max_new_tokens > room:
            raise UserError(
                f"the prompt has {len(prompt.ids)} tokens and max_new_tokens is {config.max_new_tokens}, but the model "
                f"has {room} positions; shorten one of them"
            )


def prefill(model: MultimodalLLM, prompts: list[Prompt], max_new_tokens: int) -> tuple[Tensor, KVCache]:
    """Logits of the first new token of each prompt, (B, V), and a cache with room for the rest."""
    ids_BT = pad_sequence([torch.tensor(prompt.ids) for prompt in prompts], batch_first=True).to(model.device)
    rows, length = ids_BT.shape
    cache = KVCache(model.config.text, rows, length + max_new_tokens, device=model.device, dtype=model.dtype)
    x_BTD = model.embed(ids_BT, torch.cat([prompt.pixels for prompt in prompts]))
    positions_BT = torch.arange(length, device=model.device).expand(rows, length)
    x_BTD = model.language_model(x_BTD, positions_BT, cache=cache)
    last_B = torch.tensor([len(prompt.ids) - 1 for prompt in prompts], device=model.device)
    return model.language_model.logits(x_BTD[torch.arange(rows, device=model.device), last_B]), cache


def step(model: MultimodalLLM, tokens_B: Tensor, positions_B: Tensor, cache: KVCache) -> Tensor:
    """Logits (B, V) of what follows `tokens_B`, which stand at `positions_B`."""
    x_B1D = model.language_model.embed(tokens_B[:, None])
    return model.language_model.logits(model.language_model(x_B1D, positions_B[:, None], cache=cache)[:, 0])


def check_finite(logits_BV: Tensor, token: int) -> None:
    if not torch.isfinite(logits_BV).all():
        raise GenerationError(
            f"logits are not finite at token {token}; try float32 (--dtype float32), or check the weights"
        )


def decode_rows(
    model: MultimodalLLM,
    prompts: list[Prompt],
    config: GenerationConfig,
    on_token: Callable[[int, int], None],
    cancelled: Callable[[], bool],
) -> list[Generated]:
    """Greedy or sampled decoding of all rows side by side."""
    tokenizer = model.processor.tokenizer
    answers: list[list[int]] = [[] for _ in prompts]
    reasons = ["length"] * len(prompts)
    live = set(range(len(prompts)))
    choose = Chooser(config, prompts, model.config.text.vocab_size, model.device)
    logits_BV, cache = prefill(model, prompts, config.max_new_tokens)
    positions_B = torch.tensor([len(prompt.ids) for prompt in prompts], device=model.device)
    for n in range(config.max_new_tokens):
        check_finite(logits_BV, n)
        tokens_B = choose(logits_BV)
        for row, token in enumerate(tokens_B.tolist()):  # the one wait for the device in a step
            if row not in live:
                continue
            if token in tokenizer.stop_ids:
                reasons[row] = "stop"
                live.discard(row)
            else:
                answers[row].append(token)
                on_token(row, token)
        if not live or n + 1 == config.max_new_tokens:
            break
        if cancelled():
            reasons = ["cancelled" if row in live else reason for row, reason in enumerate(reasons)]
            break
        logits_BV = step(model, tokens_B, positions_B, cache)
        positions_B = positions_B + 1
    return [
        Generated(tuple(ids), tokenizer.decode(ids), reason, len(prompt.ids))
        for ids, reason, prompt in zip(answers, reasons, prompts, strict=True)
    ]


class Chooser:
    """Picks the next token of each row; remembers what the repetition penalty has to know."""

    def __init__(self, config: GenerationConfig, prompts: list[Prompt], vocab_size: int, device: torch.device):
        self.config = config
        self.rows = torch.arange(len(prompts), device=device)
        self.seen_BV = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
        for row, prompt in enumerate(prompts):
            self.seen_BV[row, list(prompt.ids)] = True
        # A source of chance per row: the same seed gives the same answer in any company.
        self.generators = [torch.Generator().manual_seed(config.seed) for _ in prompts]

    def __call__(self, logits_BV: Tensor) -> Tensor:
        scores_BV = penalise_repetition(logits_BV, self.seen_BV, self.config.repetition_penalty)
        if self.config.is_greedy:
            tokens_B = scores_BV.argmax(-1)
        else:
            scores_BV = filter_top(scores_BV / self.config.temperature, self.config.top_k, self.config.top_p)
            chance_B = torch.stack([torch.rand((), generator=generator) for generator in self.generators])
            tokens_B = draw(scores_BV.softmax(-1), chance_B.to(scores_BV.device))
        self.seen_BV[self.rows, tokens_B] = True
        return tokens_B


def penalise_repetition(scores_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Makes seen tokens less likely, once each: negative scores times `penalty`, others divided by it (CTRL's rule)."""
    if penalty == 1:
        return scores_BV
    penalised_BV = torch.where(scores_BV < 0, scores_BV * penalty, scores_BV / penalty)
    return torch.where(seen_BV, penalised_BV, scores_BV)


def filter_top(scores_BV: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf for what is not among the `top_k` best (ties stay), then for the tail beyond probability `top_p`."""
    if 0 < top_k < scores_BV.shape[-1]:
        kth_B1 = scores_BV.topk(top_k).values[:, -1:]
        scores_BV = scores_BV.masked_fill(scores_BV < kth_B1, -math.inf)
    if top_p < 1:
        ascending_BV, order_BV = scores_BV.sort()
        is_tail_BV = ascending_BV.softmax(-1).cumsum(-1) <= 1 - top_p
        is_tail_BV[:, -1] = False  # the most likely token always stays
        scores_BV = scores_BV.masked_fill(is_tail_BV.scatter(-1, order_BV, is_tail_BV), -math.inf)
    return scores_BV


def draw(probabilities_BV: Tensor, chance_B: Tensor) -> Tensor:
    """The token at which each row's cumulated probability passes `chance_B` (uniform in [0, 1))."""
    cumulated_BV = probabilities_BV.double().cumsum(-1)
    threshold_B1 = chance_B[:, None].double() * cumulated_BV[:, -1:]
    return torch.searchsorted(cumulated_BV, threshold_B1, right=True)[:, 0]


def beam_search(
    model: MultimodalLLM, prompt: Prompt, config: GenerationConfig, cancelled: Callable[[], bool]
) -> Generated:
    """The best of `num_beams` hypotheses by sum of log-probabilities / tokens ** length_penalty (the end token counts).

    A hypothesis is finished when its end token ranks among the first `num_beams` candidates of a step. The search ends
    when no live hypothesis, at its present length, beats the worst of `num_beams` finished ones.
    """
    tokenizer, beams, vocab = model.processor.tokenizer, config.num_beams, model.config.text.vocab_size
    stop_ids = tokenizer.stop_ids
    logits_1V, cache = prefill(model, [prompt], config.max_new_tokens)
    cache.take_rows_(torch.zeros(beams, dtype=torch.long, device=model.device))
    cache.rows_B1 = torch.arange(beams, device=model.device)[:, None]
    logits_BV = logits_1V.expand(beams, -1)
    scores_B = torch.full((beams,), -math.inf, device=model.device)
    scores_B[0] = 0.0  # one live beam at the start: the rows are still copies of each other
    seen_BV = torch.zeros(beams, vocab, dtype=torch.bool, device=model.device)
    seen_BV[:, list(prompt.ids)] = True
    live: list[tuple[int, ...]] = [()] * beams
    finished: list[tuple[float, tuple[int, ...], str]] = []
    for n in range(1, config.max_new_tokens + 1):
        check_finite(logits_BV, n - 1)
        log_BV = penalise_repetition(logits_BV.log_softmax(-1), seen_BV, config.repetition_penalty)
        best = (scores_B[:, None] + log_BV).flatten().topk(min(max(2, 1 + len(stop_ids)) * beams, beams * vocab))
        candidates = [
            (score, flat // vocab, flat % vocab)
            for score, flat in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        is_last = n == config.max_new_tokens
        for score, row, token in candidates[:beams]:
            if token in stop_ids:
                finished.append((score / n**config.length_penalty, live[row], "stop"))
            elif is_last:
                finished.append((score / n**config.length_penalty, (*live[row], token), "length"))
        finished = sorted(finished, key=lambda hypothesis: -hypothesis[0])[:beams]
        going_on = [candidate for candidate in candidates if candidate[2] not in stop_ids][:beams]
        is_beaten = len(finished) == beams and going_on[0][0] / n**config.length_penalty <= finished[-1][0]
        if is_last or is_beaten:
            break
        if cancelled():
            finished.append((-math.inf, live[0], "cancelled"))
            break
        rows = torch.tensor([row for _, row, _ in going_on], device=model.device)
        tokens_B = torch.tensor([token for _, _, token in going_on], device=model.device)
        scores_B = torch.tensor([score for score, _, _ in going_on], device=model.device)
        live = [(*live[row], token) for _, row, token in going_on]
        cache.take_rows_(rows)
        seen_BV = seen_BV[rows]
        seen_BV[torch.arange(beams, device=model.device), tokens_B] = True
        logits_BV = step(model, tokens_B, torch.full_like(tokens_B, len(prompt.ids) + n - 1), cache)
    _, ids, reason = finished[0]
    return Generated(ids, tokenizer.decode(ids), reason, len(prompt.ids))
