"""One thread that owns the model; the rest of the server only submits and waits.

Requests are decoded one after the other, in the order they came. The seam is narrow on purpose: `submit` returns a Job
with two futures and a `cancel`, so an engine that decodes many rows side by side can take this class's place.
Next: server.py.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from PIL import Image

from mmllm.chat import user
from mmllm.errors import RunError, UserError
from mmllm.pipeline import MultimodalInferencePipeline
from mmllm.request import Generated, Prompt
from mmllm.sampling import GenerationConfig

log = logging.getLogger("mmllm.server")


@dataclass(frozen=True)
class Job:
    """A submitted request. `started` resolves when the model takes it up, `answer` when it is done or has failed."""

    started: Future[None]
    answer: Future[Generated]
    is_cancelled: threading.Event

    def cancel(self) -> None:
        """Gives the answer up: a waiting job never runs, a running one ends within one step."""
        self.is_cancelled.set()
        self.answer.cancel()


class Worker:
    """Loads the model in its thread, tries it on one small picture, then answers what is submitted.

    `status` is "loading", "ok", "draining" or "engine_dead"; `error` says what killed it.
    """

    def __init__(self, load: Callable[[], MultimodalInferencePipeline]):
        self.load = load
        self.thread = ThreadPoolExecutor(1, "model")
        self.pipeline: MultimodalInferencePipeline | None = None
        self.error: BaseException | None = None
        self.is_draining = False
        self.is_stopping = threading.Event()
        self.answers: set[Future[Generated]] = set()
        self.mean_service_s = 1.0

    def start(self) -> None:
        """Begins to load; returns at once."""
        self.thread.submit(self._load).add_done_callback(self._loaded)

    def _load(self) -> None:
        start = time.perf_counter()
        pipeline = self.load()
        dot = Image.new("RGB", (1, 1))
        pipeline.generate(pipeline.prompt([user("?", images=1)], [dot]), GenerationConfig(max_new_tokens=2))
        self.pipeline = pipeline
        log.info(f"ready after {time.perf_counter() - start:.1f} s")

    def _loaded(self, loading: Future[None]) -> None:
        if not loading.cancelled() and loading.exception() is not None:
            self._die(loading.exception())

    def _die(self, error: BaseException) -> None:
        """Nothing will be answered any more. A bug shows its traceback."""
        self.error = error
        log.error(f"error: {error}", exc_info=None if isinstance(error, UserError | RunError) else error)

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
    def busy(self) -> int:
        return sum(answer.running() for answer in list(self.answers))

    @property
    def waiting(self) -> int:
        return sum(not answer.running() and not answer.done() for answer in list(self.answers))

    def submit(self, prompt: Prompt, config: GenerationConfig) -> Job:
        started, is_cancelled = Future(), threading.Event()
        answer = self.thread.submit(self._answer, prompt, config, started, is_cancelled)
        self.answers.add(answer)
        answer.add_done_callback(self.answers.discard)
        return Job(started, answer, is_cancelled)

    def _answer(
        self, prompt: Prompt, config: GenerationConfig, started: Future[None], is_cancelled: threading.Event
    ) -> Generated:
        start = time.perf_counter()
        started.set_result(None)
        try:
            return self.pipeline.generate(
                prompt, config, cancelled=lambda: is_cancelled.is_set() or self.is_stopping.is_set()
            )
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            raise
        except torch.AcceleratorError as error:  # after this the device answers nothing any more
            self._die(RunError(f"the device failed: {str(error).splitlines()[0]}; start the server again"))
            raise
        finally:
            self.mean_service_s += 0.2 * (time.perf_counter() - start - self.mean_service_s)

    def stop(self) -> None:
        """Gives up what is waiting, and what is running within one step. Returns at once."""
        self.is_draining = True
        self.is_stopping.set()
        self.thread.shutdown(wait=False, cancel_futures=True)
