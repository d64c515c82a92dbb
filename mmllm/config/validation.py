"""What pydantic refuses, as one plain line: the field, its value, and what it must be.

The configuration, the server's settings and its requests all read like this:

    data.batch_size is 0; it must be at least 1
    unknown setting 'bach_size' (did you mean batch_size?)
"""

import difflib
from collections.abc import Iterable

from pydantic_core import ValidationError

WANTED = {  # by pydantic's type of error, https://docs.pydantic.dev/latest/errors/validation_errors/
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "tuple_type": "a list of texts",
    "list_type": "a list of texts",
    "model_type": "a group of settings, written {{...}}",
    "dict_type": "a group of settings, written {{...}}",
    "dataclass_type": "a group of settings, written {{...}}",
    "literal_error": "{expected}",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "string_too_short": "at least {min_length} characters long",
    "string_too_long": "at most {max_length} characters long",
    "string_unicode": "whole Unicode characters",
    "string_pattern_mismatch": "of the form {pattern}",
    "bytes_type": "a file",
    "too_short": "at least {min_length} long",
    "too_long": "at most {max_length} long",
}
OTHER_NAMES = {  # of other trainers
    "lr": "learning_rate",
    "wd": "weight_decay",
    "grad_accum": "gradient_accumulation_steps",
    "per_device_train_batch_size": "batch_size",
    "max_seq_length": "max_length",
    "fp16": "bf16",
}
UNKNOWN = ("extra_forbidden", "no_such_attribute")


def describe(error: ValidationError, known: Iterable[str] = (), *, prefix: str = "", noun: str = "setting") -> str:
    """One line for the first fault in `error`; an unknown name is offered the nearest of `known`.

    `prefix` stands before the name of the field. A validator's own ValueError is a sentence that is kept as it is.
    """
    fault = error.errors(include_url=False)[0]
    last = next((part for part in reversed(fault["loc"]) if isinstance(part, str)), "")
    field, value = prefix + path_of(fault["loc"]), shown(fault["input"])
    context = fault.get("ctx", {})
    if fault["type"] in UNKNOWN:
        return f"unknown {noun} {shown(last)}{did_you_mean(last, known)}"
    if fault["type"] == "missing":
        return f"{field} is missing"
    if fault["type"] == "value_error":
        return str(context["error"])
    wanted = WANTED[fault["type"]].format(**context) if fault["type"] in WANTED else fault["msg"]
    verb = "has" if fault["loc"] and isinstance(fault["loc"][-1], int) else "is"
    return f"{field} {verb} {value}; it must be {wanted}"


def path_of(location: tuple[str | int, ...]) -> str:
    """The field at a location of pydantic's, such as messages[3].role; a wrong entry of a list is named by its list."""
    parts = location[:-1] if location and isinstance(location[-1], int) else location
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint at the nearest of the dotted names `known`, or nothing: by the last part; the shortest name first."""
    name = name[-100:]  # a client's may have megabytes, which take seconds to compare
    ends: dict[str, list[str]] = {}
    for full in known:
        ends.setdefault(full.rpartition(".")[2], []).append(full)
    last = name.rpartition(".")[2]
    found = difflib.get_close_matches(OTHER_NAMES.get(last, last), ends, n=1, cutoff=0.7)
    if not found:
        return ""
    closeness = {full: difflib.SequenceMatcher(None, name, full).ratio() for full in ends[found[0]]}
    nearest = min(closeness, key=lambda full: (full.count("."), -closeness[full]))
    return f" (did you mean {nearest}?)"


def shown(value: object) -> str:
    """A value in an error message, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
