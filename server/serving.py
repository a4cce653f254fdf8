"""The life of one server process: listen, load, serve, drain, exit.

Owns the listening socket, uvicorn and the signals; knows the engine only through ``AsyncEngine``. The port
is bound before anything heavy happens and HTTP runs while the models load, so ``/health`` answers early.
The first SIGTERM or SIGINT drains (new requests get 503, running ones may finish), the second leaves at once.
Times are in seconds.
"""

import asyncio
import errno
import json
import logging
import multiprocessing
import os
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from starlette.types import ASGIApp

from paceline.server.config import PacelineConfig, ServerConfig, resolve
from paceline.server.engine.interface import AsyncEngine
from paceline.server.errors import UserError
from paceline.server.log import configure_logging

if TYPE_CHECKING:
    from paceline.server.metrics import Metrics

logger = logging.getLogger(__name__)

#: How long answers may still flow to clients once the engine has nothing left to do.
FLUSH_SECONDS = 5
#: How long an idle connection stays open: longer than clients (httpx: 5) and proxies (nginx: 60) keep theirs, so that
#: the end that may still send a request is the one that closes.
KEEP_ALIVE_SECONDS = 75
#: How long the engine may take to stop before the process leaves without it.
STOP_SECONDS = 10.0

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(config: PacelineConfig) -> int:
    """Serve until told to stop; returns the process's exit code.

    Raises:
        UserError: the port cannot be had, or a model cannot be loaded.
    """
    configure_logging(config.server.log_format)
    with listen(config.server.host, config.server.port) as listener:
        from paceline.server.api.app import create_app
        from paceline.server.api.settings import ApiSettings
        from paceline.server.metrics import Metrics

        config = resolve(config)
        metrics = Metrics()
        engine = _engine(config, metrics)
        settings = ApiSettings(
            api_keys=config.server.api_keys,
            admin_keys=config.server.admin_keys,
            allow_unknown_fields=config.server.allow_unknown_fields,
        )
        return run(create_app(engine, settings, metrics), engine, config.server, listener)


def _engine(config: PacelineConfig, metrics: "Metrics") -> AsyncEngine:
    """The engine that the configuration names; nothing of the other is imported."""
    if config.engine.kind == "vllm":
        from paceline.server.backends.vllm.build import build_vllm

        return build_vllm(config, metrics)
    from paceline.server.engine.build import build_engine

    return build_engine(config, metrics)


def run(app: ASGIApp, engine: AsyncEngine, config: ServerConfig, listener: socket.socket) -> int:
    """Serve ``app`` on ``listener`` while ``engine`` loads, runs and drains; returns the exit code.

    Raises:
        UserError: a model cannot be loaded.
    """
    supervisor = Supervisor(app, engine, config, listener)
    supervisor.run(sockets=[listener])
    if supervisor.error is not None:
        raise supervisor.error
    return supervisor.exit_code


def listen(host: str, port: int) -> socket.socket:
    """A listening socket on ``host``; IPv4 is preferred where a name has both, ``::`` takes both.

    Raises:
        UserError: the address is taken, unknown or not allowed.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
        both = host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address, family=family, backlog=2048, dualstack_ipv6=both)
    except socket.gaierror as error:
        raise UserError(f"cannot listen on {host}: {error.strerror}; choose another --host") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reason = "the port is in use; stop what listens there or choose another --port"
        else:
            reason = f"{os.strerror(error.errno or 0)}; choose another --host or --port"
        raise UserError(f"cannot listen on {host} port {port}: {reason}") from None


class Supervisor(uvicorn.Server):
    """uvicorn with the engine's life tied to its own.

    A signal only counts; ``on_tick`` (ten times a second, on the event loop) acts on it and on what became of
    the engine. ``error`` is what loading raised, to be raised again once the server is down.
    """

    def __init__(
        self, app: ASGIApp, engine: AsyncEngine, config: ServerConfig, listener: socket.socket
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                lifespan="on",
                ws="none",
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=FLUSH_SECONDS,
            )
        )
        self.error: BaseException | None = None
        self.exit_code = 0
        self._engine = engine
        self._server = config
        self._listener = listener
        self._signals = 0
        self._loading: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[bool] | None = None

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Route SIGINT and SIGTERM to ``handle_exit``; unlike uvicorn, raise nothing again later."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. Second: leave at once, whatever the event loop or the engine are doing."""
        self._signals += 1
        if self._signals > 1:
            _leave(128 + sig)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start answering HTTP, then begin to load."""
        await super().startup(sockets)
        self._loading = asyncio.create_task(self._load())

    async def on_tick(self, counter: int) -> bool:
        """True when the server is to go down."""
        return await super().on_tick(counter) or self._is_over()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the connections and stop the engine."""
        assert self._loading is not None
        if self._loading.cancelled():  # the thread that loads cannot be stopped, so leave without it
            await super().shutdown(sockets)
            _leave(self.exit_code)
        drained = self._draining is not None and self._draining.done() and self._draining.result()
        if not drained:  # running requests must end first, or their connections would never close
            await self._stop_engine()
        await super().shutdown(sockets)
        if drained:
            await self._stop_engine()

    def _is_over(self) -> bool:
        assert self._loading is not None
        if self._loading.done() and not self._loading.cancelled():
            self.error = self._loading.exception()
            if self.error is not None:
                return True
            if self._engine.state == "failed":
                logger.error("the engine failed; stopping")
                self.exit_code = 1
                return True
        if self._signals and self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        return self._draining is not None and self._draining.done()

    async def _load(self) -> None:
        logger.info("listening on %s, loading the models", _url(self._listener))
        await self._engine.start()
        self._announce()

    async def _drain(self) -> bool:
        """Whether every running request has finished in time."""
        assert self._loading is not None
        if not self._loading.done():
            logger.info("stopping while loading")
            self._loading.cancel()
            return False
        running = sum(load.running + load.waiting for load in self._engine.loads().values())
        logger.info("draining: %d running or waiting, new requests get 503", running)
        finished = await self._engine.drain(self._server.drain_seconds)
        if not finished:
            logger.warning(
                "drain_seconds (%g) are over; running requests are cut", self._server.drain_seconds
            )
        return finished

    async def _stop_engine(self) -> None:
        try:
            await asyncio.wait_for(self._engine.stop(), STOP_SECONDS)
        except TimeoutError:
            logger.error("the engine did not stop within %g seconds; leaving without it", STOP_SECONDS)
            _leave(self.exit_code or 1)

    def _announce(self) -> None:
        url = _url(self._listener)
        names = list(self._engine.models)
        if self._server.log_format == "json":
            logger.info("ready", extra={"data": {"url": url, "models": names}})
            return
        command = _curl(url, self._engine, keyed=bool(self._server.api_keys))
        sys.stdout.write(f"Paceline serves {', '.join(names)} at {url}\nTry it:\n  {command}\n")
        sys.stdout.flush()


def _leave(code: int) -> None:
    """End the process at once, and the processes that its engine may have: they would live on without it."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def _url(listener: socket.socket) -> str:
    """Where this machine reaches the server; a wildcard address becomes the loopback one."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _curl(url: str, engine: AsyncEngine, *, keyed: bool) -> str:
    """A command line that asks the first model something."""
    name, model = next(iter(engine.models.items()))
    question = "What is the capital of France?"
    path, asked = "completions", dict[str, object](prompt=question)
    if model.tokenizer.has_chat_template:
        path, asked = "chat/completions", {"messages": [{"role": "user", "content": question}]}
    body = {"model": name, **asked, "temperature": 0, "max_tokens": 64}
    key = ' -H "Authorization: Bearer $PACELINE_API_KEY"' if keyed else ""
    data = shlex.quote(json.dumps(body))
    return f"curl {url}/v1/{path} -H 'Content-Type: application/json'{key} -d {data}"
