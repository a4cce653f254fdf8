"""Pure ASGI middleware: request ids, the last catch for errors, and the body limit.

Pure ASGI, because wrapping middleware that re-streams bodies hides ``http.disconnect`` and delays chunks.
From the outside in: ``count.CountResponses``, ``ErrorBoundary``, ``auth.RequireKey``, ``BodyLimit``, router.
"""

import logging
import re
from typing import Final
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paceline.server.api.disconnect import ClientGone
from paceline.server.api.errors import wire_error
from paceline.server.errors import PacelineError, PayloadTooLargeError

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER: Final = "x-request-id"
_SANE_REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")


def request_id_of(scope: Scope) -> str:
    """The id that ``ErrorBoundary`` gave this request."""
    request_id: str = scope["state"]["request_id"]
    return request_id


class ErrorBoundary:
    """Puts ``x-request-id`` on every response and turns every exception into the OpenAI error shape."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on under this layer's watch."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _choose_request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def tagged_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, tagged_send)
        except (ClientGone, ClientDisconnect):
            logger.debug("client of request %s hung up", request_id)
        except Exception as error:
            log_failure(error, request_id)
            if (
                started
            ):  # Too late for a status: the server closes the connection, so the client sees the cut.
                raise
            await wire_error(error, request_id).response()(scope, receive, tagged_send)


def log_failure(error: Exception, request_id: str) -> None:
    """Log our own faults with their traceback; what a client did wrong is the client's to know."""
    wire = wire_error(error, request_id)
    if wire.status >= 500 and not (isinstance(error, PacelineError) and wire.status == 503):
        logger.error("request %s failed", request_id, exc_info=error)


class BodyLimit:
    """Refuses request bodies over ``max_body_bytes``, by their declared length or while they arrive."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on under this layer's watch."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        self._check(int(declared) if declared.isdigit() else 0)
        received_bytes = 0

        async def counted_receive() -> Message:
            nonlocal received_bytes
            message = await receive()
            received_bytes += len(message.get("body", b""))
            self._check(received_bytes)
            return message

        await self._app(scope, counted_receive, send)

    def _check(self, size_bytes: int) -> None:
        if size_bytes > self._max_body_bytes:
            raise PayloadTooLargeError(
                f"The request body is larger than this server's limit of {self._max_body_bytes} bytes; "
                "send less in one request.",
                code="payload_too_large",
            )


def _choose_request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
    return given if _SANE_REQUEST_ID.fullmatch(given) else f"req_{uuid4().hex}"
