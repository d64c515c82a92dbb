"""What every request goes through, whatever it asks of the model: limits, fields, errors.

The surprising fact: the libraries below bound almost nothing on their own. Starlette's forms take files of any size and
read an upload that broke off as an empty form; uvicorn waits for ever for a header that never ends. So a body is read
here, counted, under a time limit, and parsed only when it is whole.

Every error, from a wrong path to a bug, is the same JSON: {"error": {"message", "type", "param", "code"}}.
Next: worker.py, sse.py, server.py.
"""

import asyncio
import difflib
import hmac
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Iterable
from uuid import uuid4

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
CHUNK = 64 * 1024  # the form parser takes a body in pieces 80 times faster than as one
MAX_FIELDS, MAX_FILES, MAX_FIELD_KB = 32, 8, 64
CLIENT_LEFT = 499  # for the log only: nobody is there to receive it
log = logging.getLogger("mmllm.serving")


class HttpError(Exception):
    """An answer that is an error; the message is one sentence that says the mend."""

    def __init__(self, status: int, code: str, message: str, *, param: str | None = None, headers: dict | None = None):
        super().__init__(message)
        self.status, self.code, self.message, self.param, self.headers = status, code, message, param, headers


def error_response(
    status: int, code: str, message: str, *, param: str | None = None, headers: dict | None = None
) -> Response:
    # ASCII: a client's lone surrogate in the message cannot break the answer
    body = json.dumps(error_body(status, code, message, param))
    return Response(body, status, headers, media_type="application/json")


def error_body(status: int, code: str, message: str, param: str | None) -> dict:
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def on_http_error(request: Request, error: HttpError) -> Response:
    return error_response(error.status, error.code, error.message, param=error.param, headers=error.headers)


async def on_routing_error(request: Request, error: HTTPException) -> Response:
    path = request.url.path[:100]
    if error.status_code == 404:
        return error_response(
            404, "not_found", f"there is no {path}; the API is /caption, /question, /chat and /health"
        )
    if error.status_code == 405:
        allowed = error.headers["Allow"]
        return error_response(
            405, "method_not_allowed", f"{path} takes {allowed}, not {request.method[:20]}", headers=error.headers
        )
    return error_response(error.status_code, "http_error", "the request is not valid HTTP", headers=error.headers)


async def on_disconnect(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=CLIENT_LEFT)


async def on_bug(request: Request, error: Exception) -> Response:
    """The client learns only where to point at: Starlette hands the exception on to the log."""
    number = request.scope["request_id"]
    message = f"the server failed; its log has the reason under request id {number}"
    return error_response(500, "internal_error", message, headers={"X-Request-ID": number})


EXCEPTION_HANDLERS = {
    HttpError: on_http_error,
    HTTPException: on_routing_error,
    ClientDisconnect: on_disconnect,
    Exception: on_bug,
}


class Envelope:
    """ASGI middleware: an id and a log line for each request; `/caption/` is `/caption`.

    Handlers may add to the line through `request.scope["log"]`. Never logged: prompts, pictures, file names.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        scope["request_id"] = given if REQUEST_ID.fullmatch(given) else uuid4().hex
        scope["path"] = scope["path"].rstrip("/") or "/"
        scope["log"] = {}
        status, start = 500, time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = scope["request_id"]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            line = {"id": scope["request_id"], "method": scope["method"][:20], "path": scope["path"][:100]}
            line |= {"status": status, "ms": round(1000 * (time.perf_counter() - start))}
            level = logging.DEBUG if scope["path"] == "/health" else logging.INFO  # probes come every few seconds
            log.log(level, json.dumps(line | scope["log"]))


async def unless_gone(request: Request, work: Awaitable[Response]) -> Response:
    """The response that `work` makes; when the client leaves it is cancelled. The body must have been read."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
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
    given = request.headers.get("authorization", "")
    if key and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
        message = "the API key is missing or wrong; send the header Authorization: Bearer KEY"
        raise HttpError(401, "invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"})


async def read_body(request: Request, limit_mb: float, timeout_s: float) -> bytes:
    """The whole body. A declared length above the limit is refused before a byte is read."""
    limit = int(limit_mb * 1_000_000)
    declared = int(request.headers.get("content-length", "0"))  # h11 has seen to it that this is a number
    if declared > limit:
        raise too_large(f"{declared / 1e6:.1f} MB", limit_mb)
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    raise too_large("larger", limit_mb)
    except TimeoutError:
        message = f"the body was not here after {timeout_s:g} s; send it faster, or a smaller picture"
        raise HttpError(408, "request_timeout", message, headers={"Connection": "close"}) from None
    return bytes(body)


def too_large(size: str, limit_mb: float) -> HttpError:
    return HttpError(413, "body_too_large", f"the body is {size}; the limit is {limit_mb:g} MB (MMLLM_MAX_BODY_MB)")


def parse_json(request: Request, body: bytes) -> dict[str, object]:
    """The JSON object in the body."""
    kind = media_type(request)
    if kind != "application/json":
        message = f'Content-Type is {kind!r}; send JSON with -H "Content-Type: application/json"'
        raise HttpError(415, "unsupported_media_type", message)
    try:
        values = json.loads(body.decode(), parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise HttpError(400, "invalid_json", 'the body must be a JSON object in UTF-8, such as {"message": "Hello"}')
    return values


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()[:100]


class FormParser(MultiPartParser):
    """Starlette's parser with uploads kept in memory: the body is bounded already."""

    spool_max_size = 0  # never to disk


async def parse_form(request: Request, body: bytes) -> dict[str, str | bytes]:
    """The fields of a multipart/form-data body; the content of a file is bytes. File names are never looked at."""
    _, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if media_type(request) != "multipart/form-data" or options.get(b"charset", b"utf-8").lower() != b"utf-8":
        message = "send multipart/form-data in UTF-8 (curl -F does), or JSON to /chat"
        raise HttpError(415, "unsupported_media_type", message)
    if not boundary:
        raise HttpError(400, "invalid_form", "Content-Type names no boundary; let the client library set this header")
    if b"--" + boundary + b"--" not in body:
        raise HttpError(400, "truncated_form", "the upload ended before the closing boundary; send it again")

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), CHUNK):
            yield body[start : start + CHUNK]

    limits = {"max_files": MAX_FILES, "max_fields": MAX_FIELDS, "max_part_size": MAX_FIELD_KB * 1024}
    try:
        form = await FormParser(request.headers, pieces(), **limits).parse()
    except MultiPartException:
        message = (
            f"the form is malformed, or has more than {MAX_FIELDS} fields, {MAX_FILES} files, "
            f"or a text field above {MAX_FIELD_KB} kB"
        )
        raise HttpError(400, "invalid_form", message) from None
    fields: dict[str, str | bytes] = {}
    try:
        for name, value in form.multi_items():
            if name in fields:
                code = "too_many_images" if name == "image" else "duplicate_field"
                raise HttpError(400, code, f"field {shown(name)} is there twice; send it once", param=name[:100])
            fields[name] = await value.read() if isinstance(value, UploadFile) else value
    finally:
        await form.close()
    return fields


def shown(value: object) -> str:
    """What a client sent, short enough for an error message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class Fields:
    """The fields of one request, each taken with its type and range; what is wrong is a 400 that names the field.

    In a form (`is_form`) numbers come as text; in JSON they are numbers, and null is the default.
    """

    def __init__(self, values: dict[str, object], known: Iterable[str], *, is_form: bool):
        self.values, self.is_form = values, is_form
        for name in values:
            if name not in (names := list(known)):
                near = difflib.get_close_matches(name[:100], names, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(names)}"
                raise HttpError(400, "unknown_field", f"unknown field {shown(name)}; {hint}", param=name[:100])

    def text(self, name: str, *, default: str | None = None, limit: int) -> str:
        """Text with something in it, at most `limit` characters; required when there is no `default`."""
        value = self._get(name, default)
        if value is None:
            raise HttpError(400, "missing_field", f"field {name} is missing", param=name)
        value = self._characters(name, value)
        if not value.strip():
            raise HttpError(400, "empty_message", f"{name} is empty; write something in it", param=name)
        if len(value) > limit:
            message = f"{name} has {len(value)} characters; the limit is {limit}"
            raise HttpError(400, "message_too_long", message, param=name)
        return value.strip()

    def characters(self, name: str) -> str | None:
        """Text as it is, or None."""
        value = self._get(name, None)
        return None if value is None else self._characters(name, value)

    def file(self, name: str) -> bytes:
        """The content of a file that a form must hold."""
        if name not in self.values:
            raise HttpError(400, "missing_field", f'no {name} in the form; send -F "{name}=@file.jpg"', param=name)
        if not isinstance(self.values[name], bytes):
            message = f'{name} came as text, not as a file; with curl put an @ before the path: -F "{name}=@file.jpg"'
            raise HttpError(400, "not_a_file", message, param=name)
        return self.values[name]

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        value = self._get(name, default)
        if self.is_form and isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,20}", value):
            value = int(value)
        if type(value) is not int or not low <= value <= high:
            raise self._wrong(name, f"a whole number between {low} and {high}")
        return value

    def number(self, name: str, default: float, high: float, *, is_zero_allowed: bool) -> float:
        """A number from 0 to `high`."""
        value = self._get(name, default)
        if self.is_form and isinstance(value, str) and re.fullmatch(r"[+-]?[0-9.]{1,20}(e[+-]?[0-9]{1,3})?", value):
            value = float_or_none(value)
        if type(value) not in (int, float) or not 0 <= value <= high or (value == 0 and not is_zero_allowed):
            raise self._wrong(name, f"a number {'from' if is_zero_allowed else 'above'} 0 up to {high:g}")
        return float(value)

    def strings(self, name: str, most: int, limit: int) -> tuple[str, ...]:
        """One text or a list of them, none empty, each at most `limit` characters."""
        value = self._get(name, [])
        texts = [value] if isinstance(value, str) else value
        is_right = isinstance(texts, list) and len(texts) <= most and all(isinstance(text, str) for text in texts)
        if not is_right or not all(0 < len(text) <= limit for text in texts):
            raise self._wrong(name, f"text, or a list of at most {most} texts, each of 1 to {limit} characters")
        return tuple(self._characters(name, text) for text in texts)

    def flag(self, name: str) -> bool:
        value = self._get(name, False)
        if self.is_form and value in ("true", "false"):
            value = value == "true"
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def _get(self, name: str, default: object) -> object:
        value = self.values.get(name)
        return default if value is None else value

    def _characters(self, name: str, value: object) -> str:
        if not isinstance(value, str):
            raise self._wrong(name, "text")
        try:
            value.encode()
        except UnicodeEncodeError:
            message = f"{name} holds half of a surrogate pair, which is no character; send whole characters"
            raise HttpError(400, "invalid_unicode", message, param=name) from None
        return value

    def _wrong(self, name: str, wanted: str) -> HttpError:
        value = self.values[name]
        found = "a file" if isinstance(value, bytes) else shown(value)
        return HttpError(400, "invalid_value", f"{name} is {found}; it must be {wanted}", param=name)


def float_or_none(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


class DeadlineH11(H11Protocol):
    """uvicorn's protocol, closing a connection that has not brought a whole request header after `header_timeout_s`."""

    def __init__(self, *, header_timeout_s: float, **settings: object):
        super().__init__(**settings)
        self.header_timeout_s = header_timeout_s

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.header_timer = self.loop.call_later(self.header_timeout_s, self.close_if_idle)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.is_idle():
            self.header_timer.cancel()

    def on_response_complete(self) -> None:
        self.header_timer.cancel()
        self.header_timer = self.loop.call_later(self.header_timeout_s, self.close_if_idle)
        super().on_response_complete()

    def connection_lost(self, error: Exception | None) -> None:
        self.header_timer.cancel()
        super().connection_lost(error)

    def is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def close_if_idle(self) -> None:
        if self.is_idle():
            self.transport.close()
