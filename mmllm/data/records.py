"""One record of a data file, in any known layout, to the images, turns and answers in it.

    {image, captions | caption | text}               each text is an answer to `prompt` (default: CAPTION_PROMPT)
    {image, question | query, answer | response}     one question; of several `answers` the most common is the target
    {image, conversations: [{from, value}, ...]}     LLaVA, ShareGPT
    {images, messages: [{role, content}, ...]}       TRL, ms-swift, OpenAI; `content` is a text or a list of parts
    {images, texts: [{user, assistant}, ...]}        The Cauldron

Each may have `id`, `system`, `kind` and `references`; IMAGE_KEYS are the names that an image may have. null, NaN and []
mean absent, as merged tables have them.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from mmllm.config.validation import shown
from mmllm.data.chat import MARK
from mmllm.errors import DataError

CAPTION_PROMPT = "Describe this image."
IMAGE_KEYS = (
    *("images", "image", "image_paths", "image_path", "image_file", "image_name", "image_url", "file_name", "filename"),
    *("filepath", "img", "imgs", "img_path", "picture", "path", "url"),
)
TURN_KEYS = ("conversations", "messages", "conversation", "texts")
QUESTION_KEYS = ("prompt", "question", "query", "instruction")
TEXT_KEYS = ("captions", "caption", "text", "comment", "sentences", "sentence")  # each text makes a sample
ANSWER_KEYS = ("answers", "answer", "response", "output")  # all of them make one sample
ID_KEYS = ("id", "question_id", "sample_id", "uid")
KNOWN_KEYS = {*IMAGE_KEYS, *TURN_KEYS, *QUESTION_KEYS, *TEXT_KEYS, *ANSWER_KEYS, *ID_KEYS}
KNOWN_KEYS |= {"system", "kind", "references"}
ROLE_OF = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
LONGEST_NAME = 1000  # a longer name of an image is its content in base64


class Turn(NamedTuple):
    role: str
    text: str
    is_target: bool = True  # of an answer: whether it is trained on


@dataclass(frozen=True)
class Record:
    """What a record holds. The texts of `turns` have a mark for each image. Each of `answers`, where there are any,
    follows the turns in a sample of its own; they may be of any type."""

    images: list[str]
    turns: list[Turn]
    answers: list[object]
    references: list[object]
    kind: str


def read_record(content: object) -> Record:
    """Raises DataError saying what is missing, double, or of another type."""
    if isinstance(content, DataError):  # what formats.py could not make a record of
        raise content
    if not isinstance(content, dict):
        raise DataError(f"a JSON object is needed, not {type(content).__name__}")
    values = present(content)
    images = [image_name(item) for item in as_list(first_of(values, IMAGE_KEYS)[1])]
    turn_key, turns = first_of(values, TURN_KEYS)
    answer_key, answers = first_of(values, TEXT_KEYS + ANSWER_KEYS)
    if turn_key and answer_key:
        raise DataError(f"has `{turn_key}` and also `{answer_key}`; keep one of them")
    if not turn_key and not answer_key:
        raise DataError("needs `conversations` or `messages` (a list of turns), `text`, `captions` or `answer`")
    references = as_list(values.get("references"))
    if turn_key:
        turns, inside = read_turns(turns, turn_key)
        images, answers = images or inside, []
        references = references or [turn.text for turn in turns if turn.role == "assistant"][-1:]
    else:
        question_key, question = first_of(values, QUESTION_KEYS)
        if not images and not question_key:
            raise DataError("has neither an `image` nor a `prompt`, so its text answers nothing")
        if question_key and not isinstance(question, str):
            raise DataError(f"`{question_key}` is {shown(question)}; it must be a text")
        turns, answers = [Turn("user", question or CAPTION_PROMPT)], [inner_text(item) for item in as_list(answers)]
        references = references or answers
        if answer_key in ANSWER_KEYS:
            answers = [most_common(answers)]
    if "system" in values:
        if turns[0].role == "system":
            raise DataError("has `system` and also a system turn; keep one of them")
        turns = [Turn("system", str(values["system"])), *turns]
    return Record([name for name in images if name], turns, answers, references, str(values.get("kind", "")))


def present(content: dict) -> dict[str, object]:
    """The values of a record by lower-case key, without null, NaN and []."""
    return {str(k).lower(): v for k, v in content.items() if v not in (None, [], {}) and v == v}  # NaN != NaN


def record_id(content: object, default: str) -> str:
    value = first_of(present(content), ID_KEYS)[1] if isinstance(content, dict) else None
    return default if value is None else str(value)


def unread_keys(content: object) -> Iterator[str]:
    """The keys of a record and of its turns that are not read."""
    values = present(content) if isinstance(content, dict) else {}
    yield from values.keys() - KNOWN_KEYS
    key, turns = first_of(values, TURN_KEYS)
    for name in {name for turn in as_list(turns) if isinstance(turn, dict) for name in present(turn)}:
        if name not in ("from", "value", "role", "content", "user", "assistant", "loss", "weight"):
            yield f"{key}[].{name}"


def first_of(values: dict, keys: tuple[str, ...]) -> tuple[str, object]:
    """The first of `keys` that there is, and its value; "" and None for none."""
    return next(((key, values[key]) for key in keys if key in values), ("", None))


def as_list(value: object) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def inner_text(item: object) -> object:
    """An answer, or the one in an object of COCO, Karpathy or VQA."""
    found = first_of(item, ("answer", "caption", "raw"))[1] if isinstance(item, dict) else None
    return item if found is None else found


def most_common(answers: list) -> object:
    return Counter(map(str, answers)).most_common(1)[0][0] if all(isinstance(a, str) for a in answers) else answers[0]


def image_name(item: object) -> str:
    """The file name of an image; "" where there is none."""
    found = first_of(present(item), IMAGE_KEYS)[1] if isinstance(item, dict) else item
    if isinstance(found, dict):  # {"image_url": {"url": ...}}
        return image_name(found)
    if not isinstance(found, str):
        raise DataError(f"an image is {shown(item)}; it must be a file name")
    if len(found) > LONGEST_NAME or re.match(r"data:|[a-zA-Z][a-zA-Z0-9+.-]+://", found):
        raise DataError(f"an image is {shown(found)}; it must be a file name: nothing is downloaded or decoded here")
    return found


def read_turns(turns: object, key: str) -> tuple[list[Turn], list[str]]:
    """The turns of a conversation, and the names of the images in them."""
    if not isinstance(turns, list):
        raise DataError(f"`{key}` must be a list of turns")
    found, images = [], []
    for number, turn in enumerate(turns):
        turn = present(turn) if isinstance(turn, dict) else {}
        is_target = all(is_wanted(turn, name, f"{key}[{number}]") for name in ("loss", "weight"))
        if "user" in turn:
            found += [Turn(role, str(turn[role]), is_target) for role in ("user", "assistant") if role in turn]
            continue
        role_key, role = first_of(turn, ("from", "role"))
        _, content = first_of(turn, ("value", "content"))
        if not isinstance(role, str) or not isinstance(content, str | list):
            raise DataError(f"{key}[{number}] needs `from` and `value`, or `role` and `content`")
        if role not in ROLE_OF:
            raise DataError(f"{key}[{number}].{role_key} is {role!r}; it can be {', '.join(ROLE_OF)}")
        text, inside = (content, []) if isinstance(content, str) else join_parts(content, f"{key}[{number}]")
        found.append(Turn(ROLE_OF[role], text, is_target))
        images += inside
    return found, images


def is_wanted(turn: dict, name: str, where: str) -> bool:
    """False where `loss` (ms-swift) is false or `weight` (OpenAI) is 0."""
    if turn.get(name, 1) not in (0, 1):
        raise DataError(f"{where}.{name} is {shown(turn[name])}; it can be 0 or 1, false or true")
    return bool(turn.get(name, 1))


def join_parts(parts: list, where: str) -> tuple[str, list[str]]:
    """The text of a list of parts, with a mark for each image, and the names of the images that have one."""
    text, images = "", []
    for part in parts:
        part = present({"text": part} if isinstance(part, str) else part if isinstance(part, dict) else {})
        if part.get("type", "text") in ("image", "image_url"):
            images += [image_name(part)] if first_of(part, IMAGE_KEYS)[0] else []
            text += MARK
        elif isinstance(part.get("text"), str):
            text += "\n" * (text.endswith(MARK) and part["text"][:1] != "\n") + part["text"]  # as the chat template
        else:
            raise DataError(f"{where} has a part that is neither a text nor an image: {shown(part)}")
    return text, images
