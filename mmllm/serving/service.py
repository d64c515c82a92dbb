"""What every endpoint does with a request: admit it, decode its images, tokenise its prompt, wait for the answer.

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
from typing import TypeVar

import torch
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mmllm.data.chat import Message
from mmllm.data.image import decode, decode_base64
from mmllm.errors import GenerationError, ImageError, RunError
from mmllm.inference.pipeline import MultimodalInferencePipeline
from mmllm.inference.request import Generated, GenerationConfig, Prompt
from mmllm.runtime.threads import worker_pool
from mmllm.serving import http, inputs
from mmllm.serving.conversations import Conversations
from mmllm.serving.events import EventStream, event
from mmllm.serving.http import HttpError
from mmllm.serving.metrics import Metrics
from mmllm.serving.settings import Settings
from mmllm.serving.worker import Job, Worker

IMAGE_STATUS = {"unsupported_image": 415, "image_too_large": 413}  # other faults of an image are 400
ADDRESS = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]{0,30}://")  # bounded: long base64 must not be searched again and again
STALLED_AFTER_S = 30  # without a step of the model, or with one image
REFUSALS = {
    "loading": "the model is still loading; try again in a few seconds",
    "draining": "the server is shutting down; send this to another one",
    "engine_dead": "the model failed and the server is going down; its log has the reason",
}

Put = Callable[[dict], None]  # receives the events of a streamed answer
Work = Callable[[Put | None], Awaitable[dict | None]]  # produces the body of a response, or the last event of a stream
Result = TypeVar("Result")


class Service:
    """The model's thread, the pools and the limits that all endpoints share."""

    def __init__(self, load: Callable[[], MultimodalInferencePipeline], settings: Settings):
        self.settings = settings
        self.worker = Worker(load, settings)
        self.conversations = Conversations(settings.conversations, settings.conversation_ttl_s, settings.state)
        self.bodies = http.BodyReader(settings)
        self.image_threads = worker_pool(2, "images")
        self.text_threads = worker_pool(1, "text")  # of its own: text never waits behind images
        self.metrics = Metrics()
        self.decoding: dict[object, float] = {}  # images in work, and since when
        self.answering: dict[Job, float] = {}  # requests with the model, and since when
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
        self.conversations.close()
        self.image_threads.shutdown(wait=False, cancel_futures=True)
        self.text_threads.shutdown(wait=False, cancel_futures=True)

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

    @property
    def queue(self) -> int:
        """How many requests may wait for a slot."""
        return self.settings.queue or 4 * self.worker.slots

    @property
    def status(self) -> str:
        """That of the worker, or "stalled" when images or answers stand still."""
        engine, now = self.worker.engine, time.monotonic()
        waits = [now - start for start in list(self.decoding.values())]
        if engine and self.answering:
            waits.append(now - max(engine.counters.last_step, min(self.answering.values())))
        is_stalled = self.worker.status == "ok" and max(waits, default=0) > STALLED_AFTER_S
        return "stalled" if is_stalled else self.worker.status

    async def respond(self, request: Request, work: Work, *, is_stream: bool, num_answers: int = 1) -> Response:
        """The result of `work`, as JSON or as a stream of events.

        What fails before the first event is an ordinary error response in both.
        """
        if not is_stream:
            return JSONResponse(await http.cancel_on_disconnect(request, self.admit(work, None, num_answers)))
        queue: asyncio.Queue[str | None] = asyncio.Queue()  # a client that does not read loses its connection
        task = asyncio.create_task(self.admit(work, lambda content: queue.put_nowait(event(content)), num_answers))
        task.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            first = await http.cancel_on_disconnect(request, queue.get())
            if first is None:
                task.result()  # raises what failed
        except BaseException:
            task.cancel()
            raise
        return EventStream(request, task, queue, first, self.settings.ping_s)

    async def admit(self, work: Work, put: Put | None, num_answers: int) -> dict | None:
        """The result of `work`, within the deadline; its answers count as admitted until all are done."""
        self.check_can_answer()
        self.admitted += num_answers
        deadline = self.settings.deadline_s
        try:
            async with asyncio.timeout(deadline):
                return await work(put)
        except TimeoutError:
            message = f"no answer after {deadline:g} s; ask for fewer tokens, or try again later"
            raise HttpError(504, "deadline_exceeded", message) from None
        finally:
            self.admitted -= num_answers

    async def crop(self, source: bytes | str, param: str) -> Image.Image:
        """The image (encoded bytes, or their base64) as the vision tower will see it."""
        if isinstance(source, str) and ADDRESS.match(source):
            message = f"{param} is an address; nothing is fetched here, send the image as a data: URI"
            raise HttpError(400, "image_url_not_supported", message, param=param)

        def work() -> Image.Image:
            key = object()
            self.decoding[key] = time.monotonic()
            try:
                data = source if isinstance(source, bytes) else decode_base64(source)
                return self.worker.pipeline.processor.image_processor.crop(decode(data, param, is_bounded=True))
            finally:
                del self.decoding[key]

        try:
            return await asyncio.get_running_loop().run_in_executor(self.image_threads, work)
        except ImageError as error:
            raise HttpError(IMAGE_STATUS.get(error.code, 400), error.code, str(error), param=param) from error

    async def in_text_thread(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self.text_threads, work)

    async def prompt(self, messages: list[Message], images: list[Image.Image], new_tokens: int) -> Prompt:
        """The prompt of a whole conversation, which must leave room for `new_tokens`."""
        prompt = await self.in_text_thread(lambda: self.worker.pipeline.prompt(messages, images))
        return self.check_fits(prompt, new_tokens)

    @property
    def context(self) -> int:
        """How many tokens a prompt and its answer may have together."""
        return min(self.settings.max_context, self.worker.pipeline.model.config.text.max_position_embeddings)

    def check_fits(self, prompt: Prompt, new_tokens: int) -> Prompt:
        if len(prompt.ids) + new_tokens > self.context:
            message = (
                f"the prompt has {len(prompt.ids)} tokens and the answer may have {new_tokens}, together more than the "
                f"{self.context} of this server; shorten one of them"
            )
            raise HttpError(400, "context_length_exceeded", message)
        return prompt

    async def generate(
        self, request: Request, prompt: Prompt, config: GenerationConfig, on_text: Callable[[str], None] | None
    ) -> Generated:
        """The model's answer; what fails on the way becomes an HttpError."""
        try:
            return await self.wait_for_answer(request, self.worker.submit(prompt, config, on_text))
        except GenerationError as error:
            raise HttpError(500, "generation_failed", str(error)) from error
        except RunError as error:
            if self.worker.is_stopping.is_set():
                raise HttpError(503, "draining", "the server shut down meanwhile; ask another one") from error
            raise HttpError(500, "engine_dead", "the model failed; the server's log has the reason") from error
        except torch.OutOfMemoryError as error:
            message = "the device ran out of memory; try again, or with a shorter conversation"
            raise HttpError(503, "out_of_memory", message, headers={"Retry-After": "5"}) from error

    async def wait_for_answer(self, request: Request, job: Job) -> Generated:
        """Waits for a slot, then for the answer. Cancelling the wait cancels the job."""
        start, timeout = time.perf_counter(), self.settings.queue_timeout_s
        self.answering[job] = time.monotonic()
        try:
            done, _ = await asyncio.wait({job.started, job.answer}, timeout=timeout, return_when=FIRST_COMPLETED)
            waited = max(0.0, (job.started_at or time.perf_counter()) - start)
            request.scope["log"]["queue_ms"] = round(1000 * waited)
            if not done:
                message = f"the model was busy with other requests for {timeout:g} s; try again later"
                raise HttpError(503, "queue_timeout", message, headers={"Retry-After": str(math.ceil(timeout))})
            await asyncio.wait({job.answer})
            answer, end = job.answer.result(), time.perf_counter()
            first = job.first_token_at or end
            prefill, decode = first - start - waited, end - first
            self.mean_service_s += 0.2 * (end - start - waited - self.mean_service_s)
            self.metrics.count_answer(answer, waited, prefill, decode)
            request.scope["log"] |= {"prefill_ms": round(1000 * prefill), "decode_ms": round(1000 * decode)}
            request.scope["log"]["reused_tokens"] = job.handle.reused_tokens
            return answer
        finally:
            del self.answering[job]
            job.handle.cancel()  # waiting, it never runs; running, it ends within one step
