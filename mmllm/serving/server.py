"""uvicorn with what it lacks: a time limit for request headers, a bounded drain, an end when the model is dead.

`uvicorn serve:app` and gunicorn make a server of uvicorn's own class, in one process or several. It gets the same when
its application starts, which is before it listens.
"""

import asyncio
import logging
import math
import os
import signal
from functools import partial
from socket import socket
from types import FrameType
from uuid import uuid4

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import HANDLED_SIGNALS

from mmllm.errors import UserError
from mmllm.serving.http import HttpError
from mmllm.serving.settings import Settings

MAX_PIPELINED_BYTES = 64 * 1024
NEVER_RESTART = 3  # the exit code after which uvicorn and gunicorn end and start no other process


class DeadlineH11(H11Protocol):
    """uvicorn's HTTP protocol; ends a connection whose request header is not complete after `header_s` seconds, and one
    whose client has read too little of a response for `write_s` seconds."""

    def __init__(self, *, header_s: float, write_s: float, **settings: object):
        super().__init__(**settings)
        self.header_s, self.write_s = header_s, write_s

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.header_timer = self.loop.call_later(self.header_s, self.abort_if_idle)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.write_timer = self.loop.call_later(self.write_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.write_timer.cancel()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.is_idle():
            self.header_timer.cancel()
        # While a request is answered uvicorn stops reading at the first byte after it, and so would not see the client
        # leave. Such bytes (a pipelined request) wait here instead.
        if len(self.conn.trailing_data[0]) > MAX_PIPELINED_BYTES:
            self.transport.close()
        elif self.conn.their_state is h11.DONE:
            self.flow.resume_reading()

    def send_400_response(self, message: str) -> None:
        """Answers what is not HTTP in the shape of all errors; uvicorn would send plain text."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers = {"Connection": "close", "X-Request-ID": uuid4().hex}
            response = HttpError(400, "invalid_http", "the request is not valid HTTP", headers=headers).response()
            head = h11.Response(status_code=400, headers=response.raw_headers, reason=b"Bad Request")
            for event in (head, h11.Data(data=response.body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        self.transport.close()

    def on_response_complete(self) -> None:
        self.header_timer.cancel()
        self.header_timer = self.loop.call_later(self.header_s, self.abort_if_idle)
        super().on_response_complete()

    def connection_lost(self, error: Exception | None) -> None:
        self.header_timer.cancel()
        super().connection_lost(error)

    def is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def abort_if_idle(self) -> None:
        if self.is_idle():
            self.transport.abort()  # `close` would wait for a client that does not read the last response


class Server(uvicorn.Server):
    """Ends when the model is dead; after a signal, lets requests finish for `drain_s` seconds."""

    is_ours = False

    def __init__(self, app: Starlette, settings: Settings):
        super().__init__(uvicorn.Config(app, log_config=None, log_level="warning", proxy_headers=False))
        self.config.load()
        self.is_ours = True
        self.limit_(app, settings)

    def limit_(self, app: Starlette, settings: Settings) -> None:
        """Gives a server that does not yet listen its limits, and the model's worker to watch."""
        self.worker, self.drain_s = app.state.service.worker, settings.drain_s
        self.config.http_protocol_class = partial(
            DeadlineH11, header_s=settings.header_timeout_s, write_s=settings.body_timeout_s
        )
        self.config.ws_protocol_class = None
        self.config.encoded_headers = []  # the name of the server
        self.config.timeout_graceful_shutdown = math.ceil(settings.drain_s) + 5
        access = logging.getLogger("uvicorn.access")
        access.handlers, access.propagate = [], False  # a request has one log line, that of http.RequestLog

    async def on_tick(self, counter: int) -> bool:
        return self.worker.error is not None or await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains; the same signal again ends at once and without a word.

        After Ctrl-C a worker of uvicorn gets SIGINT from the terminal, then SIGTERM from its parent: that is one request.
        """
        if sig in self._captured_signals:
            os._exit(128 + sig)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        self.worker.is_draining = True
        asyncio.get_running_loop().call_later(self.drain_s, self.worker.stop)
        await super().shutdown(sockets)
        if self.worker.is_loading:
            os._exit(0)  # a load cannot be interrupted, and Python would wait for its thread
        if self.worker.error is not None and not self.is_ours:
            os._exit(NEVER_RESTART if self.worker.pipeline is None else 1)  # the next one would not load it either

    def serve_until_signal(self, listener: socket) -> int:
        """The exit code: 0 after SIGTERM; 2 (bad input) or 1 if the model could not be loaded or failed.

        Raises KeyboardInterrupt after SIGINT.
        """
        signal.signal(signal.SIGTERM, lambda sig, frame: None)  # uvicorn raises the signal again when it is done
        try:
            self.run(sockets=[listener])
        finally:
            self.worker.stop()
        if self.worker.error is None:
            return 0
        return 2 if isinstance(self.worker.error, UserError) else 1


def running_server() -> uvicorn.Server:
    """The server of this process, which waits for its application. UserError unless it is one of uvicorn."""
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if not isinstance(server, uvicorn.Server):
        raise UserError(
            "this server would wait for a request's header for ever; start `mmllm serve`, `uvicorn serve:app --workers 4` "
            "or `gunicorn serve:app -w 4 -k uvicorn.workers.UvicornWorker`"
        )
    return server


def workers_of(server: uvicorn.Server) -> int:
    """How many processes serve beside each other; gunicorn's number is known to its worker."""
    worker = getattr(server.config.callback_notify, "__self__", None)
    return server.config.workers if worker is None else worker.cfg.workers


def adopt_(server: uvicorn.Server, app: Starlette, settings: Settings) -> None:
    """Makes a `running_server` one of ours."""
    server.__class__ = Server
    server.limit_(app, settings)
    for sig in HANDLED_SIGNALS:
        signal.signal(sig, server.handle_exit)
