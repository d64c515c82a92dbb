"""How the next token is chosen: the options of a request, and what they do to logits.

The surprising fact: a row of NaN logits does not stop a naive loop. `argmax` of NaN is 0, and token 0 of Qwen is "!",
hence the "!!!!!!" in many bug reports. Here the largest logit of each row is looked at, and NaN is the largest of all.

Every option means what it means in transformers, in the same order: repetition penalty, min_new_tokens, temperature,
top-k, top-p, min-p. Options differ from row to row; a row that wants none of them costs an argmax.

B rows, V vocabulary. Next: beams.py, engine.py.
"""

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from mmllm.errors import GenerationError, UserError

GREEDY_BELOW = 1e-3  # a temperature this small divides logits into overflow; it means greedy
MAX_STOPS = 16
BLOCK = 128  # logits looked at together for the largest
HEAD = 1024  # tokens among which top-p looks first


@dataclass(frozen=True)
class GenerationConfig:
    """How to decode: `temperature` 0 is greedy, `top_k` 0, `top_p` 1 and `min_p` 0 filter nothing.

    An answer ends before the first of the strings in `stop`. `num_return_sequences` of the `num_beams` hypotheses are
    told, best first; `early_stopping` is False, True or "never" as in transformers. Out of range: UserError.
    """

    max_new_tokens: int = 100
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    min_new_tokens: int = 0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        for name, is_right, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 (off) to 1"),
            ("num_beams", self.num_beams >= 1, "at least 1"),
            ("length_penalty", math.isfinite(self.length_penalty), "a finite number"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 (1 is off)"),
            ("seed", 0 <= self.seed < 2**63, "from 0 to 2**63 - 1"),
            ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, "from 0 to max_new_tokens"),
            ("early_stopping", self.early_stopping in (True, False, "never"), "True, False or 'never'"),
            ("num_return_sequences", 1 <= self.num_return_sequences <= self.num_beams, "from 1 to num_beams"),
            ("stop", is_stop_list(self.stop), f"a tuple of at most {MAX_STOPS} strings that are not empty"),
        ):
            if not is_right:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be {wanted}")
        if self.num_beams > 1 and not self.is_greedy:
            raise UserError(
                f"num_beams {self.num_beams} with temperature {self.temperature}: beam search does not sample"
            )
        if self.num_beams > 1 and self.stop:
            raise UserError(f"num_beams {self.num_beams} with stop strings: beam search ends at the end token only")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is all that is wanted."""
        return self.is_greedy and self.repetition_penalty == 1 and self.min_new_tokens == 0


def is_stop_list(stop: object) -> bool:
    return isinstance(stop, tuple) and len(stop) <= MAX_STOPS and all(isinstance(s, str) and s for s in stop)


class Row:
    """What the choice of one request's tokens has to remember."""

    def __init__(self, config: GenerationConfig, prompt_ids: tuple[int, ...], vocab_size: int, device: torch.device):
        self.config, self.count = config, 0
        # A source of chance of its own: the same seed gives the same answer in any slot and any company.
        self.rng = random.Random(config.seed)
        self.seen_V: Tensor | None = None  # tokens of the prompt and the answer so far
        if config.repetition_penalty != 1:
            self.seen_V = seen_in(prompt_ids, vocab_size, device)


def not_finite(token: int) -> GenerationError:
    return GenerationError(
        f"logits are not finite at token {token}; try float32 (--dtype float32), or check the weights"
    )


def seen_in(ids: tuple[int, ...], vocab_size: int, device: torch.device) -> Tensor:
    seen_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
    seen_V[list(ids)] = True
    return seen_V


def choose(logits_BV: Tensor, rows: list[Row], stop_ids: list[int]) -> list[int]:
    """The next token of each row, -1 where its logits are not finite; the one wait for the device in a step."""
    best_B, tokens_B = largest(logits_BV)
    special = [i for i, row in enumerate(rows) if not row.config.is_plain]
    if len(special) == len(rows):
        tokens_B = choose_specially(logits_BV, rows, stop_ids)
    elif special:
        among = torch.tensor(special, device=logits_BV.device)
        tokens_B[among] = choose_specially(logits_BV[among], [rows[i] for i in special], stop_ids)
    for row in rows:
        row.count += 1
    return torch.where(best_B.isfinite(), tokens_B, -1).tolist()


def largest(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each row, NaN before all, and the first place where it stands.

    In two steps, as torch finds a largest value ten times as fast as its place.
    """
    if logits_BV.shape[-1] % BLOCK:
        return tuple(logits_BV.max(-1))
    blocks_BNK = logits_BV.unflatten(-1, (-1, BLOCK))
    best_B, block_B = blocks_BNK.amax(-1).max(-1)
    block_BK = blocks_BNK[torch.arange(len(block_B), device=block_B.device), block_B]
    return best_B, block_B * BLOCK + block_BK.argmax(-1)


def choose_specially(logits_BV: Tensor, rows: list[Row], stop_ids: list[int]) -> Tensor:
    """The next tokens of rows that have options; rows that are not finite give any token."""
    scores_BV = corrected(logits_BV, rows, stop_ids)
    tokens_B = largest(scores_BV)[1]
    sampled = [i for i, row in enumerate(rows) if not row.config.is_greedy]
    if sampled:
        kept_BV = filtered(scores_BV[sampled], [rows[i].config for i in sampled])
        uniform_B = torch.tensor([rows[i].rng.getrandbits(32) / 2**32 for i in sampled], dtype=torch.float64)
        tokens_B[sampled] = draw(kept_BV.softmax(-1), uniform_B.to(kept_BV.device))
    for row, token_1 in zip(rows, tokens_B.split(1), strict=True):
        if row.seen_V is not None:
            row.seen_V.index_fill_(0, token_1, True)
    return tokens_B


def corrected(logits_BV: Tensor, rows: list[Row], stop_ids: list[int]) -> Tensor:
    """Logits after what greedy rows too may ask for: the repetition penalty, and no end before `min_new_tokens`."""
    scores_BV = logits_BV
    penalised = [i for i, row in enumerate(rows) if row.seen_V is not None]
    if penalised:
        seen_BV = torch.stack([rows[i].seen_V for i in penalised])
        penalty_B1 = column([rows[i].config.repetition_penalty for i in penalised], scores_BV.device)
        scores_BV = scores_BV.clone()
        scores_BV[penalised] = penalise_repetition(scores_BV[penalised], seen_BV, penalty_B1)
    return forbid(scores_BV, [i for i, row in enumerate(rows) if row.count < row.config.min_new_tokens], stop_ids)


def filtered(scores_BV: Tensor, configs: list[GenerationConfig]) -> Tensor:
    """Scores over the temperature, -inf for what may not be drawn."""
    device = scores_BV.device
    scores_BV = scores_BV / column([config.temperature for config in configs], device)
    if any(config.top_k for config in configs):
        scores_BV = filter_top_k(scores_BV, [config.top_k for config in configs])
    narrow = [i for i, config in enumerate(configs) if config.top_p < 1]
    if narrow:
        top_p_B1 = torch.tensor([[configs[i].top_p] for i in narrow], dtype=torch.float64, device=device)
        scores_BV[narrow] = filter_top_p(scores_BV[narrow], top_p_B1)
    if any(config.min_p for config in configs):
        scores_BV = filter_min_p(scores_BV, column([config.min_p for config in configs], device))
    return scores_BV


def column(values: list[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None]


def forbid(scores_BV: Tensor, rows: list[int], tokens: list[int]) -> Tensor:
    """-inf for `tokens` in some of the rows."""
    if not rows:
        return scores_BV
    scores_BV = scores_BV.clone()
    scores_BV[torch.tensor(rows, device=scores_BV.device)[:, None], tokens] = -math.inf
    return scores_BV


def penalise_repetition(scores_BV: Tensor, seen_BV: Tensor, penalty: float | Tensor) -> Tensor:
    """Makes seen tokens less likely, once each: negative scores times `penalty`, others divided by it (CTRL's rule)."""
    penalised_BV = torch.where(scores_BV < 0, scores_BV * penalty, scores_BV / penalty)
    return torch.where(seen_BV, penalised_BV, scores_BV)


def filter_top_k(scores_BV: Tensor, top_k: list[int]) -> Tensor:
    """-inf for what is not among the `top_k[b]` best of row b; ties stay, 0 keeps all."""
    vocab = scores_BV.shape[-1]
    sizes = [min(k, vocab) if k else vocab for k in top_k]
    most = max(size for size in sizes if size < vocab) if min(sizes) < vocab else 1
    best_BK = scores_BV.topk(most).values
    kth_B1 = best_BK.gather(1, torch.tensor([min(size, most) - 1 for size in sizes], device=best_BK.device)[:, None])
    is_open_B1 = torch.tensor([size == vocab for size in sizes], device=best_BK.device)[:, None]
    return scores_BV.masked_fill((scores_BV < kth_B1) & ~is_open_B1, -math.inf)


def filter_top_p(scores_BV: Tensor, top_p_B1: Tensor) -> Tensor:
    """-inf for the tail beyond probability `top_p`; the token that crosses the line stays.

    On a CPU, where sorting a vocabulary takes as long as the model, only the likeliest are sorted if they are enough.
    """
    vocab = scores_BV.shape[-1]
    best = scores_BV.topk(min(vocab, HEAD))
    probabilities_BK = (best.values.double() - scores_BV.double().logsumexp(-1, keepdim=True)).exp()
    above_BK = probabilities_BK.cumsum(-1) - probabilities_BK
    if len(best.values[0]) < vocab and not (above_BK[:, -1:] >= top_p_B1).all():
        best = scores_BV.sort(descending=True)
        probabilities_BK = best.values.double().softmax(-1)
        above_BK = probabilities_BK.cumsum(-1) - probabilities_BK
    is_kept_BK = above_BK < top_p_B1  # the most likely token always stays
    return torch.full_like(scores_BV, -math.inf).scatter(
        -1, best.indices, best.values.masked_fill(~is_kept_BK, -math.inf)
    )


def filter_min_p(scores_BV: Tensor, min_p_B1: Tensor) -> Tensor:
    """-inf for tokens less likely than `min_p` times the likeliest."""
    probabilities_BV = scores_BV.softmax(-1)
    return scores_BV.masked_fill(probabilities_BV < min_p_B1 * probabilities_BV.amax(-1, keepdim=True), -math.inf)


def draw(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token at which each row's cumulated probability passes `uniform_B` (uniform in [0, 1))."""
    cumulated_BV = probabilities_BV.double().cumsum(-1)
    threshold_B1 = uniform_B[:, None].double() * cumulated_BV[:, -1:]
    return torch.searchsorted(cumulated_BV, threshold_B1, right=True)[:, 0]
