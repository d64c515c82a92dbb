"""OpenAI's API: through the official client over a real socket, and the requests of Open WebUI replayed."""

import base64
import json
import math
from typing import Literal

import openai
import pytest
from PIL import Image
from pydantic import BaseModel

from mmllm.data.chat import Message, assistant, user
from mmllm.inference.request import GenerationConfig
from server_process import BASE64, IMAGE, encode, serving

MODEL = "tiny/best_model"
URI = f"data:image/png;base64,{BASE64}"
LONG = {"max_tokens": 60, "temperature": 1, "seed": 3}
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def server(pipeline):
    with serving(pipeline, api_key="s3cret", max_new_tokens=64) as server:
        yield server


def client_of(server, key: str = "s3cret") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def client(server):
    with client_of(server) as client:
        yield client


def ask(client, messages=HELLO, **options):
    return client.chat.completions.create(**{"model": MODEL, "messages": messages, "max_tokens": 12} | options)


def image_part(uri: str = URI) -> dict:
    return {"type": "image_url", "image_url": {"url": uri, "detail": "low"}}


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def expected(pipeline, messages: list[Message], images=(), **options):
    return pipeline.generate(pipeline.prompt(messages, list(images)), GenerationConfig(max_new_tokens=12, **options))


def refusal(client, messages=HELLO, **options) -> tuple[int, str, str | None]:
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, messages, **options)
    return caught.value.status_code, caught.value.code, caught.value.param


# --- answers ---


def test_an_answer_is_that_of_the_pipeline(client, pipeline):
    answer = ask(client)
    wanted = expected(pipeline, [user("Hello")])
    assert answer.choices[0].message.content == wanted.text and answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == wanted.finish_reason and answer.choices[0].logprobs is None
    assert answer.object == "chat.completion" and answer.model == MODEL and answer.id.startswith("chatcmpl-")
    used = (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens)
    assert used == (wanted.prompt_tokens, len(wanted.ids), wanted.prompt_tokens + len(wanted.ids))


def test_a_whole_conversation_with_several_images_is_the_chat_template_of_it(client, pipeline):
    white = encode(image=Image.new("RGB", (9, 9), "white"))
    other = "data:image/png;base64," + base64.b64encode(white).decode()
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [text_part("What"), image_part(), text_part("is it?"), image_part(other)]},
        {"role": "assistant", "content": "A gradient.", "refusal": None},
        {"role": "user", "content": [text_part("And this?"), image_part()], "name": "someone"},
    ]
    turns = [Message("system", ("Be brief.",)), user("What\nis it?", images=2), assistant("A gradient.")]
    wanted = expected(pipeline, [*turns, user("And this?", images=1)], [IMAGE, white, IMAGE])
    assert ask(client, messages).choices[0].message.content == wanted.text
    developer = [{"role": "developer", "content": "Be brief."}, *messages[1:]]
    assert ask(client, developer).choices[0].message.content == wanted.text


def test_a_stream_has_the_same_text_and_its_usage_at_the_end(client):
    whole = ask(client, temperature=1, seed=3)
    first, *middle, last, usage = ask(
        client, temperature=1, seed=3, stream=True, stream_options={"include_usage": True}
    )
    pieces = [first, *middle, last]
    assert [chunk.choices[0].delta.role for chunk in pieces] == ["assistant", *[None] * (len(pieces) - 1)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == whole.choices[0].message.content
    assert {chunk.choices[0].finish_reason for chunk in [first, *middle]} == {None}
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason and last.usage is None
    assert usage.choices == [] and usage.usage == whole.usage
    assert len({chunk.id for chunk in [*pieces, usage]}) == 1
    assert all(chunk.usage is None and chunk.choices for chunk in ask(client, stream=True))


def test_the_helper_of_the_client_assembles_a_stream(client):
    options = LONG | {"stop": ask(client, **LONG).choices[0].message.content[10:12]}  # it wants an answer that is whole
    with client.chat.completions.stream(model=MODEL, messages=HELLO, logprobs=True, **options) as stream:
        whole = stream.get_final_completion()
    direct = ask(client, logprobs=True, **options)
    assert whole.choices[0].message.content == direct.choices[0].message.content
    assert whole.choices[0].logprobs.content == direct.choices[0].logprobs.content


def test_choices_are_drawn_with_seeds_that_follow_each_other(client):
    answer = ask(client, n=3, temperature=1, seed=5)
    alone = [ask(client, temperature=1, seed=seed) for seed in (5, 6, 7)]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.message.content for choice in answer.choices] == [one.choices[0].message.content for one in alone]
    assert answer.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)
    texts = ["", "", ""]
    for chunk in ask(client, n=3, temperature=1, seed=5, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in answer.choices]


def test_logprobs_are_those_of_the_tokens_and_of_the_likeliest_ones(client, pipeline):
    answer = ask(client, temperature=1, seed=3, logprobs=True, top_logprobs=4)
    wanted = expected(pipeline, [user("Hello")], temperature=1, seed=3, logprobs=True)
    content = answer.choices[0].logprobs.content
    assert len(content) == len(wanted.ids)
    assert [entry.logprob for entry in content] == pytest.approx(list(wanted.logprobs[: len(content)]), abs=1e-5)
    encoded = b"".join(bytes(entry.bytes) for entry in content)
    assert encoded.decode(errors="ignore") == wanted.text.replace("\ufffd", "")
    for entry in content:
        best = [top.logprob for top in entry.top_logprobs]
        assert len(best) == 4 and best == sorted(best, reverse=True) and sum(map(math.exp, best)) < 1 + 1e-5
    greedy = ask(client, logprobs=True, top_logprobs=1).choices[0].logprobs.content
    assert all(entry.token == entry.top_logprobs[0].token for entry in greedy)


class Car(BaseModel):
    color: Literal["red", "green"]
    parked: bool
    doors: int


def test_an_answer_of_a_given_form_is_parsed_by_the_client(client):
    for stream in (False, True):
        for seed in range(3):
            options = {"model": MODEL, "messages": HELLO, "temperature": 1, "seed": seed, "response_format": Car}
            if stream:
                with client.chat.completions.stream(**options) as events:
                    answer = events.get_final_completion()
            else:
                answer = client.chat.completions.parse(**options)
            assert isinstance(answer.choices[0].message.parsed, Car)
    closed = {"type": "json_schema", "json_schema": {"name": "color", "schema": {"enum": ["red", "green"]}}}
    assert json.loads(ask(client, response_format=closed).choices[0].message.content) in ("red", "green")


def test_max_tokens_is_an_upper_bound(client):
    for options in ({"max_tokens": 3}, {"max_tokens": 30, "max_completion_tokens": 3}):
        assert ask(client, **options).usage.completion_tokens == 3
    answer = ask(client, max_tokens=100_000)
    assert answer.usage.completion_tokens == 64 and answer.choices[0].finish_reason == "length"
    full = ask(client, [{"role": "user", "content": "word " * 380}], max_tokens=None)
    assert full.usage.total_tokens == 2048 or full.usage.completion_tokens == 64


def test_the_models_are_listed(client):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "mmllm")


# --- Open WebUI ---


def test_the_requests_of_open_webui_are_answered(server):
    """As its routers `openai.py` and `tasks.py` send them: models, a streamed chat, the task that names the chat."""
    headers = {"Authorization": "Bearer s3cret", "Content-Type": "application/json"}
    assert server.call("GET", "/v1/models", **headers)[1]["data"][0]["id"] == MODEL
    chat = {
        "stream": True,
        "model": MODEL,
        "messages": [{"role": "user", "content": [text_part("What is it?"), image_part()]}],
        "stream_options": {"include_usage": True},
        "max_tokens": 5,
    }
    title = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "### Task:\nGenerate a concise, 3-5 word title with an emoji."}],
        "stream": False,
        "max_completion_tokens": 1000,
    }
    status, body = server.call("POST", "/v1/chat/completions", json.dumps(title).encode(), **headers)
    assert status == 200 and isinstance(body["choices"][0]["message"]["content"], str)
    _, text = server.read("POST", "/v1/chat/completions", json.dumps(chat).encode(), **headers)
    *lines, done = [line.removeprefix("data: ") for line in text.strip().split("\n\n")]
    assert done == "[DONE]" and json.loads(lines[-1])["usage"]["completion_tokens"] == 5


# --- refusals ---


def test_the_key_guards_it(server):
    with client_of(server, "wrong") as stranger:
        with pytest.raises(openai.AuthenticationError):
            ask(stranger)
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()


@pytest.mark.parametrize(
    "options, code, param",
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "unsupported_parameter", "tools"),
        ({"audio": {"voice": "alloy", "format": "wav"}}, "unsupported_parameter", "audio"),
        ({"modalities": ["text", "audio"]}, "unsupported_parameter", "modalities"),
        ({"frequency_penalty": 0.5}, "unsupported_parameter", "frequency_penalty"),
        ({"logit_bias": {"5": 100}}, "unsupported_parameter", "logit_bias"),
        ({"extra_body": {"max_token": 5}}, "unknown_field", "max_token"),
        ({"n": 9}, "invalid_value", "n"),
        ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"response_format": {"type": "json_object"}}, "invalid_value", "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "invalid_value", "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array"}}}},
            "unsupported_schema",
            "response_format",
        ),
        ({"stop": ["a"] * 5}, "invalid_value", "stop"),
        ({"stream_options": {"include_usage": 1}}, "invalid_value", "stream_options.include_usage"),
    ],
)
def test_a_parameter_that_cannot_be_obeyed_is_refused_by_name(client, options, code, param):
    assert refusal(client, **options) == (400, code, param)


def test_parameters_that_change_nothing_are_accepted(client):
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": False, "tools": [], "frequency_penalty": 0}
    harmless |= {"presence_penalty": 0.0, "logit_bias": {}, "modalities": ["text"], "response_format": {"type": "text"}}
    assert ask(client, **harmless).choices == ask(client).choices


def test_an_unknown_model_is_not_found(client):
    assert refusal(client, model="gpt-4o") == (404, "model_not_found", "model")


def one(content, role: str = "user") -> list[dict]:
    return [{"role": role, "content": content}]


@pytest.mark.parametrize(
    "messages, code, param",
    [
        ([], "invalid_value", "messages"),
        (HELLO * 257, "invalid_value", "messages"),
        (one("x", "tool"), "invalid_value", "messages[0].role"),
        (one("x", "system"), "invalid_value", "messages"),
        ([*HELLO, *one([image_part()], "system")], "invalid_value", "messages[1].content"),
        (one(" \n"), "empty_message", "messages[0].content"),
        (one(None), "empty_message", "messages[0].content"),
        (one(5), "invalid_value", "messages[0].content"),
        (one("a" * 8001), "message_too_long", "messages[0].content"),
        (one("word " * 1200), "context_length_exceeded", None),
        (one("a" * 8000) * 9, "context_length_exceeded", "messages"),
        (one([{"type": "input_audio", "input_audio": {}}]), "invalid_value", "messages[0].content[0].type"),
        (one([{"type": "text"}]), "missing_field", "messages[0].content"),
        (one([{"type": "image_url", "image_url": URI}]), "invalid_value", "messages[0].content[0].image_url"),
        (one([image_part("http://169.254.169.254/x.png")]), "image_url_not_supported", "messages[0].content"),
        (one([image_part("data:image/png;base64,????")]), "invalid_base64", "messages[0].content"),
        (one([image_part()] * 17), "too_many_images", "messages"),
        ([{"role": "user", "content": "x", "tool_calls": [{}]}], "unsupported_parameter", "messages[0].tool_calls"),
        ([{"role": "user", "content": "x", "text": "y"}], "unknown_field", "messages[0].text"),
        ([{"role": "user", "content": "x", "y" * 999: "z"}], "unknown_field", "messages[0]." + "y" * 88),
    ],
)
def test_a_wrong_message_is_named(client, messages, code, param):
    assert refusal(client, messages) == (400, code, param)


def test_a_failure_after_the_first_piece_reaches_the_client_as_its_error(pipeline):
    norm = pipeline.model.language_model.model.norm.weight
    healthy = norm.data.clone()
    try:
        with (
            serving(pipeline, max_new_tokens=1900) as server,
            client_of(server) as client,
            pytest.raises(openai.APIError, match="not finite"),
        ):
            for _ in ask(client, stream=True, max_tokens=None, temperature=1):
                norm.data.fill_(math.nan)
    finally:
        norm.data.copy_(healthy)
