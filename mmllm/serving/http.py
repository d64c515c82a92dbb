"""What every request passes through, whichever endpoint it asks for: key, limits, parsing, errors, log.

The libraries below bound almost nothing: Starlette accepts form files of any size and reads an upload that broke off as
an empty form. So a body is read here, counted and under a time limit, and parsed only when it is complete.

Every error, from a wrong path to a bug, has one JSON shape: {"error": {"message", "type", "param", "code"}}.
"""

import asyncio
import hmac
import json
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from uuid import uuid4

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmllm.serving.settings import Settings

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
MB = 1_000_000
CHUNK = 64 * 1024  # of a form; between two of them other requests get their turn
MAX_FIELDS, MAX_FILES, MAX_FIELD_KB = 32, 8, 64
MAX_JSON_COMMAS = 20_000  # more than a message and the fields of a request can have
PROBES = ("/health", "/livez", "/metrics")  # asked every few seconds, so logged for debugging only
CLIENT_CLOSED_REQUEST = 499  # appears in the log only: there is no client to receive it
log = logging.getLogger("mmllm.serving")


class HttpError(Exception):
    """An answer that is an error: `message` is one sentence that says the remedy, `param` the field it is about."""

    def __init__(self, status: int, code: str, message: str, *, param: str | None = None, headers: dict | None = None):
        super().__init__(message)
        self.status, self.code, self.message, self.param, self.headers = status, code, message, param, headers

    @property
    def body(self) -> dict:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        content = json.dumps(self.body)  # ASCII: a lone surrogate from the client cannot break the response
        return Response(content, self.status, self.headers, media_type="application/json")


def internal_error(request: Request) -> HttpError:
    """What a client learns of a bug: the request id under which the log has the rest."""
    number = request.scope["request_id"]
    message = f"the server failed; its log has the reason under request id {number}"
    return HttpError(500, "internal_error", message, headers={"X-Request-ID": number})


async def on_http_error(request: Request, error: HttpError) -> Response:
    return error.response()


async def on_routing_error(request: Request, error: HTTPException) -> Response:
    path = request.url.path[:100]
    if error.status_code == 404:
        return HttpError(404, "not_found", f"there is no {path}; /docs lists what there is").response()
    message = f"{path} takes {error.headers['Allow']}, not {request.method[:20]}"
    return HttpError(405, "method_not_allowed", message, headers=error.headers).response()


async def on_disconnect(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def on_bug(request: Request, error: Exception) -> Response:
    """Starlette raises the exception again afterwards, which puts it into the log."""
    return internal_error(request).response()


EXCEPTION_HANDLERS = {
    HttpError: on_http_error,
    HTTPException: on_routing_error,
    ClientDisconnect: on_disconnect,
    Exception: on_bug,
}


class RequestLog:
    """ASGI middleware: gives each request an id and a JSON log line, counts it, and removes trailing slashes from its path.

    Handlers add to the line through `request.scope["log"]`. Prompts, images and file names are never logged.
    """

    def __init__(self, app: ASGIApp, count: Callable[[Scope, int, float], None]):
        self.app, self.count = app, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        scope["request_id"] = given if REQUEST_ID.fullmatch(given) else uuid4().hex
        scope["path"] = scope["path"].rstrip("/") or "/"
        scope["log"] = {}
        status, start = 500, time.perf_counter()
        app = self.app
        if "content-length" in headers and "transfer-encoding" in headers:  # a proxy may see another end of the body
            message = "the request has both Content-Length and Transfer-Encoding; send one of them"
            app = HttpError(400, "invalid_http", message, headers={"Connection": "close"}).response()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = scope["request_id"]
            await send(message)

        try:
            await app(scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - start
            line = {"id": scope["request_id"], "method": scope["method"][:20], "path": scope["path"][:100]}
            line |= {"status": status, "ms": round(1000 * seconds)} | scope["log"]
            self.count(scope, line["status"], seconds)
            log.log(logging.DEBUG if scope["path"] in PROBES else logging.INFO, json.dumps(line))


async def cancel_on_disconnect(request: Request, work: Awaitable[Response]) -> Response:
    """The result of `work`, which is cancelled if the client disconnects. The body must have been read before.

    Starlette itself lets a handler run on when its client has left.
    """

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def check_key(request: Request, key: str | None) -> None:
    given = request.headers.get("authorization", "").encode("latin-1")  # the bytes that were sent
    if key is not None and not hmac.compare_digest(given, b"Bearer " + os.fsencode(key)):
        message = "the API key is missing or wrong; send the header Authorization: Bearer KEY"
        raise HttpError(401, "invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"})


class BodyReader:
    """Reads bodies, each within limits of size and time, all that are being read within `max_reading_mb` together.

    Bytes are what is bounded, not connections: a client that sends slowly takes no place from others.
    """

    def __init__(self, settings: Settings):
        self.settings, self.held = settings, 0

    async def read(self, request: Request) -> bytes:
        """The complete body. A declared length above the limit is refused before a byte is read."""
        settings, body = self.settings, bytearray()
        self.check_size(int(request.headers.get("content-length", "0")))  # h11 accepts nothing but a number
        try:
            async with asyncio.timeout(settings.body_timeout_s):
                async for piece in request.stream():
                    body += piece
                    self.held += len(piece)
                    self.check_size(len(body))
                    if self.held > settings.max_reading_mb * MB:
                        message = "the server is reading too many other bodies; try again later"
                        raise HttpError(429, "overloaded", message, headers={"Retry-After": "1"})
        except TimeoutError:
            message = (
                f"the body was not complete after {settings.body_timeout_s:g} s; send it faster, or a smaller image"
            )
            raise HttpError(408, "request_timeout", message, headers={"Connection": "close"}) from None
        finally:
            self.held -= len(body)
        return bytes(body)

    def check_size(self, size: int) -> None:
        limit = self.settings.max_body_mb
        if size > limit * MB:
            message = f"the body has {size / MB:.1f} MB; the limit is {limit:g} MB (MMLLM_MAX_BODY_MB)"
            raise HttpError(413, "body_too_large", message)


def parse_json(request: Request, body: bytes) -> dict[str, object]:
    """The JSON object in the body."""
    kind = media_type(request)
    if kind != "application/json":
        message = f'Content-Type is {kind!r}; send JSON with -H "Content-Type: application/json"'
        raise HttpError(415, "unsupported_media_type", message)
    if body.count(b",") > MAX_JSON_COMMAS:  # parsing millions of values would hold the event loop for seconds
        raise HttpError(400, "invalid_json", "the body has more values than any request; see the API's fields")
    try:
        values = json.loads(body.decode(), parse_constant=int)  # a ValueError for NaN and Infinity
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise HttpError(400, "invalid_json", 'the body must be a JSON object in UTF-8, such as {"message": "Hello"}')
    return values


def media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()[:100]


class FormParser(MultiPartParser):
    """Starlette's parser, which keeps uploads in memory, knows a form that was cut off, and does not guess encodings."""

    spool_max_size = 0  # never to disk: the body is bounded already
    is_complete = False

    def on_part_end(self) -> None:
        if self._current_part.file is None:
            try:
                self._current_part.data.decode()
            except UnicodeDecodeError as error:  # Starlette would read it as Latin-1
                raise MultiPartException("not UTF-8") from error
        super().on_part_end()

    def on_end(self) -> None:
        self.is_complete = True


async def parse_form(request: Request, body: bytes) -> dict[str, object]:
    """The fields of a multipart/form-data body: str, bytes for a file, a list of them for a repeated field."""
    _, options = parse_options_header(request.headers.get("content-type", ""))
    if media_type(request) != "multipart/form-data" or options.get(b"charset", b"utf-8").lower() != b"utf-8":
        message = "send multipart/form-data in UTF-8 (curl -F does), or JSON to /chat"
        raise HttpError(415, "unsupported_media_type", message)
    if not options.get(b"boundary"):
        raise HttpError(400, "invalid_form", "Content-Type names no boundary; let the client library set this header")

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), CHUNK):
            yield body[start : start + CHUNK]
            await asyncio.sleep(0)

    limits = {"max_files": MAX_FILES, "max_fields": MAX_FIELDS, "max_part_size": MAX_FIELD_KB * 1024}
    parser = FormParser(request.headers, pieces(), **limits)
    try:
        form = await parser.parse()
    except MultiPartException:
        message = (
            f"the form is malformed, or has more than {MAX_FIELDS} fields, {MAX_FILES} files, "
            f"a text field above {MAX_FIELD_KB} kB or one that is not UTF-8"
        )
        raise HttpError(400, "invalid_form", message) from None
    fields: dict[str, list] = {}
    for name, value in form.multi_items():
        fields.setdefault(name, []).append(await value.read() if isinstance(value, UploadFile) else value)
    for file in parser._files_to_close_on_error:  # `form.close()` leaves out a file that was cut off
        file.close()
    if not parser.is_complete:
        raise HttpError(400, "truncated_form", "the upload ended before the closing boundary; send it again")
    return {name: values[0] if len(values) == 1 else values for name, values in fields.items()}
