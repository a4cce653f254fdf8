"""A blocking client straight into an ASGI app, for tests that need no streaming and no hang-ups."""

import asyncio
from typing import Any

import httpx
from starlette.types import ASGIApp


class AsgiClient:
    """``get``, ``post`` and ``request`` with httpx's arguments; every call runs on an event loop of its own."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    def request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        return asyncio.run(self._request(method, path, **kwargs))

    def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return self.request("GET", path, **kwargs)

    def post(self, path: str, json: Any = None, **kwargs: Any) -> httpx.Response:
        return (
            self.request("POST", path, json=json, **kwargs)
            if json is not None
            else self.request("POST", path, **kwargs)
        )

    async def _request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        transport = httpx.ASGITransport(app=self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **kwargs)


def assert_openai_error(response: httpx.Response, status: int, **expected: str | None) -> dict[str, Any]:
    """Check status, shape and request id of an error response; returns the ``error`` object."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert all(error[key] is None or isinstance(error[key], str) for key in ("param", "code"))
    assert response.headers["x-request-id"]
    assert {key: error[key] for key in expected} == expected, error
    return error
