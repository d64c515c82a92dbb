"""Conversations to token ids and labels, in the ChatML template of Qwen2.5.

    <|im_start|>system\\n{system}<|im_end|>\\n<|im_start|>user\\n<|vision_start|>{<|image_pad|> x Q}<|vision_end|>\\n{text}
    <|im_end|>\\n<|im_start|>assistant\\n{answer}<|im_end|>\\n

Targets are the answers and the `<|im_end|>` that closes each. Labels are built segment by segment, not searched for in
the ids of the whole: no tokenization of the whole can disagree with that of its parts. Q is the number of visual tokens
of an image. Template: https://huggingface.co/Qwen/Qwen2.5-0.5B-Instruct; `mmllm preview` shows what a data file trains on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from mmllm.data.image import ImageProcessor
from mmllm.data.tokenizer import Tokenizer
from mmllm.errors import DataError

IGNORED = -100  # the label of a token that is not a target
MARK = "<image>"  # the place of an image in the text of a data file
NO_ANSWER = "no assistant turn, so there is nothing to train on"
ROLES = ("system", "user", "assistant")
DEFAULT_SYSTEM = "You are a helpful assistant."


class _Image:
    def __repr__(self) -> str:
        return "IMAGE"


IMAGE = _Image()  # the part of a message that stands for its next image


@dataclass(frozen=True)
class Message:
    """One turn: texts and images in their order. An answer may be there without being trained on."""

    role: str
    parts: tuple[str | _Image, ...]
    is_target: bool = True

    @property
    def num_images(self) -> int:
        return self.parts.count(IMAGE)

    @property
    def text(self) -> str:
        """As a data file has it, with MARK for each image."""
        return "".join(MARK if part is IMAGE else part for part in self.parts)


def user(text: str, images: int = 0) -> Message:
    """A user turn, with `images` images in front of its text."""
    return Message("user", (*(IMAGE, "\n") * images, text))


def assistant(text: str) -> Message:
    return Message("assistant", (text,))


def has_target(messages: Sequence[Message]) -> bool:
    return any(message.role == "assistant" and message.is_target for message in messages)


def parse_text(text: str) -> tuple[str | _Image, ...]:
    """The parts of a text in which `<image>` marks the places of images."""
    parts = []
    for i, piece in enumerate(text.split(MARK)):
        parts += [IMAGE] * (i > 0) + [piece] * bool(piece)
    return tuple(parts)


@dataclass(frozen=True)
class Encoded:
    """A row of tokens; `labels[t]` is `ids[t]` where that is a target, else IGNORED.

    `images` says which of the sample's images each place for an image shows. `segment_ids` number the conversations of a
    row that holds several, see packing.py; [] for a single one. `left_out_exchanges`, of `left_out_tokens` in all, did
    not fit.
    """

    ids: list[int]
    labels: list[int]
    images: list[int]
    segment_ids: list[int] = field(default_factory=list)
    left_out_exchanges: int = 0
    left_out_tokens: int = 0


class ChatProcessor:
    """From raw input to the model's: tokenizer, image processor, chat template and system prompt.

    An image takes `num_image_tokens` places in the ids.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_processor: ImageProcessor,
        num_image_tokens: int,
        system: str = DEFAULT_SYSTEM,
    ):
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.num_image_tokens = num_image_tokens
        self.system = system
        self._start, self._end = tokenizer.id("<|im_start|>"), tokenizer.id("<|im_end|>")
        self._newline = tokenizer.encode("\n")
        pads = [tokenizer.image_id] * num_image_tokens
        self._image = [tokenizer.id("<|vision_start|>"), *pads, tokenizer.id("<|vision_end|>")]

    def encode(self, messages: list[Message], max_length: int | None = None) -> Encoded:
        """Ids and labels of a conversation that ends with an answer.

        Above `max_length` tokens the oldest exchanges without an image are left out. DataError when it still does not
        fit, or has no answer: images and the last answer are never cut.
        """
        messages = self._with_system(messages)
        if not has_target(messages):
            raise DataError(NO_ANSWER)
        turns = [self._turn(message) for message in messages]
        length = whole_length = sum(len(ids) for ids, _ in turns)
        oldest, num_turns = 1, len(turns)
        while max_length is not None and length > max_length:
            oldest = next((i for i in range(oldest, len(turns) - 2) if _is_text_exchange(messages[i : i + 2])), 0)
            if not oldest:
                raise DataError(
                    f"takes {length} tokens, but max_length is {max_length}; shorten it or raise max_length"
                )
            exchange = slice(oldest, oldest + 2)
            length -= sum(len(ids) for ids, _ in turns[exchange])
            del turns[exchange], messages[exchange]
        return Encoded(
            [token for ids, _ in turns for token in ids],
            [label for _, labels in turns for label in labels],
            list(range(sum(message.num_images for message in messages))),
            left_out_exchanges=(num_turns - len(turns)) // 2,
            left_out_tokens=whole_length - length,
        )

    def encode_prompt(self, messages: list[Message]) -> list[int]:
        """Ids of a conversation, followed by the opening of the assistant's next turn."""
        turns = [self._turn(message)[0] for message in self._with_system(messages)]
        return [token for ids in turns for token in ids] + self._opening("assistant")

    def _with_system(self, messages: list[Message]) -> list[Message]:
        has_own = messages and messages[0].role == "system"
        return list(messages) if has_own else [Message("system", (self.system,)), *messages]

    def _opening(self, role: str) -> list[int]:
        return [self._start, *self.tokenizer.encode(f"{role}\n")]

    def _turn(self, message: Message) -> tuple[list[int], list[int]]:
        """Ids and labels of one turn."""
        if message.role not in ROLES:
            raise DataError(f"role {message.role!r}; it can be {', '.join(ROLES)}")
        if message.role == "assistant":
            opening = self._opening("assistant")
            answer = [*self.tokenizer.encode("".join(message.parts)), self._end]
            targets = answer if message.is_target else [IGNORED] * len(answer)
            labels = [IGNORED] * len(opening) + targets + [IGNORED] * len(self._newline)
            return opening + answer + self._newline, labels
        ids, text = [self._start], f"{message.role}\n"
        for part in message.parts:
            if part is IMAGE:
                ids += self.tokenizer.encode(text) + self._image
                text = ""
            else:
                text += part  # adjacent texts are encoded together, as the template makes them one string
        ids += self.tokenizer.encode(text) + [self._end] + self._newline
        return ids, [IGNORED] * len(ids)


def _is_text_exchange(messages: list[Message]) -> bool:
    """Whether these are a question without an image and its answer."""
    return [message.role for message in messages] == ["user", "assistant"] and not messages[0].num_images


def mark_targets(encoded: Encoded, processor: ChatProcessor, on: str = "[", off: str = "]") -> str:
    """The row as text, targets between `on` and `off`, the places of an image as one and their number."""
    image_id = processor.tokenizer.image_id
    text = ""
    for is_target, group in groupby(zip(encoded.ids, encoded.labels, strict=True), lambda pair: pair[1] != IGNORED):
        for is_image, tokens in groupby((token for token, _ in group), lambda token: token == image_id):
            ids = list(tokens)
            piece = processor.tokenizer.inner.decode(ids[:1] if is_image else ids, skip_special_tokens=False)
            piece += f" x {len(ids)}" if is_image else ""
            text += f"{on}{piece}{off}" if is_target else piece
    return text
