"""The thread that owns the model and drives the engine; the event loop only submits requests and waits.

Waking an event loop from another thread costs more than a token of a small model. So the events of one step (pieces of
text, answers, errors of all slots) are collected and delivered in one wake-up.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from PIL import Image

from mmllm.data.chat import user
from mmllm.errors import RunError, UserError
from mmllm.inference.engine import Engine
from mmllm.inference.pipeline import MultimodalInferencePipeline
from mmllm.inference.request import Generated, GenerationConfig, Handle, Prompt
from mmllm.runtime.memory import return_freed_memory
from mmllm.serving.settings import Settings

STEP_S = 0.15  # how long the answers under way may stand still while a prompt is read, about

log = logging.getLogger("mmllm.serving")


class Job:
    """A submitted request, as the event loop sees it.

    `started` resolves when the request gets a slot, `answer` when it is done or has failed.
    """

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.started: asyncio.Future[None] = loop.create_future()
        self.answer: asyncio.Future[Generated] = loop.create_future()
        self.answer.add_done_callback(lambda future: future.cancelled() or future.exception())  # nobody may be waiting
        self.handle: Handle | None = None
        self.started_at: float | None = None  # time.perf_counter(), in the model's thread: events arrive a step later
        self.first_token_at: float | None = None

    def on_token(self, token: int) -> None:
        self.first_token_at = self.first_token_at or time.perf_counter()

    def finish(self) -> None:
        if self.handle.error is not None:
            self.answer.set_exception(self.handle.error)
        else:
            self.answer.set_result(self.handle.answer)


class Worker:
    """Loads the model in its own thread, runs one small image through it, then answers what is submitted.

    `status` is "loading", "ok", "draining" or "engine_dead"; `error` is what ended the thread.
    """

    def __init__(self, load: Callable[[], MultimodalInferencePipeline], settings: Settings):
        self.load, self.settings = load, settings
        self.thread = ThreadPoolExecutor(1, "model")
        self.pipeline: MultimodalInferencePipeline | None = None
        self.engine: Engine | None = None
        self.error: BaseException | None = None
        self.is_draining = False
        self.is_stopping = threading.Event()
        self.wake = threading.Event()
        self.lock = threading.Lock()  # nothing is submitted to an engine that has failed
        self.events: list[Callable[[], None]] = []  # to call in the event loop

    def start(self) -> None:
        """Begins to load and returns at once. Called in the event loop that will receive the answers."""
        self.loop = asyncio.get_running_loop()
        self.thread.submit(self._run).add_done_callback(self._on_end)

    def _run(self) -> None:
        self._load()
        while not self.is_stopping.is_set():
            if self.engine.has_work:
                self.engine.step()
                self._deliver()
            else:
                self.wake.wait()
                self.wake.clear()
        self._fail(RunError("the server shut down before the answer was done"))

    def _load(self) -> None:
        start = time.perf_counter()
        pipeline = self.load()
        # the cache has room for the longest context at once: growing copies it, and memory counts only where it is used
        length, store_bytes = self.settings.max_context, int(self.settings.store_mb * 2**20)
        engine = Engine(pipeline.model, self.settings.slots, max_length=length, step_s=STEP_S, store_bytes=store_bytes)
        prompt = pipeline.prompt([user("?", images=1)], [Image.new("RGB", (1, 1))])
        handle = engine.submit(Handle(prompt, GenerationConfig(max_new_tokens=2)))
        engine.run([handle])
        handle.result()
        return_freed_memory()
        self.engine, self.pipeline = engine, pipeline
        log.info(f"ready after {time.perf_counter() - start:.1f} s")

    def _on_end(self, run: Future[None]) -> None:
        """The thread ended: asked to stop, or by an error that concerns every request. A bug logs its traceback."""
        if run.cancelled() or (error := run.exception()) is None:
            return
        if isinstance(error, torch.AcceleratorError):  # the device answers nothing after this
            error = RunError(f"the device failed: {str(error).splitlines()[0]}; start the server again")
        log.error(f"error: {error}", exc_info=None if isinstance(error, UserError | RunError) else error)
        self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self.lock:
            self.error = None if self.is_stopping.is_set() else error
            if self.engine is not None:
                self.engine.fail(error if isinstance(error, RunError) else RunError("the model failed"))
        self._deliver()

    def _deliver(self) -> None:
        """Hands the collected events to the event loop in one wake-up."""
        if self.events and not self.loop.is_closed():
            events, self.events = self.events, []
            self.loop.call_soon_threadsafe(lambda: [event() for event in events])

    @property
    def is_loading(self) -> bool:
        return self.pipeline is None and self.error is None

    @property
    def status(self) -> str:
        if self.error is not None:
            return "engine_dead"
        if self.is_draining:
            return "draining"
        return "loading" if self.is_loading else "ok"

    @property
    def slots(self) -> int:
        return self.engine.slots if self.engine else 0

    def submit(self, prompt: Prompt, config: GenerationConfig, on_text: Callable[[str], None] | None = None) -> Job:
        """Adds a request to the engine's queue. Called in the event loop, as `on_text` is."""
        job = Job()

        def on_start() -> None:
            job.started_at = time.perf_counter()
            self.events.append(partial(job.started.set_result, None))

        def on_done(handle: Handle) -> None:
            if isinstance(handle.error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            self.events.append(job.finish)

        on_piece = on_text and (lambda piece: self.events.append(partial(on_text, piece)))
        job.handle = Handle(prompt, config, on_start, job.on_token, on_piece, on_done)
        with self.lock:
            if self.error is not None or self.is_stopping.is_set():
                raise RunError("the model failed or is shutting down")
            self.engine.submit(job.handle)
        self.wake.set()
        return job

    def stop(self) -> None:
        """Drops waiting requests, and running ones within one step. Returns at once."""
        self.is_draining = True
        self.is_stopping.set()
        self.wake.set()
        self.thread.shutdown(wait=False, cancel_futures=True)
