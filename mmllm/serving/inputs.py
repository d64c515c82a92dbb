"""The fields of each endpoint's requests: types, ranges and defaults.

Types are strict in JSON; in a form numbers arrive as text and are converted. JSON null means the default. Limits that
an operator may set come from the settings, as the validation context.
"""

import secrets
from dataclasses import fields
from typing import Annotated, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from mmllm.config.validation import describe, did_you_mean, path_of, shown
from mmllm.inference.pipeline import DEFAULT_PROMPT
from mmllm.inference.request import GenerationConfig
from mmllm.serving.http import HttpError
from mmllm.serving.settings import Settings

DEFAULT_NEW_TOKENS = 100
# Codes and sentences for errors of pydantic, by type or by type and field; all others are invalid_value.
CODES = {
    "missing": "missing_field",
    "extra_forbidden": "unknown_field",
    "string_unicode": "invalid_unicode",
    ("bytes_type", "image"): "not_a_file",
}
SENTENCES = {
    ("missing", "image"): 'no image in the form; send -F "image=@file.jpg"',
    ("bytes_type", "image"): 'image is text, not a file; with curl put an @ before the path: -F "image=@file.jpg"',
}


def fault(code: str, sentence: str) -> PydanticCustomError:
    """A validation error with a code and a sentence of our own."""
    return PydanticCustomError("fault", "{sentence}", {"code": code, "sentence": sentence})


def check_message(text: str, info: ValidationInfo) -> str:
    name, limit = info.field_name, info.context.max_message_chars
    if not text:
        raise fault("empty_message", f"{name} is empty; write something in it")
    if len(text) > limit:
        raise fault("message_too_long", f"{name} has {len(text)} characters; the limit is {limit}")
    return text


def as_tuple(value: object) -> object:
    """A single string is a list of one."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


# A pattern, even an empty one, makes pydantic refuse lone surrogates, which are no Unicode.
Text = Annotated[str, StringConstraints(strict=True, pattern="")]
Message = Annotated[Text, StringConstraints(strip_whitespace=True), AfterValidator(check_message)]
File = Annotated[bytes, Strict()]
ConversationId = Annotated[str, StringConstraints(strict=True, pattern="^[A-Za-z0-9._-]{1,64}$")]
StopString = Annotated[Text, StringConstraints(min_length=1, max_length=64)]
StopList = Annotated[
    tuple[StopString, ...],
    Field(max_length=4),
    BeforeValidator(as_tuple, json_schema_input_type=StopString | list[StopString]),
]


class SamplingFields(BaseModel):
    """How to choose tokens; every endpoint takes these fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=2**31)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=2)
    seed: int = Field(default_factory=lambda: secrets.randbelow(2**53), ge=0, lt=2**63)  # drawn ones fit JavaScript
    stop: StopList = ()
    stream: bool = False

    @property
    def config(self) -> GenerationConfig:
        return GenerationConfig(**self.model_dump(include={each.name for each in fields(GenerationConfig)}))


class GenerationFields(SamplingFields):
    max_new_tokens: int = Field(DEFAULT_NEW_TOKENS, ge=1)

    @field_validator("max_new_tokens")
    @classmethod
    def check_max_new_tokens(cls, value: int, info: ValidationInfo) -> int:
        limit = info.context.max_new_tokens
        if value > limit:
            raise fault("invalid_value", f"max_new_tokens is {value}; the limit is {limit} (MMLLM_MAX_NEW_TOKENS)")
        return value


class ImageFields(GenerationFields):
    image: File


class CaptionFields(ImageFields):
    prompt: Message = DEFAULT_PROMPT


class QuestionFields(ImageFields):
    question: Message


class ChatFields(GenerationFields):
    message: Message
    image_base64: Text | None = None
    conversation_id: ConversationId | None = None
    reset: bool = False


class DeleteFields(BaseModel):
    conversation_id: ConversationId


Fields = TypeVar("Fields", bound=BaseModel)


def validate(model: type[Fields], values: dict[str, object], settings: Settings, *, is_form: bool) -> Fields:
    """`values` as `model`. Raises HttpError 400 for the first field that is wrong."""
    known = model.model_fields
    for name, value in values.items():
        if name not in known:
            hint = did_you_mean(name, known) or f"; known are {', '.join(known)}"
            raise HttpError(400, "unknown_field", f"unknown field {shown(name)}{hint}", param=name[:100])
        if is_form and isinstance(value, list) and name != "stop":
            code = "too_many_images" if name == "image" else "duplicate_field"
            raise HttpError(400, code, f"field {name} appears twice; send it once", param=name)
    given = {name: value for name, value in values.items() if value is not None}
    if "max_new_tokens" in known:
        given.setdefault("max_new_tokens", min(DEFAULT_NEW_TOKENS, settings.max_new_tokens))
    try:
        return model.model_validate(given, strict=None if is_form else True, context=settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        kind, param, context = first["type"], path_of(first["loc"]), first.get("ctx", {})
        code = context.get("code") or CODES.get((kind, param)) or CODES.get(kind, "invalid_value")
        sentence = context.get("sentence") or SENTENCES.get((kind, param)) or describe(error, noun="field")
        raise HttpError(400, code, sentence, param=param[:100]) from None
