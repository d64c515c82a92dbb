"""The model on the network: POST /caption, /question and /chat, GET /health.

The surprising fact: Starlette does not stop a handler whose client has left. So every answer is a race between the model
and the client's farewell, and a request that lost is taken out of the queue or ends within one decoding step.

The event loop only waits: pictures are decoded in a small pool of threads, the model lives in a thread of its own
(worker.py). Everything a request may take is bounded before it is spent (`Settings`), and requests beyond the queue are
refused before their body is read. HTTP status is decided here and in http.py, never below them. No request makes the
server fetch an address or open a path. With `stream` an answer is sent while it is being made (sse.py).
"""

import asyncio
import math
import os
import re
import secrets
import signal
import time
from asyncio import FIRST_COMPLETED
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from socket import socket
from types import FrameType
from uuid import uuid4

import torch
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mmllm import __version__
from mmllm.data.image import decode, decode_base64
from mmllm.errors import GenerationError, ImageError, RunError, UserError
from mmllm.inference.pipeline import DEFAULT_PROMPT, MultimodalInferencePipeline
from mmllm.inference.request import Generated, GenerationConfig, Prompt
from mmllm.serving.conversations import Conversation, Conversations
from mmllm.serving.events import EventStream, Pieces
from mmllm.serving.http import (
    EXCEPTION_HANDLERS,
    DeadlineH11,
    Envelope,
    Fields,
    HttpError,
    check_key,
    parse_form,
    parse_json,
    read_body,
    unless_gone,
)
from mmllm.serving.settings import Settings
from mmllm.serving.worker import Worker

GENERATION_FIELDS = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop")
IMAGE_STATUS = {"unsupported_image": 415, "image_too_large": 413}  # the other faults of a picture are 400
CONVERSATION_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
ADDRESS = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*://")


Tell = Callable[[str], None]  # hears the text of an answer piece by piece


class Service:
    """The endpoints, and what they share."""

    def __init__(self, load: Callable[[], MultimodalInferencePipeline], settings: Settings):
        self.settings = settings
        self.worker = Worker(load, settings.slots, settings.max_context)
        self.conversations = Conversations(settings.conversations, settings.conversation_ttl_s)
        self.threads = ThreadPoolExecutor(2, "pictures")
        self.admitted = 0
        self.mean_service_s = 1.0  # from a slot to the answer
        self.started_at = time.monotonic()

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Loading goes on after the server has begun to listen: /health tells when it is done."""
        self.worker.start()
        yield
        self.worker.stop()
        if not self.worker.is_loading:  # a load cannot be interrupted
            await asyncio.to_thread(self.worker.thread.shutdown)
        self.threads.shutdown(wait=False, cancel_futures=True)

    async def caption(self, request: Request) -> Response:
        return await self.about_picture(request, asks="prompt", default=DEFAULT_PROMPT, answers="caption")

    async def question(self, request: Request) -> Response:
        return await self.about_picture(request, asks="question", default=None, answers="answer")

    async def about_picture(self, request: Request, *, asks: str, default: str | None, answers: str) -> Response:
        """One question about one picture, sent as a form."""
        with ExitStack() as admitted:
            admitted.enter_context(self.admit(request))
            form = await parse_form(request, await self.read(request))
            given = Fields(form, ("image", asks, "stream", *GENERATION_FIELDS), is_form=True)
            config = self.generation_config(given)
            text = given.text(asks, default=default, limit=self.settings.max_message_chars)
            data = given.file("image")

            async def work(tell: Tell | None) -> dict:
                conversation = Conversation().with_image(await self.square(data, "image"))
                _, prompt = await self.fit(conversation, text, config)
                answer = await self.generate(request, prompt, config, tell)
                return {answers: answer.text} | self.facts(request, answer, config)

            return await self.respond(request, work, admitted, is_streamed=given.flag("stream"))

    async def chat(self, request: Request) -> Response:
        """The next turn of a conversation, sent as JSON. It is remembered only when it was answered."""
        with ExitStack() as admitted:
            admitted.enter_context(self.admit(request))
            values = parse_json(request, await self.read(request))
            known = ("message", "image_base64", "conversation_id", "reset", "stream", *GENERATION_FIELDS)
            given = Fields(values, known, is_form=False)
            config = self.generation_config(given)
            text = given.text("message", limit=self.settings.max_message_chars)
            name = given.characters("conversation_id")
            name = uuid4().hex if name is None else checked_id(name)
            image, is_reset = given.characters("image_base64"), given.flag("reset")

            async def work(tell: Tell | None) -> dict:
                async with self.conversations.hold(name):
                    conversation = Conversation() if is_reset else self.conversations.get(name)
                    if image is not None:
                        conversation = conversation.with_image(await self.square(image, "image_base64"))
                    conversation, prompt = await self.fit(conversation, text, config)
                    answer = await self.generate(request, prompt, config, tell)
                    conversation = replace(conversation, turns=(*conversation.turns, (text, answer.text)))
                    self.conversations.put(name, conversation)
                place = {
                    "conversation_id": name,
                    "turn": conversation.dropped + len(conversation.turns),
                    "truncated_turns": conversation.dropped,
                }
                return {"response": answer.text} | place | self.facts(request, answer, config)

            return await self.respond(request, work, admitted, is_streamed=given.flag("stream"))

    async def respond(
        self,
        request: Request,
        work: Callable[[Tell | None], Awaitable[dict]],
        admitted: ExitStack,
        *,
        is_streamed: bool,
    ) -> Response:
        """What `work` comes to, at once or while it is being made. What fails before the first word is an ordinary
        error in both; a stream stays admitted until its work is done."""
        if not is_streamed:
            return JSONResponse(await unless_gone(request, self.in_time(work(None))))
        pieces = Pieces()
        task = asyncio.ensure_future(self.in_time(work(pieces.put)))
        pieces.made_by(task)
        kept = admitted.pop_all()
        task.add_done_callback(lambda _: kept.close())
        response = None
        try:
            first = await unless_gone(request, pieces.get())
            if first is None:
                task.result()  # raises what failed
            response = EventStream(request, first, pieces, self.settings.ping_s)
            return response
        finally:
            if response is None:
                task.cancel()

    async def forget(self, request: Request) -> Response:
        check_key(request, self.settings.api_key)
        name = checked_id(request.path_params["conversation_id"])
        async with self.conversations.hold(name):
            self.conversations.forget(name)
        return Response(status_code=204)

    async def health(self, request: Request) -> Response:
        """200 when a question would be answered, else 503 and why not."""
        body = {
            "status": self.worker.status,
            "model": self.settings.model_name,
            "version": __version__,
            "device": str(self.worker.pipeline.model.device) if self.worker.pipeline else None,
            "slots": {"total": self.worker.slots, "busy": self.worker.busy},
            "queue": {"waiting": self.worker.waiting, "limit": self.queue},
            "uptime_s": round(time.monotonic() - self.started_at, 1),
        }
        return JSONResponse(body, 200 if body["status"] == "ok" else 503)

    @property
    def queue(self) -> int:
        """How many requests may wait for a slot."""
        return self.settings.queue or 4 * self.worker.slots

    @contextmanager
    def admit(self, request: Request) -> Iterator[None]:
        """Counts a request in before its body is read: what all of them hold in memory is bounded."""
        check_key(request, self.settings.api_key)
        sentences = {
            "loading": "the model is still loading; try again in a few seconds",
            "draining": "the server is shutting down; send this to another one",
            "engine_dead": "the model failed and the server is going down; its log has the reason",
        }
        status = self.worker.status
        if status != "ok":
            raise HttpError(503, status, sentences[status], headers={"Retry-After": "5"})
        if self.admitted >= self.worker.slots + self.queue:
            message = f"{self.queue} requests are waiting already; try again later"
            wait_s = math.ceil(self.admitted * self.mean_service_s / self.worker.slots)
            raise HttpError(429, "overloaded", message, headers={"Retry-After": str(max(1, wait_s))})
        self.admitted += 1
        try:
            yield
        finally:
            self.admitted -= 1

    async def read(self, request: Request) -> bytes:
        return await read_body(request, self.settings.max_body_mb, self.settings.body_timeout_s)

    def generation_config(self, given: Fields) -> GenerationConfig:
        """How to decode; a seed that is not given is drawn, and told in the answer."""
        most = self.settings.max_new_tokens
        return GenerationConfig(
            max_new_tokens=given.integer("max_new_tokens", min(100, most), 1, most),
            temperature=given.number("temperature", 0.0, 2.0, is_zero_allowed=True),
            top_p=given.number("top_p", 1.0, 1.0, is_zero_allowed=False),
            top_k=given.integer("top_k", 0, 0, 2**31),
            min_p=given.number("min_p", 0.0, 1.0, is_zero_allowed=True),
            repetition_penalty=given.number("repetition_penalty", 1.0, 2.0, is_zero_allowed=False),
            stop=given.strings("stop", most=4, limit=64),
            seed=given.integer("seed", secrets.randbelow(2**53), 0, 2**63 - 1),  # drawn ones survive JavaScript
        )

    async def square(self, source: bytes | str, param: str) -> Image.Image:
        """The picture (encoded bytes, or their base64) as the vision tower will see it."""
        if isinstance(source, str) and ADDRESS.match(source):
            message = f"{param} is an address; nothing is fetched here, send the picture as a data: URI"
            raise HttpError(400, "image_url_not_supported", message, param=param)

        def work() -> Image.Image:
            data = source if isinstance(source, bytes) else decode_base64(source)
            return self.worker.pipeline.processor.image_processor.crop(decode(data, param))

        try:
            return await asyncio.get_running_loop().run_in_executor(self.threads, work)
        except ImageError as error:
            raise HttpError(IMAGE_STATUS.get(error.code, 400), error.code, str(error), param=param) from error

    async def fit(
        self, conversation: Conversation, question: str, config: GenerationConfig
    ) -> tuple[Conversation, Prompt]:
        """The conversation, without the oldest turns that do not fit the context, and the prompt it makes."""
        pipeline = self.worker.pipeline
        context = min(self.settings.max_context, pipeline.model.config.text.max_position_embeddings)

        def work() -> tuple[Conversation, Prompt]:
            rest = conversation
            while True:
                images = [] if rest.image is None else [rest.image]
                prompt = pipeline.prompt(rest.messages(question), images)
                if len(prompt.ids) + config.max_new_tokens <= context:
                    return rest, prompt
                if not rest.turns:
                    raise HttpError(
                        400,
                        "context_length_exceeded",
                        f"the prompt has {len(prompt.ids)} tokens and max_new_tokens is {config.max_new_tokens}, together "
                        f"more than the {context} of this server; shorten one of them",
                    )
                rest = rest.without_oldest()

        return await asyncio.get_running_loop().run_in_executor(self.threads, work)

    async def generate(
        self, request: Request, prompt: Prompt, config: GenerationConfig, tell: Tell | None
    ) -> Generated:
        """Waits for a slot and the answer; whoever stops waiting takes the job back."""
        job = self.worker.submit(prompt, config, tell)
        start = time.perf_counter()
        try:
            timeout = self.settings.queue_timeout_s
            done, _ = await asyncio.wait({job.started, job.answer}, timeout=timeout, return_when=FIRST_COMPLETED)
            waited = time.perf_counter() - start
            request.scope["log"]["queue_ms"] = round(1000 * waited)
            if not done:
                message = f"the model was busy with others for {timeout:g} s; try again later"
                raise HttpError(503, "queue_timeout", message, headers={"Retry-After": str(math.ceil(timeout))})
            await asyncio.wait({job.answer})
            if self.worker.is_stopping.is_set():
                raise HttpError(503, "draining", "the server shut down before the answer was done; ask another one")
            self.mean_service_s += 0.2 * (time.perf_counter() - start - waited - self.mean_service_s)
            return job.answer.result()
        except GenerationError as error:
            raise HttpError(500, "generation_failed", str(error)) from error
        except RunError as error:
            raise HttpError(500, "engine_dead", "the model failed; the server's log has the reason") from error
        except torch.OutOfMemoryError as error:
            message = "the device ran out of memory; try again, or with a shorter conversation"
            raise HttpError(503, "out_of_memory", message, headers={"Retry-After": "5"}) from error
        finally:
            job.cancel()

    async def in_time(self, work: Awaitable[dict]) -> dict:
        deadline = self.settings.deadline_s
        try:
            async with asyncio.timeout(deadline):
                return await work
        except TimeoutError:
            message = f"no answer after {deadline:g} s; ask for fewer tokens, or try again later"
            raise HttpError(504, "deadline_exceeded", message) from None

    def facts(self, request: Request, answer: Generated, config: GenerationConfig) -> dict[str, object]:
        """What every answer tells besides its text."""
        usage = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": len(answer.ids)}
        request.scope["log"] |= usage
        return {
            "finish_reason": answer.finish_reason,
            "usage": usage,
            "seed": config.seed,
            "model": self.settings.model_name,
            "id": request.scope["request_id"],
        }


def checked_id(name: str) -> str:
    if not CONVERSATION_ID.fullmatch(name):
        message = "conversation_id must be 1 to 64 of the characters A-Z a-z 0-9 . _ -"
        raise HttpError(400, "invalid_value", message, param="conversation_id")
    return name


def create_app(load: Callable[[], MultimodalInferencePipeline], settings: Settings) -> Starlette:
    """The ASGI application; `load` is called in the worker's thread once the application starts."""
    service = Service(load, settings)
    app = Starlette(
        routes=[
            Route("/caption", service.caption, methods=["POST"]),
            Route("/question", service.question, methods=["POST"]),
            Route("/chat", service.chat, methods=["POST"]),
            Route("/chat/{conversation_id}", service.forget, methods=["DELETE"]),
            Route("/health", service.health, methods=["GET"]),
        ],
        middleware=[Middleware(Envelope)],
        exception_handlers=EXCEPTION_HANDLERS,
        lifespan=service.lifespan,
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


class Server(uvicorn.Server):
    """uvicorn, which ends when the model is dead and gives requests `drain_s` to finish after a signal."""

    def __init__(self, app: Starlette, settings: Settings):
        self.worker, self.drain_s = app.state.service.worker, settings.drain_s
        config = uvicorn.Config(
            app,
            http=partial(DeadlineH11, header_timeout_s=settings.header_timeout_s),
            ws="none",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=math.ceil(settings.drain_s) + 5,
        )
        super().__init__(config)

    async def on_tick(self, counter: int) -> bool:
        return self.worker.error is not None or await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains; a second one, of either kind, ends at once."""
        self.force_exit = self.should_exit
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        self.worker.is_draining = True
        asyncio.get_running_loop().call_later(self.drain_s, self.worker.stop)
        await super().shutdown(sockets)

    def serve_until_signal(self, listener: socket) -> int:
        """The exit code: 0 after SIGTERM, 2 or 1 when the model could not be loaded or failed. Ctrl-C is raised."""
        signal.signal(signal.SIGTERM, lambda sig, frame: None)  # uvicorn raises the signal once more when it is done
        try:
            self.run(sockets=[listener])
        finally:
            self.worker.stop()
            if self.worker.is_loading:
                os._exit(0)  # a load cannot be interrupted, and Python would wait for its thread
        if self.worker.error is None:
            return 0
        return 2 if isinstance(self.worker.error, UserError) else 1
