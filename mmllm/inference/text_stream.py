"""The text of an answer while its tokens arrive: whole characters only, and nothing of the stop string that ends it.

Tokens end neither at characters nor at stop strings: one emoji takes three tokens, and one token may hold the end of
the answer, the stop string and more. So text that could be the beginning of a stop string is held back until the next
tokens decide, and the answer may be cut inside a token.
"""

from tokenizers.decoders import DecodeStream

from mmllm.data.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # decoders write this for an incomplete character


class AnswerText:
    """Decodes an answer token by token. The pieces returned by `feed` and `close` join to `text`.

    `text` ends before the stop string that is complete first, so it does not depend on how it is cut into tokens.
    Without stop strings and with `is_streamed` False, all of it comes from `close`, which is cheaper.
    """

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...] = (), *, is_streamed: bool = True):
        self.tokenizer, self.stops = tokenizer, stops
        self.decoder = DecodeStream(skip_special_tokens=True) if is_streamed or stops else None
        self.text, self.num_emitted = "", 0
        self.is_stopped = False

    def feed(self, token: int) -> str:
        """The text that may be shown after `token`; sets `is_stopped` when a stop string is complete."""
        if self.decoder is None:
            return ""
        self.text += self.decoder.step(self.tokenizer.inner, token) or ""
        return self._emit(is_last=False)

    def close(self, ids: list[int]) -> str:
        """The rest of the text, given all `ids` of the answer; an incomplete character at the end is dropped."""
        if not self.is_stopped:
            self.text = whole_text(self.tokenizer, ids)
        return self._emit(is_last=True)

    def _emit(self, *, is_last: bool) -> str:
        """What is new and final in `text`, which is cut before the first complete stop string."""
        fresh = self.text[self.num_emitted :]  # no stop string begins earlier: it would have been held back
        found = [(start + len(stop), start) for stop in self.stops if (start := fresh.find(stop)) >= 0]
        if found and not self.is_stopped:
            fresh = fresh[: min(found)[1]]
            self.text = self.text[: self.num_emitted] + fresh
            self.is_stopped = True
        held_back = 0 if self.is_stopped or is_last else longest_overlap(fresh, self.stops)
        piece = fresh[: len(fresh) - held_back]
        self.num_emitted += len(piece)
        return piece


def longest_overlap(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of one of `stops`."""
    sizes = (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
    return max(sizes, default=0)


def whole_text(tokenizer: Tokenizer, ids: list[int] | tuple[int, ...]) -> str:
    """The text of a complete answer, without an incomplete character at its end."""
    return tokenizer.decode(ids).rstrip(UNFINISHED)
