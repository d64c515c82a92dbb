"""Conversations to ids and labels: the only place that knows ChatML and where a picture stands in the text.

The surprising fact: labels are made by building, not by searching. Each segment is encoded on its own and known to be
learnt or not, so no tokenisation of the whole can disagree with that of its parts.

    <|im_start|>system\\n{system}<|im_end|>\\n<|im_start|>user\\n<|vision_start|>{<|image_pad|> x Q}<|vision_end|>\\n{text}
    <|im_end|>\\n<|im_start|>assistant\\n{answer}<|im_end|>\\n

Learnt are the answers and the `<|im_end|>` that closes each. Template: https://huggingface.co/Qwen/Qwen2.5-0.5B-Instruct.
`mmllm preview` shows what a data file trains on.
"""

import json
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from mmllm.data.image import ImageProcessor
from mmllm.data.tokenizer import Tokenizer
from mmllm.errors import CheckpointError, DataError

IGNORED = -100  # the label of a position that is not learnt
MARK = "<image>"  # stands for a picture in the text of a data file
ROLES = ("system", "user", "assistant")
DEFAULT_SYSTEM = "You are a helpful assistant."


class _Image:
    def __repr__(self) -> str:
        return "IMAGE"


IMAGE = _Image()  # the part of a message that stands for its next picture


@dataclass(frozen=True)
class Message:
    """One turn: text and pictures in their order."""

    role: str
    parts: tuple[str | _Image, ...]

    @property
    def num_images(self) -> int:
        return self.parts.count(IMAGE)


def user(text: str, images: int = 0) -> Message:
    """What a person says, with `images` pictures in front."""
    return Message("user", (*(IMAGE, "\n") * images, text))


def assistant(text: str) -> Message:
    return Message("assistant", (text,))


def parse_text(text: str) -> tuple[str | _Image, ...]:
    """The parts of a data file's text, in which `<image>` marks the places of pictures."""
    parts = []
    for i, piece in enumerate(text.split(MARK)):
        parts += [IMAGE] * (i > 0) + [piece] * bool(piece)
    return tuple(parts)


@dataclass(frozen=True)
class Encoded:
    """A conversation as the model is trained on it; `labels[t]` is `ids[t]` where it is learnt, else IGNORED.

    `branches` are those of several conversations in one row, see branches.py; [] for a single one.
    """

    ids: list[int]
    labels: list[int]
    num_images: int
    segment_ids: list[int] = field(default_factory=list)


class ChatProcessor:
    """Everything between raw input and the model: the tokenizer, the pictures' arithmetic, the template, the system text."""

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
        places = [tokenizer.image_id] * num_image_tokens
        self._image = [tokenizer.id("<|vision_start|>"), *places, tokenizer.id("<|vision_end|>")]

    def encode(self, messages: list[Message], max_length: int | None = None) -> Encoded:
        """Ids and labels of a conversation that ends with an answer.

        Beyond `max_length` tokens the oldest exchanges without a picture are left out. DataError when it still does not
        fit, or when there is nothing to learn: no picture is ever cut, and the last answer is always whole.
        """
        messages = self._with_system(messages)
        if not any(message.role == "assistant" for message in messages):
            raise DataError("no assistant turn, so there is nothing to learn from it")
        turns = [self._turn(message) for message in messages]
        length = sum(len(ids) for ids, _ in turns)
        first = 1
        while max_length is not None and length > max_length:
            first = next(
                (
                    i
                    for i in range(first, len(turns) - 2)
                    if messages[i].role == "user" and not messages[i].num_images and messages[i + 1].role == "assistant"
                ),
                0,
            )
            if not first:
                raise DataError(
                    f"takes {length} tokens, but max_length is {max_length}; shorten it or raise max_length"
                )
            length -= len(turns[first][0]) + len(turns[first + 1][0])
            del turns[first : first + 2], messages[first : first + 2]
        return Encoded(
            [token for ids, _ in turns for token in ids],
            [label for _, labels in turns for label in labels],
            sum(message.num_images for message in messages),
        )

    def encode_prompt(self, messages: list[Message]) -> list[int]:
        """Ids of a conversation up to the place where the assistant begins to speak."""
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
            ignored = [IGNORED] * len(opening), [IGNORED] * len(self._newline)
            return opening + answer + self._newline, ignored[0] + answer + ignored[1]
        ids, text = [self._start], f"{message.role}\n"
        for part in message.parts:
            if part is IMAGE:
                ids += self.tokenizer.encode(text) + self._image
                text = ""
            else:
                text += part  # neighbours are encoded together, as in the template's one string
        ids += self.tokenizer.encode(text) + [self._end] + self._newline
        return ids, [IGNORED] * len(ids)

    def save(self, folder: str | Path) -> None:
        """Writes the files by which transformers' processors do the same (the LLaVA layout)."""
        folder = Path(folder)
        self.tokenizer.save(folder)
        for name, content in (
            ("tokenizer_config.json", TOKENIZER_CONFIG | {"model_max_length": 32768}),
            ("preprocessor_config.json", self.image_processor.to_dict()),
            ("processor_config.json", PROCESSOR_CONFIG | {"patch_size": self._patch_size()}),
            (
                "generation_config.json",
                {
                    "do_sample": False,
                    "eos_token_id": [self._end, self.tokenizer.pad_id],
                    "pad_token_id": self.tokenizer.pad_id,
                },
            ),
        ):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("SYSTEM", json.dumps(self.system)))

    def _patch_size(self) -> int:
        """The side of a patch, from which LlavaProcessor counts the places of a picture."""
        return self.image_processor.size // int(self.num_image_tokens**0.5)

    @classmethod
    def load(cls, folder: str | Path, num_image_tokens: int, system: str = DEFAULT_SYSTEM) -> "ChatProcessor":
        """Reads the tokenizer and the pictures' arithmetic of a model directory."""
        file = Path(folder) / "preprocessor_config.json"
        try:
            images = ImageProcessor.from_dict(json.loads(file.read_text()))
        except FileNotFoundError as error:
            raise CheckpointError(f"{file}: no such file; a model directory needs it") from error
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{file}: not JSON; copy it again from its source") from error
        return cls(Tokenizer(folder), images, num_image_tokens, system)


TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "clean_up_tokenization_spaces": False,
}

PROCESSOR_CONFIG = {
    "processor_class": "LlavaProcessor",
    "image_token": "<|image_pad|>",
    "num_additional_image_tokens": 1,
    "vision_feature_select_strategy": "default",
}

# The same template for transformers' processors; a picture that another part follows without a newline gets one.
CHAT_TEMPLATE = """\
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\n' + SYSTEM + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
                {%- if not loop.last and not (loop.nextitem.text is defined and loop.nextitem.text[:1] == '\\n') %}
                    {{- '\\n' }}
                {%- endif %}
            {%- else %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def marked(encoded: Encoded, processor: ChatProcessor, on: str = "[", off: str = "]") -> str:
    """The conversation as text, what is learnt between `on` and `off`, the places of a picture as one and their number."""
    place = processor.tokenizer.image_id
    text = ""
    for is_learnt, group in groupby(zip(encoded.ids, encoded.labels, strict=True), lambda pair: pair[1] != IGNORED):
        for is_place, places in groupby((token for token, _ in group), lambda token: token == place):
            ids = list(places)
            piece = processor.tokenizer.inner.decode(ids[:1] if is_place else ids, skip_special_tokens=False)
            piece += f" x {len(ids)}" if is_place else ""
            text += f"{on}{piece}{off}" if is_learnt else piece
    return text
