"""pydantic's errors in one plain line."""

from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mmllm.config.validation import describe, did_you_mean


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    size: Annotated[int, Field(ge=1, lt=10)] = 1
    rate: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    kind: Literal["patch", "pooled"] = "patch"
    parts: Annotated[tuple[Literal["a", "b"], ...], Field(strict=False)] = ("a",)
    name: Annotated[str, Field(max_length=3)] = ""
    flag: bool = False
    even: int = 0

    @field_validator("even")
    @classmethod
    def is_even(cls, value: int) -> int:
        if value % 2:
            raise ValueError(f"{value} is odd; take an even number")
        return value


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    inner: Inner = Inner()
    needed: int


@pytest.mark.parametrize(
    "inner, line",
    [
        ({"size": "4"}, "inner.size is '4'; it must be a whole number"),
        ({"size": 0}, "inner.size is 0; it must be at least 1"),
        ({"size": 10}, "inner.size is 10; it must be below 10"),
        ({"rate": 0.0}, "inner.rate is 0.0; it must be above 0"),
        ({"rate": True}, "inner.rate is True; it must be a number"),
        ({"rate": float("nan")}, "inner.rate is nan; it must be a finite number"),
        ({"kind": "patches"}, "inner.kind is 'patches'; it must be 'patch' or 'pooled'"),
        ({"parts": "a"}, "inner.parts is 'a'; it must be a list of texts"),
        ({"parts": ["a", "c"]}, "inner.parts has 'c'; it must be 'a' or 'b'"),
        ({"name": 3}, "inner.name is 3; it must be text"),
        ({"name": "long"}, "inner.name is 'long'; it must be at most 3 characters long"),
        ({"flag": 1}, "inner.flag is 1; it must be true or false"),
        ({"even": 3}, "3 is odd; take an even number"),
        ({"sise": 4}, "unknown setting 'sise' (did you mean inner.size?)"),
        ({"xyz": 4}, "unknown setting 'xyz'"),
        (4, "inner is 4; it must be a group of settings, written {...}"),
        ({"size": "x" * 100}, f"inner.size is '{'x' * 56}...; it must be a whole number"),
    ],
)
def test_each_fault_is_one_line_with_the_field_its_value_and_what_it_must_be(inner, line):
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"inner": inner, "needed": 1})
    assert describe(caught.value, ["inner.size", "inner.rate"]) == line


def test_a_missing_field_and_the_words_of_the_caller():
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({})
    assert describe(caught.value, prefix="MMLLM_") == "MMLLM_needed is missing"
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"neded": 1, "needed": 1})
    assert describe(caught.value, ["needed"], noun="field") == "unknown field 'neded' (did you mean needed?)"


@pytest.mark.parametrize(
    "name, hint",
    [
        ("learning_rte", " (did you mean training.learning_rate?)"),
        ("training.batch_size", " (did you mean data.batch_size?)"),
        ("stage1.epoch", " (did you mean training.stage1.epochs?)"),
        ("lr", " (did you mean training.learning_rate?)"),
        ("per_device_train_batch_size", " (did you mean data.batch_size?)"),
        ("colour", ""),
    ],
)
def test_the_nearest_name_is_found_by_its_last_part(name, hint):
    known = ["data.batch_size", "training.learning_rate", "training.stage1.learning_rate"]
    assert did_you_mean(name, [*known, "training.stage1.epochs", "training.stage2.epochs"]) == hint
