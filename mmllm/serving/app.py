"""The endpoints: POST /caption, /question and /chat, DELETE /chat/{conversation_id}, GET /health.

The event loop only waits: images are decoded and prompts tokenised in a small pool of threads, the model runs in a
thread of its own (worker.py). Everything a request may take is bounded before it is spent (settings.py), and a request
beyond the queue is refused before its body is read. No request makes the server fetch an address or open a path.
"""

import asyncio
import math
import re
import time
from asyncio import FIRST_COMPLETED
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from uuid import uuid4

import torch
from PIL import Image
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mmllm import __version__
from mmllm.data.image import decode, decode_base64
from mmllm.errors import GenerationError, ImageError, RunError
from mmllm.inference.pipeline import MultimodalInferencePipeline
from mmllm.inference.request import Generated, Prompt
from mmllm.runtime.threads import worker_pool
from mmllm.serving import http, inputs
from mmllm.serving.conversations import Conversation, Conversations
from mmllm.serving.events import EventStream, TextStream
from mmllm.serving.http import HttpError
from mmllm.serving.settings import Settings
from mmllm.serving.worker import Job, Worker

IMAGE_STATUS = {"unsupported_image": 415, "image_too_large": 413}  # other faults of an image are 400
ADDRESS = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]{0,30}://")  # bounded: long base64 must not be searched again and again
REFUSALS = {
    "loading": "the model is still loading; try again in a few seconds",
    "draining": "the server is shutting down; send this to another one",
    "engine_dead": "the model failed and the server is going down; its log has the reason",
}

OnText = Callable[[str], None]  # receives the text of an answer piece by piece
Work = Callable[[OnText | None], Awaitable[dict]]  # produces the body of a response


class Service:
    """The endpoints and their shared state."""

    def __init__(self, load: Callable[[], MultimodalInferencePipeline], settings: Settings):
        self.settings = settings
        self.worker = Worker(load, settings.slots, settings.max_context)
        self.conversations = Conversations(settings.conversations, settings.conversation_ttl_s)
        self.bodies = http.BodyReader(settings)
        self.image_threads = worker_pool(2, "images")
        self.text_threads = worker_pool(1, "text")  # of its own: text never waits behind images
        self.admitted = 0
        self.mean_service_s = 1.0  # from getting a slot to the answer
        self.started_at = time.monotonic()

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """The model loads while the server listens already; /health says when it is ready."""
        self.worker.start()
        yield
        self.worker.stop()
        if not self.worker.is_loading:  # a load cannot be interrupted
            await asyncio.to_thread(self.worker.thread.shutdown)
        self.image_threads.shutdown(wait=False, cancel_futures=True)
        self.text_threads.shutdown(wait=False, cancel_futures=True)

    async def caption(self, request: Request) -> Response:
        fields = await self.read(request, inputs.CaptionFields)
        return await self.answer_about_image(request, fields, fields.prompt, "caption")

    async def question(self, request: Request) -> Response:
        fields = await self.read(request, inputs.QuestionFields)
        return await self.answer_about_image(request, fields, fields.question, "answer")

    async def answer_about_image(
        self, request: Request, fields: inputs.ImageFields, text: str, result: str
    ) -> Response:
        """One question about one image; the answer has the name `result`."""

        async def work(on_text: OnText | None) -> dict:
            conversation = Conversation().with_image(await self.crop(fields.image, "image"))
            _, prompt = await self.fit(conversation, text, fields.max_new_tokens)
            answer = await self.generate(request, prompt, fields, on_text)
            return {result: answer.text} | self.metadata(request, answer, fields)

        return await self.respond(request, work, fields)

    async def chat(self, request: Request) -> Response:
        """The next turn of a conversation, which is stored only when it was answered."""
        fields = await self.read(request, inputs.ChatFields)
        name = fields.conversation_id or uuid4().hex

        async def work(on_text: OnText | None) -> dict:
            async with self.conversations.lock(name):
                conversation = Conversation() if fields.reset else self.conversations.get(name)
                if fields.image_base64 is not None:
                    conversation = conversation.with_image(await self.crop(fields.image_base64, "image_base64"))
                conversation, prompt = await self.fit(conversation, fields.message, fields.max_new_tokens)
                answer = await self.generate(request, prompt, fields, on_text)
                conversation = replace(conversation, turns=(*conversation.turns, (fields.message, answer.text)))
                self.conversations.put(name, conversation)
            turn = conversation.dropped + len(conversation.turns)
            place = {"conversation_id": name, "turn": turn, "truncated_turns": conversation.dropped}
            return {"response": answer.text} | place | self.metadata(request, answer, fields)

        return await self.respond(request, work, fields)

    async def read(self, request: Request, model: type[inputs.Fields]) -> inputs.Fields:
        """The fields of a request, which is refused before its body is read if it could not be answered."""
        http.check_key(request, self.settings.api_key)
        self.check_can_answer()
        body = await self.bodies.read(request)
        is_form = issubclass(model, inputs.ImageFields)
        values = await http.parse_form(request, body) if is_form else http.parse_json(request, body)
        return inputs.validate(model, values, self.settings, is_form=is_form)

    def check_can_answer(self) -> None:
        """Raises HttpError unless a request may begin to wait for the model."""
        status = self.worker.status
        if status != "ok":
            raise HttpError(503, status, REFUSALS[status], headers={"Retry-After": "5"})
        if self.admitted >= self.worker.slots + self.queue:
            message = f"{self.queue} requests are waiting already; try again later"
            wait_s = math.ceil(self.admitted * self.mean_service_s / self.worker.slots)
            raise HttpError(429, "overloaded", message, headers={"Retry-After": str(max(1, wait_s))})

    async def respond(self, request: Request, work: Work, fields: inputs.GenerationFields) -> Response:
        """The result of `work`, as JSON or as a stream of its pieces.

        What fails before the first piece is an ordinary error response in both.
        """
        if not fields.stream:
            return JSONResponse(await http.cancel_on_disconnect(request, self.admit(work, None)))
        stream = TextStream()
        stream.start(self.admit(work, stream.put))
        response = None
        try:
            first = await http.cancel_on_disconnect(request, stream.get())
            if first is None:
                stream.task.result()  # raises what failed
            response = EventStream(request, first, stream, self.settings.ping_s)
            return response
        finally:
            if response is None:
                stream.task.cancel()

    async def admit(self, work: Work, on_text: OnText | None) -> dict:
        """The result of `work`, within the deadline; it counts as admitted until it is done."""
        self.check_can_answer()
        self.admitted += 1
        deadline = self.settings.deadline_s
        try:
            async with asyncio.timeout(deadline):
                return await work(on_text)
        except TimeoutError:
            message = f"no answer after {deadline:g} s; ask for fewer tokens, or try again later"
            raise HttpError(504, "deadline_exceeded", message) from None
        finally:
            self.admitted -= 1

    async def delete_conversation(self, request: Request) -> Response:
        http.check_key(request, self.settings.api_key)
        name = inputs.validate(inputs.DeleteFields, request.path_params, self.settings, is_form=False).conversation_id
        async with self.conversations.lock(name):
            self.conversations.delete(name)
        return Response(status_code=204)

    async def health(self, request: Request) -> Response:
        """200 when a question would be answered, else 503 and the reason."""
        engine, slots = self.worker.engine, self.worker.slots
        body = {
            "status": self.worker.status,
            "model": self.settings.model_name,
            "version": __version__,
            "device": str(engine.model.device) if engine else None,
            "slots": {"total": slots, "busy": engine.busy if engine else 0},
            "queue": {"waiting": len(engine.waiting) if engine else 0, "limit": self.queue},
            "uptime_s": round(time.monotonic() - self.started_at, 1),
        }
        return JSONResponse(body, 200 if body["status"] == "ok" else 503)

    @property
    def queue(self) -> int:
        """How many requests may wait for a slot."""
        return self.settings.queue or 4 * self.worker.slots

    async def crop(self, source: bytes | str, param: str) -> Image.Image:
        """The image (encoded bytes, or their base64) as the vision tower will see it."""
        if isinstance(source, str) and ADDRESS.match(source):
            message = f"{param} is an address; nothing is fetched here, send the image as a data: URI"
            raise HttpError(400, "image_url_not_supported", message, param=param)

        def work() -> Image.Image:
            data = source if isinstance(source, bytes) else decode_base64(source)
            return self.worker.pipeline.processor.image_processor.crop(decode(data, param, is_bounded=True))

        try:
            return await asyncio.get_running_loop().run_in_executor(self.image_threads, work)
        except ImageError as error:
            raise HttpError(IMAGE_STATUS.get(error.code, 400), error.code, str(error), param=param) from error

    async def fit(self, conversation: Conversation, question: str, new_tokens: int) -> tuple[Conversation, Prompt]:
        """The conversation without its oldest turns if they leave no room for `new_tokens`, and its prompt."""
        pipeline = self.worker.pipeline
        context = min(self.settings.max_context, pipeline.model.config.text.max_position_embeddings)

        def work() -> tuple[Conversation, Prompt]:
            rest = conversation
            while True:
                prompt = pipeline.prompt(rest.messages(question), [rest.image] if rest.image else [])
                if len(prompt.ids) + new_tokens <= context:
                    return rest, prompt
                if not rest.turns:
                    message = (
                        f"the prompt has {len(prompt.ids)} tokens and max_new_tokens is {new_tokens}, together more "
                        f"than the {context} of this server; shorten one of them"
                    )
                    raise HttpError(400, "context_length_exceeded", message)
                rest = rest.without_oldest_turn()

        return await asyncio.get_running_loop().run_in_executor(self.text_threads, work)

    async def generate(
        self, request: Request, prompt: Prompt, fields: inputs.GenerationFields, on_text: OnText | None
    ) -> Generated:
        """The model's answer; what fails on the way becomes an HttpError."""
        try:
            return await self.wait_for_answer(request, self.worker.submit(prompt, fields.config, on_text))
        except GenerationError as error:
            raise HttpError(500, "generation_failed", str(error)) from error
        except RunError as error:
            if self.worker.is_stopping.is_set():
                message = "the server shut down before the answer was done; ask another one"
                raise HttpError(503, "draining", message) from error
            raise HttpError(500, "engine_dead", "the model failed; the server's log has the reason") from error
        except torch.OutOfMemoryError as error:
            message = "the device ran out of memory; try again, or with a shorter conversation"
            raise HttpError(503, "out_of_memory", message, headers={"Retry-After": "5"}) from error

    async def wait_for_answer(self, request: Request, job: Job) -> Generated:
        """Waits for a slot, then for the answer. Cancelling the wait cancels the job."""
        start, timeout = time.perf_counter(), self.settings.queue_timeout_s
        try:
            done, _ = await asyncio.wait({job.started, job.answer}, timeout=timeout, return_when=FIRST_COMPLETED)
            waited = time.perf_counter() - start
            request.scope["log"]["queue_ms"] = round(1000 * waited)
            if not done:
                message = f"the model was busy with other requests for {timeout:g} s; try again later"
                raise HttpError(503, "queue_timeout", message, headers={"Retry-After": str(math.ceil(timeout))})
            await asyncio.wait({job.answer})
            self.mean_service_s += 0.2 * (time.perf_counter() - start - waited - self.mean_service_s)
            return job.answer.result()
        finally:
            job.handle.cancel()  # waiting, it never runs; running, it ends within one step

    def metadata(self, request: Request, answer: Generated, fields: inputs.GenerationFields) -> dict[str, object]:
        """What every answer has besides its text."""
        usage = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": len(answer.ids)}
        request.scope["log"] |= usage
        return {
            "finish_reason": answer.finish_reason,
            "usage": usage,
            "seed": fields.seed,
            "model": self.settings.model_name,
            "id": request.scope["request_id"],
        }


def create_app(load: Callable[[], MultimodalInferencePipeline], settings: Settings) -> Starlette:
    """The ASGI application; `load` is called in the worker's thread once the application starts."""
    service = Service(load, settings)
    app = Starlette(
        routes=[
            Route("/caption", service.caption, methods=["POST"]),
            Route("/question", service.question, methods=["POST"]),
            Route("/chat", service.chat, methods=["POST"]),
            Route("/chat/{conversation_id}", service.delete_conversation, methods=["DELETE"]),
            Route("/health", service.health, methods=["GET"]),
        ],
        middleware=[Middleware(http.RequestLog)],
        exception_handlers=http.EXCEPTION_HANDLERS,
        lifespan=service.lifespan,
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app
