"""The OpenAI error shape: ``{"error": {"message", "type", "param", "code"}}`` for every failure there is.

Maps any exception to status, headers and body; the status table itself is ``server.errors.HTTP_ERRORS``. What
is our own fault (500) shows clients a request id and nothing else; the caller logs the traceback.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from paceline.server.errors import (
    AuthenticationError,
    PacelineError,
    QueueFullError,
    RequestError,
    UnavailableError,
    http_error,
)


@dataclass(frozen=True, slots=True)
class WireError:
    """An error as it goes out: HTTP status, JSON body and extra headers."""

    status: int
    body: dict[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)

    def response(self) -> JSONResponse:
        """The error as a complete HTTP response."""
        return JSONResponse(self.body, self.status, dict(self.headers))


def error_body(
    message: str, kind: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The one JSON shape of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def wire_error(error: Exception, request_id: str) -> WireError:
    """How ``error`` looks to the client; anything outside the exception tree is a 500 without internals."""
    if not isinstance(error, PacelineError):
        return _internal(request_id)
    http = http_error(error)
    if http.status >= 500 and not isinstance(error, UnavailableError):
        return _internal(request_id)
    param = error.param if isinstance(error, RequestError) else None
    code = error.code if isinstance(error, (RequestError, UnavailableError)) else None
    return WireError(http.status, error_body(str(error), http.type, param=param, code=code), _headers(error))


def wire_http_exception(error: HTTPException) -> WireError:
    """The framework's own refusals (unknown route, wrong method) in our shape."""
    return WireError(
        error.status_code, error_body(str(error.detail), "invalid_request_error"), error.headers or {}
    )


def _internal(request_id: str) -> WireError:
    message = f"The server failed while handling this request; tell its operator the request id {request_id}."
    return WireError(500, error_body(message, "server_error"))


def _headers(error: PacelineError) -> dict[str, str]:
    if isinstance(error, (QueueFullError, UnavailableError)):
        return {"retry-after": str(error.retry_after_seconds)}
    if isinstance(error, AuthenticationError):
        return {"www-authenticate": "Bearer"}
    return {}
