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

MAX_UNSENT_CHARACTERS = 64_000  # of a client that does not read


class TextStream:
    """Pieces of text on their way from a task that produces them to a client.

    If the client does not read, the task is cancelled once `MAX_UNSENT_CHARACTERS` wait for it.
    """

    def __init__(self) -> None:
        self.queue: asyncio.Queue[str | None] = asyncio.Queue()
        self.unsent = 0

    def start(self, work: Coroutine[None, None, dict]) -> None:
        self.task = asyncio.create_task(work)
        self.task.add_done_callback(lambda _: self.queue.put_nowait(None))

    def put(self, piece: str) -> None:
        self.unsent += len(piece)
        self.queue.put_nowait(piece)
        if self.unsent > MAX_UNSENT_CHARACTERS:
            self.task.cancel()

    async def get(self) -> str | None:
        """The next piece, or None when the task is done."""
        piece = await self.queue.get()
        self.unsent -= len(piece or "")
        return piece


class EventStream(StreamingResponse):
    """Sends `first`, the pieces after it, and the result or error of the task behind them.

    While no piece arrives, a comment every `ping_s` seconds keeps the connection open. The task is cancelled when the
    client leaves.
    """

    def __init__(self, request: Request, first: str | None, stream: TextStream, ping_s: float):
        self.request, self.first, self.stream, self.ping_s = request, first, stream, ping_s
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._events(), headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await cancel_on_disconnect(self.request, self.stream_response(send))
        except ClientDisconnect:
            scope["log"]["status"] = CLIENT_CLOSED_REQUEST
        finally:
            self.stream.task.cancel()

    async def _events(self) -> AsyncIterator[str]:
        piece, task = self.first, self.stream.task
        while piece is not None:
            if piece:
                yield event({"delta": piece})
            try:
                async with asyncio.timeout(self.ping_s):
                    piece = await self.stream.get()
            except TimeoutError:
                yield ": ping\n\n"
                piece = ""
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            yield event(task.result())
        else:
            yield event((error if isinstance(error, HttpError) else internal_error(self.request)).body)
        yield "data: [DONE]\n\n"
        if error is not None and not isinstance(error, HttpError):
            raise error  # for the log


def event(content: dict) -> str:
    return f"data: {json.dumps(content)}\n\n"
