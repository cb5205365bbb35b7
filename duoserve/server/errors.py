"""Every failure as an HTTP status and a body in OpenAI's form."""

from __future__ import annotations

import logging
import math
from typing import Any

from duoserve.errors import ClosedError, DuoServeError, OverloadedError, RequestError

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}

log = logging.getLogger("duoserve.server")
UNFORESEEN = "internal"  # the code of errors that nobody foresaw


class ApiError(Exception):
    """A refusal or a failure that a client is told of. ``param`` names the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body, which is also that of an error event in a stream."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else TYPES[400])
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def bad(param: str | None, message: str) -> ApiError:
    """The 400 for a request that is wrong in the field ``param``."""
    return ApiError(400, message, param=param)


def unavailable(message: str) -> ApiError:
    """The 503 while the service is not there; a client may try again a little later."""
    return ApiError(503, message, code="unavailable", headers={"Retry-After": "5"})


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of ``error``; of an error that nobody foresaw, only that it happened."""
    match error:
        case ApiError():
            return error
        case RequestError():
            return bad(None, str(error))
        case OverloadedError():
            wait = str(max(1, math.ceil(error.retry_after_s)))
            return ApiError(429, str(error), code="overloaded", headers={"Retry-After": wait})
        case ClosedError():
            return unavailable(str(error))
        case DuoServeError():
            return ApiError(500, str(error), code="failed")
        case _:
            return ApiError(500, "the server failed; its log says how", code=UNFORESEEN)


def noted(error: Exception) -> ApiError:
    """As ``as_api_error``; logs a line if it is the server's fault, with a traceback if nobody foresaw it."""
    told = as_api_error(error)
    if told.status == 500:
        log.error("a request failed: %s", error, exc_info=error if told.code == UNFORESEEN else None)
    return told
