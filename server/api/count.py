"""Counts every response by endpoint and HTTP status: the outermost middleware, so that no refusal escapes it.

Endpoints are those of the router; whatever else is asked for counts as "other", so that nobody can make series by
asking for made-up paths. A failure inside a stream has status 200; ``vllm:request_success_total`` tells of those.
"""

from collections.abc import Collection
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paceline.server.metrics import Metrics

#: Counted from 0 on, as a rate needs the first of them.
_EXPECTED: Final = (200, 400, 429, 500, 503)


class CountResponses:
    """See the module's docstring.

    Args:
        endpoints: paths that get a label of their own; those below /v1/ start at zero.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, endpoints: Collection[str]) -> None:
        self._app, self._metrics, self._endpoints = app, metrics, endpoints
        for endpoint in endpoints:
            for status in _EXPECTED if endpoint.startswith("/v1/") else ():
                metrics.touch_responses(endpoint, status)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and look at how its response starts."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        endpoint = scope["path"] if scope["path"] in self._endpoints else "other"

        async def counted_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.on_response(endpoint, message["status"])
            await send(message)

        await self._app(scope, receive, counted_send)
