"""What the engine is asked and what it returns."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from mmllm.errors import UserError
from mmllm.inference.answer_form import AnswerForm

GREEDY_BELOW = 1e-3  # dividing logits by a smaller temperature overflows; it means greedy
MAX_STOPS = 16


@dataclass(frozen=True)
class GenerationConfig:
    """How to decode: `temperature` 0 is greedy, `top_k` 0, `top_p` 1 and `min_p` 0 filter nothing.

    An answer ends before the first of the strings in `stop`. Beam search with `num_beams` returns the best
    `num_return_sequences` hypotheses; `early_stopping` is False, True or "never" as in transformers.
    UserError for values out of range.
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
    logprobs: bool = False  # return that of each token
    top_logprobs: int = 0  # and of this many likeliest tokens at its place
    form: AnswerForm | None = None  # what the answer must look like

    def __post_init__(self):
        is_stop_list = isinstance(self.stop, tuple) and all(isinstance(text, str) and text for text in self.stop)
        for name, is_valid, wanted in (
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
            ("top_logprobs", self.top_logprobs >= 0, "0 (none) or more"),
            ("early_stopping", self.early_stopping in (True, False, "never"), "True, False or 'never'"),
            ("num_return_sequences", 1 <= self.num_return_sequences <= self.num_beams, "from 1 to num_beams"),
            ("stop", is_stop_list and len(self.stop) <= MAX_STOPS, f"a tuple of at most {MAX_STOPS} non-empty strings"),
        ):
            if not is_valid:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be {wanted}")
        beams = f"num_beams {self.num_beams} with"
        if self.num_beams > 1 and not self.is_greedy:
            raise UserError(f"{beams} temperature {self.temperature}: beam search does not sample")
        if self.num_beams > 1 and (self.logprobs or self.top_logprobs):
            raise UserError(f"num_beams {self.num_beams} with logprobs: beam search returns hypotheses with theirs")
        if self.form and (self.num_beams > 1 or self.min_new_tokens):
            raise UserError("an answer of a given form cannot have num_beams or min_new_tokens")
        if self.num_beams > 1 and self.stop:
            raise UserError(f"{beams} stop strings: beam search ends at the end token only")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def is_argmax(self) -> bool:
        """Whether the token of the largest logit is always right."""
        return self.is_greedy and self.repetition_penalty == 1 and self.min_new_tokens == 0 and not self.form


@dataclass(frozen=True)
class Prompt:
    """Token ids with image placeholders, and the pixels (n, 3, S, S) of the images in order; n may be 0."""

    ids: tuple[int, ...]
    pixels: Tensor


@dataclass(frozen=True)
class Hypothesis:
    """A result of beam search. `logprob` is the sum over its tokens, end token included;
    `score` is `logprob / tokens ** length_penalty`."""

    ids: tuple[int, ...]
    text: str
    finish_reason: str
    logprob: float
    score: float


@dataclass(frozen=True)
class Generated:
    """An answer. `ids` exclude the end token; `finish_reason` is "stop", "length" or "cancelled".

    Beam search also returns the best `num_return_sequences` as `hypotheses`, of which the first is the answer.
    `logprobs`, where asked for, are those of the model for each token and the end token, natural logarithms.
    """

    ids: tuple[int, ...]
    text: str
    finish_reason: str
    prompt_tokens: int
    hypotheses: tuple[Hypothesis, ...] = ()
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()  # of each token: the likeliest ones, best first
    end_id: int | None = None  # the end token that was chosen, without beams

    @property
    def confidence(self) -> float | None:
        """The geometric mean of the tokens' probabilities, from 0 to 1; None where no logprobs were asked for."""
        return math.exp(sum(self.logprobs) / len(self.logprobs)) if self.logprobs else None


@dataclass(eq=False)
class Handle:
    """A submitted request. When it is done, exactly one of `answer` and `error` is set.

    The callbacks run in the thread that drives the engine: `on_start()` when the request gets its slot, `on_token(id)`
    for every token, `on_text(piece)` for every piece of text that is final, and `on_done(handle)` at the end. Under
    beam search all tokens and text come at the end.
    """

    prompt: Prompt
    config: GenerationConfig
    on_start: Callable[[], None] | None = None
    on_token: Callable[[int], None] | None = None
    on_text: Callable[[str], None] | None = None
    on_done: Callable[["Handle"], None] | None = None
    is_cancelled: bool = field(default=False, init=False)
    reused_tokens: int = field(default=0, init=False)  # of the prompt, which an earlier request had computed
    answer: Generated | None = field(default=None, init=False)
    error: BaseException | None = field(default=None, init=False)

    @property
    def is_done(self) -> bool:
        return self.answer is not None or self.error is not None

    def cancel(self) -> None:
        """Ends the request after the current step; may be called from any thread."""
        self.is_cancelled = True

    def emit_text(self, piece: str) -> None:
        if piece and self.on_text:
            self.on_text(piece)

    def result(self) -> Generated:
        """The answer; raises the request's error if it failed, ValueError if it is not done."""
        if self.error is not None:
            raise self.error
        if self.answer is None:
            raise ValueError("the request is not done; drive the engine until it is")
        return self.answer

    def finish(self, answer: Generated | None = None, error: BaseException | None = None) -> None:
        self.answer, self.error = answer, error
        if self.on_done:
            self.on_done(self)
