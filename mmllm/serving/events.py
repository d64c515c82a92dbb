"""An answer while it is being made: server-sent events.

The surprising fact: once the first byte is out, the status is 200 whatever happens. So nothing is sent before the first
word is there, and what fails later is an event of its own.

    data: {"delta": "A cat"}                                 a piece of the text, as often as there is one
    data: {"caption": "A cat on a sill.", "usage": ...}      the whole answer, as without `stream`; or {"error": ...}
    data: [DONE]

Format: https://html.spec.whatwg.org/multipage/server-sent-events.html. Next: server.py.
"""

import asyncio
import json
from collections.abc import AsyncIterator

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mmllm.serving.http import CLIENT_LEFT, HttpError, error_body, unless_gone

MOST_UNSENT = 64_000  # characters that wait for a client who does not read


class Pieces:
    """Pieces of text on their way from the model to a client. `work` makes them; it is given up when they pile up."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[str | None] = asyncio.Queue()
        self.unsent = 0
        self.work: asyncio.Task[dict] | None = None

    def made_by(self, work: "asyncio.Task[dict]") -> None:
        self.work = work
        work.add_done_callback(lambda _: self.queue.put_nowait(None))

    def put(self, piece: str) -> None:
        self.unsent += len(piece)
        self.queue.put_nowait(piece)
        if self.unsent > MOST_UNSENT:
            self.work.cancel()

    async def get(self) -> str | None:
        """The next piece; None when there will be no more."""
        piece = await self.queue.get()
        self.unsent -= len(piece or "")
        return piece


class EventStream(Response):
    """Sends `first` and the pieces that follow, and what their `work` comes to. A comment every `ping_s` seconds keeps
    the connection open; whoever leaves gives the work up."""

    def __init__(self, request: Request, first: str | None, pieces: Pieces, ping_s: float):
        self.request, self.first, self.pieces, self.ping_s = request, first, pieces, ping_s
        self.background = None
        self.status_code = 200
        self.init_headers({"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(self.request, self._send(send))
        except ClientDisconnect:
            scope["log"]["status"] = CLIENT_LEFT
        finally:
            self.pieces.work.cancel()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events():
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[str]:
        piece, work = self.first, self.pieces.work
        while piece is not None:
            if piece:
                yield event({"delta": piece})
            try:
                async with asyncio.timeout(self.ping_s):
                    piece = await self.pieces.get()
            except TimeoutError:
                yield ": ping\n\n"
                piece = ""
        if work.cancelled():
            return
        error = work.exception()
        if error is None:
            yield event(work.result())
        elif isinstance(error, HttpError):
            yield event(error_body(error.status, error.code, error.message, error.param))
        else:
            number = self.request.scope["request_id"]
            message = f"the server failed; its log has the reason under request id {number}"
            yield event(error_body(500, "internal_error", message, None))
        yield "data: [DONE]\n\n"
        if error is not None and not isinstance(error, HttpError):
            raise error  # for the log


def event(content: dict) -> str:
    return f"data: {json.dumps(content)}\n\n"
