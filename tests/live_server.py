"""A real uvicorn on a loopback port, in a thread: what streaming and disconnect tests need.

``httpx.ASGITransport`` collects a response before it returns it, and never hangs up.
"""

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

Hook = Callable[[], Awaitable[object]]


@contextmanager
def serve_in_thread(
    app: ASGIApp, *, startup: Hook | None = None, shutdown: Hook | None = None
) -> Iterator[str]:
    """Serve ``app`` and yield its base URL, such as ``http://127.0.0.1:41234``.

    Args:
        startup: awaited on the server's event loop before it listens, e.g. ``engine.start``.
        shutdown: awaited there after the last connection has closed, e.g. ``engine.stop``.
    """
    config = uvicorn.Config(app, log_config=None, ws="none", lifespan="on", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    failures: list[BaseException] = []

    async def run(listener: socket.socket) -> None:
        if startup is not None:
            await startup()
        await server.serve(sockets=[listener])
        if shutdown is not None:
            await shutdown()

    def guarded(listener: socket.socket) -> None:
        try:
            asyncio.run(run(listener))
        except BaseException as error:
            failures.append(error)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=guarded, args=(listener,), name="live-server", daemon=True)
        thread.start()
        try:
            # Connections queue up in the listening socket until uvicorn accepts: no need to poll for readiness.
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(timeout=30)
    assert not thread.is_alive(), "the server did not stop"
    if failures:
        raise failures[0]
