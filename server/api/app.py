"""The ASGI application: endpoints, middleware in their order, and the OpenAI error shape for every failure.

Owns nothing that has to be started or stopped: the engine belongs to whoever serves the app, and may still be
loading while the app answers.
"""

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.routing import Route

from paceline.server.api.auth import RequireKey
from paceline.server.api.body import BodyParser
from paceline.server.api.count import CountResponses
from paceline.server.api.errors import wire_http_exception
from paceline.server.api.middleware import BodyLimit, ErrorBoundary
from paceline.server.api.routes import Services, router
from paceline.server.api.settings import ApiSettings
from paceline.server.engine.interface import AsyncEngine
from paceline.server.metrics import Metrics


def create_app(engine: AsyncEngine, settings: ApiSettings, metrics: Metrics) -> FastAPI:
    """The HTTP API over ``engine``; ``metrics`` is attached to it.

    Exceptions of our tree travel up to ``ErrorBoundary``, which also answers for whatever nobody expected; only
    ``CountResponses`` is further out. The interactive documentation is off: it would load scripts from another host.
    """
    metrics.attach(engine)
    app = FastAPI(
        title="Paceline",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        middleware=[
            Middleware(CountResponses, metrics=metrics, endpoints=_endpoints()),
            Middleware(ErrorBoundary),
            Middleware(RequireKey, settings=settings),
            Middleware(BodyLimit, max_body_bytes=settings.max_body_bytes),
        ],
        exception_handlers={HTTPException: _on_http_exception},
    )
    app.state.services = Services(engine, settings, metrics, BodyParser(settings.allow_unknown_fields))
    app.include_router(router)
    return app


def _endpoints() -> frozenset[str]:
    """Paths of the router that name one thing; those with a part that clients choose are left out."""
    paths = (route.path for route in router.routes if isinstance(route, Route))
    return frozenset(path for path in paths if "{" not in path)


async def _on_http_exception(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return wire_http_exception(error).response()
