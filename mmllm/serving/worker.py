"""One thread that owns the model and drives the engine; the event loop only submits and waits.

The surprising fact: waking an event loop from another thread costs more than a small model's token. So what happens in
a step (pieces of text, answers, errors of all slots) is collected and handed over in one wake-up.
Next: sse.py, server.py.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from PIL import Image

from mmllm.data.chat import user
from mmllm.errors import RunError, UserError
from mmllm.inference.engine import Engine
from mmllm.inference.pipeline import MultimodalInferencePipeline
from mmllm.inference.request import Generated, GenerationConfig, Handle, Prompt
from mmllm.inference.static_step import BUCKET

log = logging.getLogger("mmllm.serving")

Event = tuple[Callable[[object], None], object]  # what to call in the event loop, and with what


class Job:
    """A submitted request, as the event loop sees it. `started` resolves when it gets a slot, `answer` when it is done
    or has failed; `tell` hears its text piece by piece."""

    def __init__(self, tell: Callable[[str], None] | None):
        loop = asyncio.get_running_loop()
        self.started: asyncio.Future[None] = loop.create_future()
        self.answer: asyncio.Future[Generated] = loop.create_future()
        self.answer.add_done_callback(lambda future: future.cancelled() or future.exception())  # someone may have left
        self.tell = tell
        self.handle: Handle | None = None

    def cancel(self) -> None:
        """Gives the answer up: a waiting job never runs, a running one ends within one step."""
        self.tell = None
        self.handle.cancel()

    def hear(self, piece: str) -> None:
        if self.tell:
            self.tell(piece)

    def start(self, _: object) -> None:
        if not self.started.done():
            self.started.set_result(None)

    def finish(self, handle: Handle) -> None:
        if self.answer.done():
            return
        if handle.error is not None:
            self.answer.set_exception(handle.error)
        else:
            self.answer.set_result(handle.answer)


class Worker:
    """Loads the model in its thread, tries it on one small picture, then answers what is submitted.

    `status` is "loading", "ok", "draining" or "engine_dead"; `error` says what killed it.
    """

    def __init__(
        self, load: Callable[[], MultimodalInferencePipeline], slots: int | None = None, max_context: int = BUCKET
    ):
        self.load, self.wanted_slots, self.max_context = load, slots, max_context
        self.thread = ThreadPoolExecutor(1, "model")
        self.pipeline: MultimodalInferencePipeline | None = None
        self.engine: Engine | None = None
        self.error: BaseException | None = None
        self.is_draining = False
        self.is_stopping = threading.Event()
        self.wake = threading.Event()
        self.lock = threading.Lock()  # nothing is submitted to an engine that has failed
        self.events: list[Event] = []

    def start(self) -> None:
        """Begins to load; returns at once. Called in the event loop that will hear the answers."""
        self.loop = asyncio.get_running_loop()
        self.thread.submit(self._run).add_done_callback(self._ended)

    def _run(self) -> None:
        self._load()
        while not self.is_stopping.is_set():
            if self.engine.has_work:
                self.engine.step()
                self._hand_over()
            else:
                self.wake.wait()
                self.wake.clear()
        self._fail(RunError("the server shut down before the answer was done"))

    def _load(self) -> None:
        start = time.perf_counter()
        pipeline = self.load()
        is_static = pipeline.model.device.type == "cuda"  # there the step has one shape, made for the longest context
        engine = Engine(pipeline.model, self.wanted_slots, max_length=self.max_context if is_static else BUCKET)
        prompt = pipeline.prompt([user("?", images=1)], [Image.new("RGB", (1, 1))])
        handle = engine.submit(Handle(prompt, GenerationConfig(max_new_tokens=2)))
        engine.run([handle])
        handle.result()
        self.engine, self.pipeline = engine, pipeline
        log.info(f"ready after {time.perf_counter() - start:.1f} s")

    def _ended(self, run: Future[None]) -> None:
        """The thread is at its end: asked to stop, or by an error, which nobody survives. A bug shows its traceback."""
        if run.cancelled() or (error := run.exception()) is None:
            return
        if isinstance(error, torch.AcceleratorError):  # after this the device answers nothing any more
            error = RunError(f"the device failed: {str(error).splitlines()[0]}; start the server again")
        log.error(f"error: {error}", exc_info=None if isinstance(error, UserError | RunError) else error)
        self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self.lock:
            self.error = None if self.is_stopping.is_set() else error
            if self.engine is not None:
                self.engine.fail(error if isinstance(error, RunError) else RunError("the model failed"))
        self._hand_over()

    def _hand_over(self) -> None:
        """Tells the event loop, in one wake-up, what has happened."""
        if self.events and not self.loop.is_closed():
            events, self.events = self.events, []
            self.loop.call_soon_threadsafe(deliver, events)

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

    @property
    def busy(self) -> int:
        return self.engine.busy if self.engine else 0

    @property
    def waiting(self) -> int:
        return len(self.engine.waiting) if self.engine else 0

    def submit(self, prompt: Prompt, config: GenerationConfig, tell: Callable[[str], None] | None = None) -> Job:
        """Hands a request in; `tell` hears the answer piece by piece. Called in the event loop."""
        job = Job(tell)
        with self.lock:
            if self.error is not None:
                raise RunError("the model failed")
            job.handle = self.engine.submit(
                Handle(
                    prompt,
                    config,
                    on_start=lambda: self.events.append((job.start, None)),
                    on_text=tell and (lambda piece: self.events.append((job.hear, piece))),
                    on_done=lambda handle: self._done(job, handle),
                )
            )
        self.wake.set()
        return job

    def _done(self, job: Job, handle: Handle) -> None:
        if isinstance(handle.error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        self.events.append((job.finish, handle))

    def stop(self) -> None:
        """Gives up what is waiting, and what is running within one step. Returns at once."""
        self.is_draining = True
        self.is_stopping.set()
        self.wake.set()
        self.thread.shutdown(wait=False, cancel_futures=True)


def deliver(events: list[Event]) -> None:
    for call, value in events:
        call(value)
