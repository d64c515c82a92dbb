"""Streamed answers as server-sent events.

    data: {"delta": "A cat"}                                 a piece of the text, one event a piece
    data: {"caption": "A cat on a sill.", "usage": ...}      the whole answer, as without `stream`; or {"error": ...}
    data: [DONE]

The status is 200 once the first byte is sent, so nothing is sent before the first piece exists, and a later failure is
an event of its own. sse-starlette is not used: it replaces `uvicorn.Server.handle_exit` on import and cuts every stream
at SIGTERM, where this server lets running answers finish.

Format: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import asyncio
import json
from collections.abc import AsyncIterator

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from mmllm.serving.http import CLIENT_CLOSED_REQUEST, HttpError, cancel_on_disconnect, internal_error


class EventStream(StreamingResponse):
    """Sends `first`, what `task` puts into `queue` until a None, then the task's result or error.

    While nothing arrives, a comment every `ping_s` seconds keeps the connection open. The task is cancelled when the
    client leaves.
    """

    def __init__(self, request: Request, task: asyncio.Task, queue: asyncio.Queue, first: str | None, ping_s: float):
        self.request, self.task, self.queue, self.first, self.ping_s = request, task, queue, first, ping_s
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._events(), headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await cancel_on_disconnect(self.request, self.stream_response(send))
        except ClientDisconnect:
            scope["log"]["status"] = CLIENT_CLOSED_REQUEST
        finally:
            self.task.cancel()

    async def _events(self) -> AsyncIterator[str]:
        text = self.first
        while text is not None:
            yield text
            try:
                async with asyncio.timeout(self.ping_s):
                    text = await self.queue.get()
            except TimeoutError:
                text = ": ping\n\n"
        error = self.task.exception()
        if error is not None:
            yield event((error if isinstance(error, HttpError) else internal_error(self.request)).body)
        elif self.task.result() is not None:
            yield event(self.task.result())
        yield "data: [DONE]\n\n"
        if error is not None and not isinstance(error, HttpError):
            raise error  # for the log


def event(content: dict) -> str:
    return f"data: {json.dumps(content)}\n\n"
