"""POST /v1/chat/completions and GET /v1/models: what OpenAI's clients and the interfaces made for them ask.

A request is a whole conversation, so nothing is stored between two. Images come as data URIs in `image_url` parts and
stand in front of the text of their message, where the model was trained to see them. `temperature` is 0 unless given,
so that the answer is that of the other endpoints. `max_tokens` is an upper bound: the server's own limit and the room
that the prompt leaves also end an answer, and `finish_reason` says "length".

Format: https://platform.openai.com/docs/api-reference/chat
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    JsonValue,
    ValidationInfo,
    field_validator,
    model_validator,
)
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mmllm.data.chat import Message, assistant, user
from mmllm.errors import UserError
from mmllm.inference.answer_form import AnswerForm, Vocabulary, form_of
from mmllm.inference.request import Generated
from mmllm.serving import http, inputs
from mmllm.serving.http import HttpError
from mmllm.serving.inputs import Text, fault
from mmllm.serving.service import Put, Service

MAX_CHOICES, MAX_MESSAGES, MAX_IMAGES = 8, 256, 16
MAX_TEXT = 8  # characters of all messages, in longest messages


def unsupported(*harmless: JsonValue) -> object:
    """The type of a parameter that may only have a value which changes no answer."""

    def check(value: JsonValue, info: ValidationInfo) -> None:
        if value is not None and value not in harmless:
            raise fault("unsupported_parameter", f"{info.field_name} is not supported here; leave it out")

    return Annotated[JsonValue, AfterValidator(check), Field(json_schema_extra={"enum": [None, *harmless]})]


Ignored = Annotated[JsonValue, Field(description="accepted, changes nothing")]


class Parameters(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ImageUrl(Parameters):
    url: Text = Field(description="a data URI; addresses are refused, never fetched")
    detail: Ignored = None


class Part(Parameters):
    type: Literal["text", "image_url"]
    text: Text | None = None
    image_url: ImageUrl | None = None

    @model_validator(mode="after")
    def check(self) -> "Part":
        if getattr(self, self.type) is None:
            raise fault("missing_field", f"a part of type {self.type} has no {self.type}")
        return self


def as_parts(content: object) -> object:
    return [] if content is None else [{"type": "text", "text": content}] if isinstance(content, str) else content


class ChatMessage(Parameters):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[Part], FailFast(), BeforeValidator(as_parts, json_schema_input_type=str | list[Part] | None)
    ] = []
    name: Ignored = None
    refusal: Ignored = None
    annotations: Ignored = None
    tool_calls: unsupported([]) = None

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.content if part.text is not None)

    @property
    def images(self) -> list[str]:
        return [part.image_url.url for part in self.content if part.image_url is not None]


class StreamOptions(Parameters):
    include_usage: bool = False


class JsonSchema(Parameters):
    name: Text
    given: dict[str, JsonValue] = Field(alias="schema", description="an enum, or an object of text, numbers and enums")
    description: Ignored = None
    strict: Ignored = None


class ResponseFormat(Parameters):
    type: Literal["text", "json_schema"] = "text"
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def check(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise fault("invalid_value", "response_format needs a json_schema with type json_schema, and only with it")
        return self


class ChatCompletionFields(inputs.SamplingFields):
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    model: Text | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    stream_options: StreamOptions = StreamOptions()
    response_format: ResponseFormat = ResponseFormat()
    metadata: Ignored = None
    parallel_tool_calls: Ignored = None
    prompt_cache_key: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    store: Ignored = None
    user: Ignored = None
    audio: unsupported() = None
    frequency_penalty: unsupported(0) = None
    logit_bias: unsupported({}) = None
    modalities: unsupported(["text"]) = None
    presence_penalty: unsupported(0) = None
    tool_choice: unsupported("none", "auto") = None
    tools: unsupported([]) = None

    @field_validator("top_logprobs")
    @classmethod
    def check_logprobs(cls, value: int, info: ValidationInfo) -> int:
        if value and not info.data.get("logprobs"):
            raise fault("invalid_value", f"top_logprobs is {value}, but logprobs is not true; set it")
        return value

    def conversation(self, max_chars: int) -> tuple[list[Message], list[tuple[str, str]]]:
        """The messages for the chat template, and each image with the name of its message, in order."""
        messages, images = [], []
        for i, given in enumerate(self.messages):
            text, place = given.text, f"messages[{i}].content"
            if len(text) > max_chars:
                raise refuse("message_too_long", f"{place} has {len(text)} characters; the limit is {max_chars}", place)
            if given.images and given.role != "user":
                raise refuse("invalid_value", f"{place} has an image; only messages of the user may have one", place)
            if given.role == "user":
                if not text.strip() and not given.images:
                    raise refuse("empty_message", f"{place} is empty; write something in it", place)
                messages.append(user(text, images=len(given.images)))
                images += [(url, place) for url in given.images]
            else:
                messages.append(assistant(text) if given.role == "assistant" else Message("system", (text,)))
        if not any(message.role == "user" for message in messages):
            raise refuse("invalid_value", "messages has none of the user; ask something", "messages")
        if len(images) > MAX_IMAGES:
            raise refuse("too_many_images", f"messages has {len(images)} images; the limit is {MAX_IMAGES}", "messages")
        length = sum(len(message.text) for message in messages)
        if length > MAX_TEXT * max_chars:
            sentence = f"messages has {length} characters; the limit is {MAX_TEXT * max_chars}, leave old ones out"
            raise refuse("context_length_exceeded", sentence, "messages")
        return messages, images


def refuse(code: str, sentence: str, param: str) -> HttpError:
    return HttpError(400, code, sentence, param=param)


class ChatCompletions:
    """The endpoints of OpenAI's API."""

    def __init__(self, service: Service):
        self.service, self.settings, self.created = service, service.settings, int(time.time())

    async def models(self, request: Request) -> Response:
        http.check_key(request, self.settings.api_key)
        model = {"id": self.settings.model_name, "object": "model", "created": self.created, "owned_by": "mmllm"}
        return JSONResponse({"object": "list", "data": [model]})

    async def create(self, request: Request) -> Response:
        fields = await self.service.read(request, ChatCompletionFields)
        name = self.settings.model_name
        if fields.model not in (None, name):
            message = f"there is no model {fields.model[:100]!r}; this server has {name!r}"
            raise HttpError(404, "model_not_found", message, param="model")
        messages, sources = fields.conversation(self.settings.max_message_chars)
        reply = Reply(request, name, fields, self.service.worker.pipeline.processor.tokenizer.token_bytes)

        async def work(put: Put | None) -> dict | None:
            images = [await self.service.crop(url, place) for url, place in sources]
            prompt = await self.service.prompt(messages, images, 1)
            limit = min(self.settings.max_new_tokens, self.service.context - len(prompt.ids))
            wanted = fields.max_completion_tokens or fields.max_tokens or limit
            form = await self.service.in_text_thread(lambda: self.form(fields.response_format.json_schema))
            config = replace(fields.config, max_new_tokens=min(wanted, limit), form=form)

            async def answer(index: int) -> Generated:
                own = replace(config, seed=(config.seed + index) % 2**63)
                on_text = put and (lambda text: put(reply.piece(index, text)))
                answer = await self.service.generate(request, prompt, own, on_text)
                if put:
                    put(reply.piece(index, answer=answer))
                return answer

            tasks = [asyncio.create_task(answer(index)) for index in range(fields.n)]
            try:
                answers = await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
            if not put:
                return reply.whole(answers)
            usage = reply.usage(answers)
            return reply.chunk([], usage) if fields.stream_options.include_usage else None

        return await self.service.respond(request, work, is_stream=fields.stream, num_answers=fields.n)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.service.worker.pipeline.processor.tokenizer)

    def form(self, wanted: JsonSchema | None) -> AnswerForm | None:
        try:
            return wanted and form_of(wanted.given, self.vocabulary)
        except UserError as error:
            raise refuse("unsupported_schema", f"response_format: {error}", "response_format") from error


class Reply:
    """The bodies and events that answer one request."""

    def __init__(self, request: Request, model: str, fields: ChatCompletionFields, bytes_of: Callable[[int], bytes]):
        self.request, self.fields, self.bytes_of = request, fields, bytes_of
        self.head = {"id": f"chatcmpl-{request.scope['request_id']}", "created": int(time.time()), "model": model}
        self.begun: set[int] = set()  # choices of which a piece was sent

    def whole(self, answers: list[Generated]) -> dict:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": self.logprobs(answer),
                "finish_reason": answer.finish_reason,
            }
            for index, answer in enumerate(answers)
        ]
        return self.head | {"object": "chat.completion", "choices": choices, "usage": self.usage(answers)}

    def chunk(self, choices: list[dict], usage: dict | None) -> dict:
        usage = {"usage": usage} if self.fields.stream_options.include_usage else {}
        return self.head | {"object": "chat.completion.chunk", "choices": choices} | usage

    def piece(self, index: int, text: str | None = None, answer: Generated | None = None) -> dict:
        """An event of choice `index`, of which the first names the role; the last, with the whole `answer`, brings the
        logprobs of all tokens."""
        delta = {"role": "assistant"} if index not in self.begun else {}
        delta |= {} if text is None else {"content": text}
        self.begun.add(index)
        end = {"logprobs": answer and self.logprobs(answer), "finish_reason": answer and answer.finish_reason}
        return self.chunk([{"index": index, "delta": delta} | end], None)

    def usage(self, answers: list[Generated]) -> dict:
        prompt, completion = answers[0].prompt_tokens, sum(len(answer.ids) for answer in answers)
        usage = {"prompt_tokens": prompt, "completion_tokens": completion}
        self.request.scope["log"] |= usage
        return usage | {"total_tokens": prompt + completion}

    def logprobs(self, answer: Generated) -> dict | None:
        if not self.fields.logprobs:
            return None
        best = answer.top_logprobs or [()] * len(answer.ids)
        each = zip(answer.ids, answer.logprobs, best, strict=False)  # ids have no end token
        content = [self.token(i, p) | {"top_logprobs": [self.token(*pair) for pair in top]} for i, p, top in each]
        return {"content": content, "refusal": None}

    def token(self, number: int, logprob: float) -> dict:
        encoded = self.bytes_of(number)
        return {"token": encoded.decode(errors="replace"), "logprob": max(logprob, -9999.0), "bytes": list(encoded)}
