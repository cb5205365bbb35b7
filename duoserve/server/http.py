"""HTTP: bounded bodies, JSON, answers that end when the client goes away, checks of host and key."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator, Mapping
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from duoserve.server.errors import ApiError
from duoserve.server.fields import BodyFields, parse_object, shown
from duoserve.server.sse import HEADERS

OPEN_PATHS = {"/health"}
PAGE_PATHS = {"/", "/status"}  # for browsers, which can send a key as a password, and not as a token
BODY_SECONDS = 30.0
DISCARDED = 16 << 20  # bytes
SLICE = 4096  # numbers, which are written in less than a millisecond
Result = TypeVar("Result")


class ClientGone(Exception):
    """The client has gone away and does not wait for the answer."""


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response of JSON in ASCII, so that half a surrogate pair in a request can be repeated in the answer."""
    return Response(json.dumps(body), status, headers, "application/json")


async def large_json_response(body: Any) -> Response:
    """As ``json_response``, written by a thread while the event loop goes on; iterators in ``body`` count as lists."""
    return Response(await asyncio.to_thread(json_in_parts, body), media_type="application/json")


def json_in_parts(value: Any, depth: int = 5) -> str:
    """What ``json.dumps`` gives, by one call for each value down to ``depth``, as no other thread runs during a call.

    Of token ids, of which there are many more, one call writes SLICE.
    Down to ``depth`` an iterator counts as a list, whose items exist only while they are written.
    """
    if depth and isinstance(value, dict):
        items = (f"{json.dumps(name)}: {json_in_parts(one, depth - 1)}" for name, one in value.items())
        return "{" + ", ".join(items) + "}"
    if depth and isinstance(value, list) and value and isinstance(value[0], int):
        slices = (value[begin : begin + SLICE] for begin in range(0, len(value), SLICE))
        return "[" + ", ".join(json.dumps(one)[1:-1] for one in slices) + "]"
    if depth and isinstance(value, (list, Iterator)):
        return "[" + ", ".join(json_in_parts(one, depth - 1) for one in value) + "]"
    return json.dumps(value)


def error_response(error: ApiError) -> Response:
    """An error as its own response."""
    return json_response(error.body, error.status, error.headers)


async def read_fields(request: Request, max_bytes: int) -> BodyFields:
    """The JSON object in the body.

    Raises a 415 without its content type, a 413 above ``max_bytes``, a 408 if it takes long, and ClientGone if the body
    is cut off.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body must be JSON, with Content-Type: application/json")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return BodyFields(parse_object(await _body(request, max_bytes)))
    except ClientDisconnect as error:
        raise ClientGone from error
    except TimeoutError as error:
        raise ApiError(408, f"the body did not come within {BODY_SECONDS:g} s") from error


async def _body(request: Request, max_bytes: int) -> bytes:
    """The body of a request; raises a 413 if it is too large.

    DISCARDED bytes beyond the limit are read all the same: a client that still writes when the connection is closed
    sees a reset instead of the answer.
    """
    announced = request.headers.get("content-length", "0")
    body, size = bytearray(), 0
    if announced.isdecimal() and int(announced) <= max_bytes + DISCARDED:
        async for part in request.stream():
            size += len(part)
            if size <= max_bytes:
                body += part
            elif size > max_bytes + DISCARDED:
                break
        if size <= max_bytes:
            return bytes(body)
    raise ApiError(413, f"the body is larger than {max_bytes} bytes", headers={"Connection": "close"})


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of ``work``. If the client goes away, cancels it and raises ClientGone."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventResponse:
    """Sends server-sent events while the client listens; ``close`` is called however that ends."""

    def __init__(self, frames: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        self._frames = frames
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application that it is."""
        try:
            await unless_gone(receive, self._send(send))
        except ClientGone:
            pass
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        headers = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for frame in self._frames:
            await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


class HeaderLimit:
    """Refuses headers above ``max_bytes``; the parser only bounds headers that come in pieces."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application that it is."""
        size = sum(len(name) + len(value) for name, value in scope.get("headers", ()))
        if size <= self._max_bytes:
            await self._app(scope, receive, send)
            return
        error = ApiError(431, f"the headers have {size} bytes, more than {self._max_bytes}")
        await error_response(error)(scope, receive, send)


class HostGuard:
    """Lets requests through whose host is one of ``names``, whatever the port, and all requests to OPEN_PATHS."""

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self._app = app
        self._names = {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application that it is."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        asked = Headers(scope=scope).get("host", "")
        if _without_port(asked).lower() in self._names:
            await self._app(scope, receive, send)
            return
        error = ApiError(421, f"the host {shown(asked)} is not served here: see --allowed-hosts", code="wrong_host")
        await error_response(error)(scope, receive, send)


def _without_port(host: str) -> str:
    """A host without its port; the address in ``[::1]:80`` has colons of its own."""
    return host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]


class KeyGuard:
    """Lets requests through that have the key, and all requests to OPEN_PATHS.

    The key comes as a bearer token or, from browsers, as a password.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application that it is."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._knows(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        scheme = 'Basic realm="duoserve", charset="UTF-8"' if scope["path"] in PAGE_PATHS else "Bearer"
        error = ApiError(
            401, "the API key is missing or wrong", code="invalid_api_key", headers={"WWW-Authenticate": scheme}
        )
        await error_response(error)(scope, receive, send)

    def _knows(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        offered = given.encode("latin-1").strip()  # as bytes: text would lose two that are white space in Latin-1
        if scheme.lower() == "basic":
            offered = _password(offered)
        return scheme.lower() in {"basic", "bearer"} and hmac.compare_digest(offered, self._key)


def _password(credentials: bytes) -> bytes:
    try:
        return base64.b64decode(credentials, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""
