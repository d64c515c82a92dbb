"""Answers of a given form: whatever the model prefers, the answer is JSON of the schema; jsonschema is the judge."""

import json
import random
import tracemalloc

import pytest
from jsonschema_rs import validator_for

from mmllm.data.chat import user
from mmllm.errors import UserError
from mmllm.inference.answer_form import FormState, Vocabulary, form_of
from mmllm.inference.engine import Engine
from mmllm.inference.pipeline import load_pipeline
from mmllm.inference.request import GenerationConfig, Handle
from official import write_model

ENUM = {"enum": ["red", "red light", "grün", '😀 "a\\b"', 1, 12, 1.5, True, None]}
OBJECT = {
    "type": "object",
    "title": "Car",
    "properties": {
        "color": {"enum": ["red", "red light", "blue"], "description": "of the car"},
        "kind": {"const": "car"},
        "parked": {"type": "boolean"},
        "name": {"type": "string"},
        "doors": {"type": "integer"},
        "size in m": {"type": "number"},
        "note": {"type": "string"},
    },
    "required": ["color", "kind", "parked", "name", "doors", "size in m", "note"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return load_pipeline(write_model(tmp_path_factory.mktemp("model")), device="cpu")


@pytest.fixture(scope="module")
def vocabulary(pipeline):
    return Vocabulary(pipeline.processor.tokenizer)


def random_answer(form, rng: random.Random) -> bytes:
    """An answer of tokens drawn from those that are allowed; free text is ended now and then."""
    state, vocabulary, encoded = FormState(form), form.vocabulary, b""
    while True:
        tokens = state.allowed().tolist()
        ending = [token for token in tokens if vocabulary.bytes_of.get(token, b'"').startswith(b'"')]
        token = rng.choice(ending if ending and rng.random() < 0.3 else tokens)
        state.accept(token)
        if token in vocabulary.stop_ids:
            return encoded
        encoded += vocabulary.bytes_of[token]


@pytest.mark.parametrize("schema", [ENUM, OBJECT], ids=["enum", "object"])
def test_whatever_tokens_are_chosen_the_answer_is_json_of_the_schema(vocabulary, schema):
    judge, rng = validator_for(schema), random.Random(0)
    answers = [json.loads(random_answer(form_of(schema, vocabulary), rng)) for _ in range(100)]
    for answer in answers:
        judge.validate(answer)
    if schema is ENUM:
        assert {json.dumps(answer) for answer in answers} == {json.dumps(value) for value in ENUM["enum"]}
    else:
        assert {answer["color"] for answer in answers} == {"red", "red light", "blue"}
        assert len({answer["doors"] for answer in answers}) > 20 and len({answer["name"] for answer in answers}) > 20


@pytest.mark.parametrize("temperature", [0, 1])
def test_the_engine_writes_answers_of_their_forms_beside_free_ones(pipeline, vocabulary, temperature):
    engine = Engine(pipeline.model, 3)
    prompt = pipeline.prompt([user("What is it?")], [])
    schemas = (ENUM, {"type": "object", "properties": {"red": {"type": "boolean"}, "size": {"enum": ["S", "M", "L"]}}})
    configs = [GenerationConfig(temperature=temperature, form=form_of(schema, vocabulary)) for schema in schemas]
    free = GenerationConfig(temperature=temperature, max_new_tokens=30)
    handles = [engine.submit(Handle(prompt, config)) for config in (free, *configs)]
    engine.run(handles)
    assert handles[0].result() == pipeline.generate(prompt, free)
    for handle, schema in zip(handles[1:], schemas, strict=True):
        validator_for(schema).validate(json.loads(handle.result().text))
        assert handle.result().finish_reason == "stop"


def test_only_the_likeliest_of_what_is_allowed_is_chosen(pipeline, vocabulary):
    """Each value alone has a probability; greedy decoding between two that differ at once takes the larger one."""
    prompt = pipeline.prompt([user("What is it?")], [])
    first = {}
    for value in (True, False):
        config = GenerationConfig(logprobs=True, form=form_of({"const": value}, vocabulary))
        first[value] = pipeline.generate(prompt, config).logprobs[0]
    both = pipeline.generate(prompt, GenerationConfig(form=form_of({"type": "boolean"}, vocabulary)))
    assert json.loads(both.text) == max(first, key=first.get)


def fields(**schema) -> dict:
    return {"type": "object", "properties": {"a": schema}}


@pytest.mark.parametrize(
    "schema, message",
    [
        ({}, "the schema has type 'None'; it can be boolean"),
        ({"type": "string"}, "the schema has type 'string'; it can be an object with properties, or an enum"),
        ({"type": "array"}, "the schema has type 'array'"),
        ({"type": "object"}, "the schema has no properties"),
        ({"enum": []}, "enum that is not a list"),
        ({"enum": [["a"]]}, "enum that is not a list"),
        ({"enum": ["\ud800"]}, "not Unicode"),
        ({"enum": [float("inf")]}, "too large"),  # 1e999 in JSON; Infinity is no JSON
        ({"enum": ["x" * 15_000, "y" * 15_000]}, "too large"),
        ({"properties": {"a": {"enum": [*range(100)]}, "x" * 15_000: {"enum": [1]}}}, "too large"),
        (fields(type="object", properties={}), "the field 'a' has 'properties', which is not supported"),
        (fields(type=["string", "null"]), "the field 'a' has type"),
        (fields(type="string", maxLength=5), "the field 'a' has 'maxLength', which is not supported"),
        (fields(anyOf=[]), "the field 'a' has 'anyOf'"),
        (fields(type="object", properties={}) | {"minProperties": 1}, "'minProperties'"),
        ({"type": "object", "properties": {"a": 5}}, "the field 'a' has no schema"),
    ],
)
def test_a_schema_beyond_what_is_supported_is_refused_by_name(vocabulary, schema, message):
    with pytest.raises(UserError, match=message):
        form_of(schema, vocabulary)


def test_a_schema_that_would_fill_the_memory_is_refused_before_it_does(vocabulary):
    schema = {"type": "object", "properties": {"a": {"enum": [*range(2000)]}, "x" * 100_000: {"type": "boolean"}}}
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="too large"):
            form_of(schema, vocabulary)
        assert tracemalloc.get_traced_memory()[1] < 10e6  # 2,000 values with that name: 200 MB
    finally:
        tracemalloc.stop()


def test_beam_search_takes_no_form(vocabulary):
    with pytest.raises(UserError, match="num_beams"):
        GenerationConfig(num_beams=2, form=form_of(ENUM, vocabulary))
