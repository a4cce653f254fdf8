"""A scripted OpenAI-compatible server on loopback: a test decides each reply and sees each request.

Plain ``http.server`` with one thread per connection, so that real sockets, chunked streams, delays and broken
connections are exercised. ``with ScriptedServer(script) as server`` ; ``script(call)`` returns a ``Reply``.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True)
class Call:
    """One request as it arrived; ``number`` counts from 0 over the server's life."""

    number: int
    path: str
    headers: Mapping[str, str]
    body: Any


@dataclass(frozen=True)
class Reply:
    """What to answer: ``body`` as JSON, or ``events`` as server-sent events (then ``done`` adds ``[DONE]``).

    Attributes:
        delay_s: pause before every event.
        cut: close the connection after the last event, in the middle of the chunked stream.
    """

    body: Any = None
    status: int = 200
    events: Sequence[Any] | None = None
    delay_s: float = 0.0
    done: bool = True
    cut: bool = False


Script = Callable[[Call], Reply]


@dataclass
class ScriptedServer:
    """Serves until the ``with`` block ends; ``peak`` is the most POST requests in progress at once.

    ``port`` 0 takes a free one.
    """

    script: Script
    port: int = 0
    calls: list[Call] = field(default_factory=list)
    in_progress: int = 0
    peak: int = 0

    def __enter__(self) -> Self:
        self._lock = threading.Lock()
        self._http = _QuietServer(("127.0.0.1", self.port), _handler(self))
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """Address without ``/v1``."""
        return f"http://127.0.0.1:{self._http.server_port}"

    @property
    def posts(self) -> list[Call]:
        """The calls that carried a body."""
        return [call for call in self.calls if call.body is not None]

    def begin(self, path: str, headers: Mapping[str, str], body: Any) -> Call:
        """Record a request that has arrived."""
        with self._lock:
            call = Call(len(self.calls), path, dict(headers), body)
            self.calls.append(call)
            self.in_progress += body is not None
            self.peak = max(self.peak, self.in_progress)
            return call

    def end(self, call: Call) -> None:
        """Record that its reply is about to be completed."""
        with self._lock:
            self.in_progress -= call.body is not None


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True  # A client may keep an idle connection open; it must not hold up the end of a test.

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is part of some tests; nothing to print."""


def _handler(owner: ScriptedServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # The last bytes of a reply must not wait for an acknowledgement of the bytes before.
        disable_nagle_algorithm = True

        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: Any) -> None:
            call = owner.begin(self.path, dict(self.headers.items()), body)
            reply = owner.script(call)
            self.send_response(reply.status)
            if reply.events is None:
                payload = json.dumps(reply.body).encode()
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                owner.end(call)
                self.wfile.write(payload)
            else:
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self._stream(call, reply)

        def _stream(self, call: Call, reply: Reply) -> None:
            for event in reply.events or ():
                time.sleep(reply.delay_s)
                self._chunk(event if isinstance(event, bytes) else b"data: " + json.dumps(event).encode())
            owner.end(call)
            if reply.cut:
                self.close_connection = True
                return
            if reply.done:
                self._chunk(b"data: [DONE]")
            self.wfile.write(b"0\r\n\r\n")

        def _chunk(self, line: bytes) -> None:
            payload = line + b"\n\n"
            self.wfile.write(f"{len(payload):x}\r\n".encode() + payload + b"\r\n")
            self.wfile.flush()

    return Handler
