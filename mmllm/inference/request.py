"""What is asked of the model and what comes back.

The surprising fact: most of what a question about a picture costs is the picture. A `Prefix` keeps what the model has
computed for it, so that the second question pays for its own words only.
Next: engine.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from mmllm.inference.sampling import GenerationConfig


@dataclass(frozen=True)
class Prefix:
    """The beginning of prompts, read once: its ids, its number of pictures, and keys and values (L, G, T, K)."""

    ids: tuple[int, ...]
    num_images: int
    keys_LGTK: Tensor
    values_LGTK: Tensor

    def begins(self, ids: tuple[int, ...]) -> bool:
        """Whether a prompt of `ids` begins so and goes on."""
        return len(ids) > len(self.ids) and ids[: len(self.ids)] == self.ids


@dataclass(frozen=True)
class EncodedImage:
    """A picture that the model has looked at once, to be asked about many times: a value that its user may keep.

    `pixels` are (3, S, S); `prefix` is all of a conversation that begins with this picture, up to the first word.
    """

    pixels: Tensor
    prefix: Prefix


@dataclass(frozen=True)
class Prompt:
    """Token ids with their image places, and the pictures that belong there: (n, 3, S, S), n may be 0.

    Where the ids begin with those of `prefix` (its pictures are then the first ones), they are not read again.
    """

    ids: tuple[int, ...]
    pixels: Tensor
    prefix: Prefix | None = None


@dataclass(frozen=True)
class Hypothesis:
    """One way that beam search found: `logprob` is the sum over its tokens, the end token's included; `score` is
    `logprob / tokens ** length_penalty`."""

    ids: tuple[int, ...]
    text: str
    finish_reason: str
    logprob: float
    score: float


@dataclass(frozen=True)
class Generated:
    """An answer. `ids` are without the token that ended it; `finish_reason` is "stop", "length" or "cancelled".

    Under beam search `hypotheses` are the best `num_return_sequences`, the answer itself first.
    """

    ids: tuple[int, ...]
    text: str
    finish_reason: str
    prompt_tokens: int
    hypotheses: tuple[Hypothesis, ...] = ()


@dataclass(eq=False)
class Handle:
    """A request that was handed in. Exactly one of `answer` and `error` is set when it is done.

    The callbacks are called in the thread that drives the engine: `on_start()` when the request gets its slot,
    `on_token(id)` for every token, `on_text(piece)` for text of whole characters that no stop string can take back,
    `on_done(handle)` at the end. Under beam search tokens and text come at the end.
    """

    prompt: Prompt
    config: GenerationConfig
    on_start: Callable[[], None] | None = None
    on_token: Callable[[int], None] | None = None
    on_text: Callable[[str], None] | None = None
    on_done: Callable[["Handle"], None] | None = None
    is_cancelled: bool = field(default=False, init=False)
    answer: Generated | None = field(default=None, init=False)
    error: BaseException | None = field(default=None, init=False)

    @property
    def is_done(self) -> bool:
        return self.answer is not None or self.error is not None

    def cancel(self) -> None:
        """Gives the answer up, from any thread: its slot is free after the step under way."""
        self.is_cancelled = True

    def result(self) -> Generated:
        """The answer; raises what it failed with."""
        if self.error is not None:
            raise self.error
        if self.answer is None:
            raise ValueError("the request is not done; drive the engine until it is")
        return self.answer

    def finish(self, answer: Generated | None = None, error: BaseException | None = None) -> None:
        self.answer, self.error = answer, error
        if self.on_done:
            self.on_done(self)
