"""Streamed answers as server-sent events.

    data: {"delta": "A cat"}                                 a piece of the text, one event a piece
    data: {"caption": "A cat on a sill.", "usage": ...}      the whole answer, as without `stream`; or {"error": ...}
    data: [DONE]

The status is 200 once the first byte is sent. So nothing is sent before the first piece exists, and a later failure is
an event of its own. sse-starlette is not used: it replaces `uvicorn.Server.handle_exit` on import and cuts every stream
at SIGTERM, where this server lets running answers finish.

Format: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from mmllm.serving.http import CLIENT_CLOSED_REQUEST, HttpError, cancel_on_disconnect, internal_error

MAX_UNSENT_CHARACTERS = 256_000  # of events for a client that does not read


class EventQueue:
    """Events on their way from a task that produces them to a client.

    If the client does not read, the task is cancelled once `MAX_UNSENT_CHARACTERS` wait for it.
    """

    def __init__(self) -> None:
        self.queue: asyncio.Queue[str | None] = asyncio.Queue()
        self.unsent = 0

    def start(self, work: Coroutine[None, None, dict | None]) -> None:
        """Begins `work`; what it returns, unless None, is the last event."""
        self.task = asyncio.create_task(work)
        self.task.add_done_callback(lambda _: self.queue.put_nowait(None))

    def put(self, content: dict) -> None:
        text = event(content)
        self.unsent += len(text)
        self.queue.put_nowait(text)
        if self.unsent > MAX_UNSENT_CHARACTERS:
            self.task.cancel()

    async def get(self) -> str | None:
        """The text of the next event, or None when the task is done."""
        text = await self.queue.get()
        self.unsent -= len(text or "")
        return text


class EventStream(StreamingResponse):
    """Sends `first`, the events after it, and the result or error of the task behind them.

    While no event arrives, a comment every `ping_s` seconds keeps the connection open. The task is cancelled when the
    client leaves.
    """

    def __init__(self, request: Request, first: str | None, queue: EventQueue, ping_s: float):
        self.request, self.first, self.queue, self.ping_s = request, first, queue, ping_s
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._events(), headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await cancel_on_disconnect(self.request, self.stream_response(send))
        except ClientDisconnect:
            scope["log"]["status"] = CLIENT_CLOSED_REQUEST
        finally:
            self.queue.task.cancel()

    async def _events(self) -> AsyncIterator[str]:
        text, task = self.first, self.queue.task
        while text is not None:
            yield text
            try:
                async with asyncio.timeout(self.ping_s):
                    text = await self.queue.get()
            except TimeoutError:
                text = ": ping\n\n"
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            yield event((error if isinstance(error, HttpError) else internal_error(self.request)).body)
        elif task.result() is not None:
            yield event(task.result())
        yield "data: [DONE]\n\n"
        if error is not None and not isinstance(error, HttpError):
            raise error  # for the log


def event(content: dict) -> str:
    return f"data: {json.dumps(content)}\n\n"
