"""The ASGI application: paths, errors, the key."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from duoserve.errors import DuoServeError
from duoserve.server.endpoints import Endpoints
from duoserve.server.errors import ApiError, as_api_error, noted
from duoserve.server.host import ServiceLoader
from duoserve.server.http import ClientGone, HeaderLimit, HostGuard, KeyGuard, error_response
from duoserve.server.settings import ServerSettings

CLIENT_GONE = 499  # nginx's status for logs; no client reads it


def make_app(loader: ServiceLoader, settings: ServerSettings) -> Starlette:
    """The application over ``loader``, which the caller starts and closes."""
    to = Endpoints(loader, settings)
    routes = [
        Route("/health", to.health),
        Route("/v1/models", to.models),
        Route("/v1/models/{name:path}", to.model),
        Route("/v1/completions", to.completions, methods=["POST"]),
        Route("/v1/chat/completions", to.chat, methods=["POST"]),
        Route("/tokenize", to.tokenize, methods=["POST"]),
        Route("/metrics", to.metrics),
        Route("/version", to.version),
        Route("/status", to.status),
        Route("/", to.page),
    ]
    guards = [Middleware(HeaderLimit, max_bytes=settings.max_header_bytes)]
    if settings.allowed_hosts:
        guards.append(Middleware(HostGuard, names=settings.allowed_hosts))
    if settings.api_key is not None:
        guards.append(Middleware(KeyGuard, key=settings.api_key))
    handlers = dict.fromkeys((ApiError, DuoServeError), _failed)
    handlers |= {HTTPException: _no_such_path, ClientGone: _nobody_there, Exception: _unforeseen}
    return Starlette(routes=routes, middleware=guards, exception_handlers=handlers)


async def _failed(request: Request, error: Exception) -> Response:
    return error_response(noted(error))


async def _unforeseen(request: Request, error: Exception) -> Response:
    """Answers an error that nobody foresaw; the error itself then goes on to uvicorn, which logs it."""
    return error_response(as_api_error(error))


async def _no_such_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return error_response(ApiError(error.status_code, message, headers=dict(error.headers or {})))


async def _nobody_there(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)
