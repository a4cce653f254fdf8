"""API keys: ``Authorization: Bearer KEY`` against the configured keys, in constant time.

Pure ASGI middleware. What an orchestrator or a scraper polls stays open: it tells nothing about prompts.
"""

import hmac
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from paceline.server.api.settings import ApiSettings
from paceline.server.errors import AuthenticationError

OPEN_PATHS: Final = frozenset({"/health", "/ready", "/metrics", "/version"})


class RequireKey:
    """Refuses requests without a valid key; does nothing when no ``api_keys`` are configured."""

    def __init__(self, app: ASGIApp, settings: ApiSettings) -> None:
        self._app = app
        keys = settings.api_keys + settings.admin_keys if settings.api_keys else ()
        self._keys = tuple(key.encode() for key in keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the key, then pass the request on."""
        if scope["type"] == "http" and self._keys and scope["path"] not in OPEN_PATHS:
            self._check(Headers(scope=scope).get("authorization", ""))
        await self._app(scope, receive, send)

    def _check(self, authorization: str) -> None:
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise AuthenticationError(
                "This server needs an API key; send it as 'Authorization: Bearer KEY'.",
                code="missing_api_key",
            )
        # Headers arrive decoded as latin-1. Every key is compared, so that time tells nothing about any.
        given = key.strip().encode("latin-1")
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        if not any(matches):
            raise AuthenticationError("The API key is not known to this server.", code="invalid_api_key")
