"""The text of an answer as it grows: whole characters, and never a piece of a string that ends it.

The surprising fact: a token ends neither at a character nor at a stop string. One emoji takes three tokens, and one
token may hold the end of the answer, the stop string and what would have followed. So text is held back while it could
still become something else, and cut inside a token where it must be.
Next: request.py.
"""

from mmllm.data.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # what decoders put in the place of half a character


class AnswerText:
    """Ids in, text out. The pieces that `feed` and `close` give are together `text`, cut before the first stop string.

    First is the one that ends first: so the text is the same however it was cut into tokens.
    """

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...] = ()):
        self.tokenizer, self.stops = tokenizer, stops
        self.stream = tokenizer.stream()
        self.text, self.told = "", 0
        self.is_stopped = False

    def feed(self, token: int) -> str:
        """What may be shown now that `token` is there; `is_stopped` tells whether the answer has ended with it."""
        self.text += self.stream.step(token)
        return self._tell()

    def close(self, ids: list[int]) -> str:
        """The rest, when no token will follow `ids`: all but half a character at the end."""
        if not self.is_stopped:
            self.text = whole_text(self.tokenizer, ids)
            self._cut()
        return self._tell(is_all=True)

    def _tell(self, *, is_all: bool = False) -> str:
        self._cut()
        held = 0 if self.is_stopped or is_all else longest_beginning(self.text[self.told :], self.stops)
        piece = self.text[self.told : len(self.text) - held]
        self.told += len(piece)
        return piece

    def _cut(self) -> None:
        """Takes off the first stop string and what follows; none can begin before `told`, or it would be held back."""
        fresh = self.text[self.told :]
        found = [(at + len(stop), at) for stop in self.stops if (at := fresh.find(stop)) >= 0]
        if found and not self.is_stopped:
            self.text = self.text[: self.told + min(found)[1]]
            self.is_stopped = True


def longest_beginning(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of `text` with which one of `stops` begins."""
    sizes = (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
    return max(sizes, default=0)


def whole_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of a whole answer, without half a character at its end."""
    return tokenizer.decode(ids).rstrip(UNFINISHED)
