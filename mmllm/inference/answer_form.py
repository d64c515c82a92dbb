"""Answers of a given form: which tokens may come next, so that the whole is JSON of a schema.

Of JSON Schema this is the part that a small model is asked for: one value of a list, or a flat object whose fields are
text, numbers, true or false, or values of lists. All fields are written, in the order of the schema. Other keywords are
refused by name. Free text holds no quotation marks, backslashes and line ends, and only characters that are whole in
some token.

A form is a sequence of parts: fixed texts to choose from, free text, numbers. Fixed texts end before a space, where
tokens begin, so that the model may write an answer in the tokens that it was trained on.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from mmllm.data.tokenizer import Tokenizer
from mmllm.errors import UserError

MAX_BYTES = 20_000  # of a schema, and of all fixed texts: each token looks them up again
ANNOTATIONS = {"title", "description", "default", "examples", "$schema"}  # change no answer
PLAIN = re.compile(r'[^"\\\x00-\x1f]+')


class Free(Enum):
    """What is not fixed. For numbers, the pattern of their beginnings; one that ends with a digit may be complete."""

    TEXT = None
    INTEGER = re.compile(rb"-?(0|[1-9][0-9]{0,14})?")
    NUMBER = re.compile(rb"-?((0|[1-9][0-9]{0,14})(\.[0-9]{0,14})?)?")


KINDS = {"string": Free.TEXT, "integer": Free.INTEGER, "number": Free.NUMBER}
Part = tuple[bytes, ...] | Free


class Vocabulary:
    """The tokens of a tokenizer by their bytes. Takes half a second for 150,000 tokens."""

    def __init__(self, tokenizer: Tokenizer):
        control = tokenizer.inner.get_added_tokens_decoder()
        self.bytes_of = {i: tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size) if i not in control}
        self.ids = {encoded: i for i, encoded in self.bytes_of.items()}
        self.stop_ids = set(tokenizer.stop_ids)
        self.closing: dict[bytes, list[int]] = {}  # tokens that end free text, by their part from the quote on
        plain = []
        for i, encoded in self.bytes_of.items():
            text, quote, rest = encoded.partition(b'"')
            if quote and (not text or is_plain(text)):
                self.closing.setdefault(quote + rest, []).append(i)
            elif is_plain(encoded):
                plain.append(i)
        self.plain = torch.tensor(plain)  # tokens that free text may have

    def beginning(self, texts: Iterable[bytes]) -> set[int]:
        """The tokens with which one of `texts` may begin."""
        found = (self.ids.get(text[:end]) for text in texts for end in range(1, len(text) + 1))
        return {token for token in found if token is not None}


def is_plain(encoded: bytes) -> bool:
    try:
        return PLAIN.fullmatch(encoded.decode()) is not None
    except UnicodeDecodeError:
        return False


@dataclass(frozen=True)
class AnswerForm:
    """What an answer must look like, in the tokens of `vocabulary`."""

    parts: tuple[Part, ...]
    vocabulary: Vocabulary


def form_of(schema: dict[str, object], vocabulary: Vocabulary) -> AnswerForm:
    """The form of a JSON schema. UserError for what is not supported."""
    too_large = UserError("the schema is too large; use fewer or shorter names and values")
    if len(str(schema)) > MAX_BYTES:  # before texts are joined: each value of an enum with the name that follows it
        raise too_large
    if "properties" in schema or schema.get("type") == "object":
        parts = object_parts(schema)
    elif isinstance(content := content_of(schema, "the schema"), Free):
        raise UserError(f"the schema has type {schema['type']!r}; it can be an object with properties, or an enum")
    else:
        parts = [content]
    if sum(len(text) for part in parts if isinstance(part, tuple) for text in part) > MAX_BYTES:
        raise too_large
    return AnswerForm(tuple(parts), vocabulary)


def object_parts(schema: dict[str, object]) -> list[Part]:
    check_keywords(schema, "the schema", {"type", "properties", "required", "additionalProperties"})
    if not isinstance(fields := schema.get("properties"), dict) or not fields:
        raise UserError("the schema has no properties; it must be an object with fields, or an enum")
    parts: list[Part] = []
    fixed = [b"{"]
    for name, field in fields.items():
        fixed = [text + encode(name) + b":" for text in fixed]
        content = content_of(field, f"the field {name[:100]!r}")
        if isinstance(content, Free):
            quote = b'"' if content is Free.TEXT else b""
            parts += [tuple(text + b" " + quote for text in fixed), content]
            fixed = [quote + b", "]
        elif len(fixed) == 1:
            fixed = [fixed[0] + b" " + value + b", " for value in content]
        else:
            parts.append(tuple(fixed))
            fixed = [b" " + value + b", " for value in content]
    return [*parts, tuple(text.removesuffix(b", ") + b"}" for text in fixed)]


def content_of(schema: object, place: str) -> Part:
    """The values that a schema lists, or the kind of text or number."""
    if not isinstance(schema, dict):
        raise UserError(f"{place} has no schema; give its type or an enum")
    check_keywords(schema, place, {"type", "enum", "const"})
    kind, values = schema.get("type"), schema.get("enum", [schema["const"]] if "const" in schema else None)
    if values is None and kind == "boolean":
        values = [True, False]
    if values is None:
        if not isinstance(kind, str) or kind not in KINDS:
            raise UserError(f"{place} has type {str(kind)[:100]!r}; it can be boolean, {', '.join(KINDS)} or an enum")
        return KINDS[kind]
    if not isinstance(values, list) or not values or any(isinstance(value, list | dict) for value in values):
        raise UserError(f"{place} has an enum that is not a list of texts, numbers or booleans")
    return tuple(dict.fromkeys(encode(value) for value in values))


def check_keywords(schema: dict[str, object], place: str, known: set[str]) -> None:
    if unknown := sorted(schema.keys() - known - ANNOTATIONS):
        raise UserError(f"{place} has {unknown[0][:100]!r}, which is not supported; leave it out")


def encode(value: object) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        raise UserError("the schema has text that is not Unicode, or a number that is too large") from None


class FormState:
    """How far one answer has followed its form."""

    def __init__(self, form: AnswerForm):
        self.parts, self.vocabulary = form.parts, form.vocabulary
        self.index, self.text = 0, b""  # the part that is being written, and what there is of it

    def allowed(self) -> Tensor:
        """Ids of the tokens that may come next."""
        vocabulary = self.vocabulary
        if self.index == len(self.parts):
            return torch.tensor(sorted(vocabulary.stop_ids))
        part, following = self.parts[self.index], self.parts[self.index + 1 : self.index + 2]
        if part is Free.TEXT:
            starts = {text[:end] for text in following[0] for end in range(1, len(text) + 1)}
            closing = [token for start in starts for token in vocabulary.closing.get(start, ())]
            return torch.cat([vocabulary.plain, torch.tensor(closing)])
        if isinstance(part, Free):
            digits = [bytes([byte]) for byte in b"-.0123456789" if part.value.fullmatch(self.text + bytes([byte]))]
            ids = vocabulary.beginning(digits)
            ids |= vocabulary.beginning(following[0]) if self.text[-1:].isdigit() else set()
        else:
            ids = vocabulary.beginning(text[len(self.text) :] for text in part if text.startswith(self.text))
            ids |= vocabulary.stop_ids if self.text in part else set()
        return torch.tensor(sorted(ids))

    def accept(self, token: int) -> None:
        """Follows a token that was allowed."""
        if token in self.vocabulary.stop_ids:
            return
        part, encoded = self.parts[self.index], self.vocabulary.bytes_of[token]
        if part is Free.TEXT:
            _, quote, rest = encoded.partition(b'"')
            if not quote:
                return
            encoded = quote + rest
        elif isinstance(part, Free) and part.value.fullmatch(self.text + encoded):
            self.text += encoded
            return
        if isinstance(part, Free):
            self.index, self.text = self.index + 1, b""
        self.text += encoded
        part = self.parts[self.index]
        if self.text in part and not any(text != self.text and text.startswith(self.text) for text in part):
            self.index, self.text = self.index + 1, b""
