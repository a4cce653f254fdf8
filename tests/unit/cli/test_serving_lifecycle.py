"""A served process from its port to its exit code: loading, draining, signals, failures.

The process is real (``paceline serve`` with a scripted engine); what happens when is decided here by creating
files, so nothing is timed.
"""

import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path

import httpx
import psutil
import pytest
from served_process import PATIENCE_SECONDS, ServedProcess

HERE = Path(__file__).parent


class Process(ServedProcess):
    """A running ``paceline serve`` over a scripted engine."""

    def __init__(self, folder: Path, arguments: tuple[str, ...], options: dict[str, object]) -> None:
        paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
        script = [sys.executable, str(HERE / "serving_process.py"), str(folder), json.dumps(options)]
        super().__init__(folder, [*script, *arguments], PYTHONPATH=os.pathsep.join(filter(None, paths)))

    def tell(self, name: str) -> None:
        (self.folder / name).touch()

    def ready(self) -> str:
        self.tell("load")
        self.until(lambda: self.status("/ready") == 200)
        return self.url


Start = Callable[..., Process]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Process] = []

    def start(*arguments: str, port: int = 0, **options: object) -> Process:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        started.append(Process(folder, ("--port", str(port), *arguments), options))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def ask(url: str, *, stream: bool = False) -> httpx.Response:
    body = {"model": "fake", "prompt": "x", "stream": stream}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_SECONDS)


@contextmanager
def running_stream(url: str) -> Iterator[Iterator[str]]:
    """A streamed completion that has begun and goes on until told to finish."""
    body = {"model": "fake", "prompt": "x", "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE_SECONDS) as response:
        lines = (line for line in response.iter_lines() if line)
        assert "begun" in next(lines)
        yield lines


def test_health_answers_while_loading_and_the_rest_is_503(start: Start) -> None:
    process = start()
    assert process.status("/health") == 200
    assert process.status("/ready") == 503
    refused = ask(process.url)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "loading"
    assert int(refused.headers["retry-after"]) > 0
    assert process.out == ""

    process.ready()
    process.until(lambda: "Try it" in process.out)
    url = process.url
    assert f"Paceline serves fake at {url}\n" in process.out
    assert f"curl {url}/v1/chat/completions" in process.out


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_drains(start: Start, sig: signal.Signals) -> None:
    process = start()
    url = process.ready()
    with running_stream(url) as lines:
        process.drained(sig)
        refused = ask(url)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        assert int(refused.headers["retry-after"]) > 0
        assert process.status("/health") == 200
        process.tell("finish")
        rest = list(lines)
    assert "ended" in rest[0]
    assert rest[-1] == "data: [DONE]"
    assert process.ends() == 0
    assert "Traceback" not in process.err


def test_a_signal_without_requests_ends_at_once(start: Start) -> None:
    process = start()
    process.ready()
    process.child.send_signal(signal.SIGTERM)
    assert process.ends() == 0


def test_running_requests_are_cut_when_drain_seconds_are_over(start: Start) -> None:
    process = start("--drain-seconds", "0.2")
    with running_stream(process.ready()) as lines:
        process.child.send_signal(signal.SIGTERM)
        rest = list(lines)
    assert not any("ended" in line for line in rest)
    assert json.loads(rest[0].removeprefix("data: "))["error"]["code"] == "stopped"
    assert process.ends() == 0
    assert "running requests are cut" in process.err


@pytest.mark.parametrize(("sig", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_second_signal_leaves_at_once(start: Start, sig: signal.Signals, code: int) -> None:
    process = start("--drain-seconds", "1000")
    with running_stream(process.ready()) as lines:
        process.drained()
        process.child.send_signal(sig)
        assert process.ends() == code
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)


def test_leaving_at_once_ends_the_engines_processes_too(start: Start) -> None:
    process = start("--drain-seconds", "1000", helper=True)
    with running_stream(process.ready()):
        helper = psutil.Process(int((process.folder / "helper").read_text()))
        process.drained()
        process.child.send_signal(signal.SIGTERM)
        assert process.ends() == 143
    gone, _ = psutil.wait_procs([helper], timeout=5)
    assert gone or helper.status() == psutil.STATUS_ZOMBIE  # where nobody collects orphans


def test_a_signal_while_loading_ends_it(start: Start) -> None:
    process = start()
    assert process.status("/health") == 200
    process.child.send_signal(signal.SIGTERM)
    assert process.ends() == 0


def test_a_load_error_is_one_line_and_exit_code_1(start: Start) -> None:
    process = start(load_error="user")
    process.tell("load")
    assert process.ends() == 1
    assert process.err.splitlines()[-1] == "paceline: model.gguf: the file is cut off; fetch it again"
    assert "Traceback" not in process.err


def test_a_bug_while_loading_shows_its_traceback(start: Start) -> None:
    process = start(load_error="crash")
    process.tell("load")
    assert process.ends() == 1
    assert "Traceback" in process.err
    assert process.err.splitlines()[-1] == "RuntimeError: a bug while loading"


def test_an_engine_that_fails_ends_the_process(start: Start) -> None:
    process = start()
    process.ready()
    process.tell("fail")
    assert process.ends() == 1
    assert "the engine failed" in process.err


def test_an_engine_that_fails_while_draining_ends_the_process(start: Start) -> None:
    process = start("--drain-seconds", "1000")
    with running_stream(process.ready()):
        process.drained()
        process.tell("fail")
        assert process.ends() == 1


def test_an_engine_that_does_not_stop_is_left_behind(start: Start) -> None:
    process = start(stop_hangs=True)
    process.ready()
    process.child.send_signal(signal.SIGTERM)
    assert process.ends() == 1
    assert "did not stop" in process.err


def test_a_port_in_use_is_one_line(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start(port=port)
        assert process.ends() == 1
    assert process.err == (
        f"paceline: cannot listen on 127.0.0.1 port {port}: the port is in use; "
        "stop what listens there or choose another --port\n"
    )


def test_an_unknown_host_is_one_line(start: Start) -> None:
    process = start("--host", "999.1.2.3.invalid")
    assert process.ends() == 1
    assert process.err.startswith("paceline: cannot listen on 999.1.2.3.invalid: ")
    assert len(process.err.splitlines()) == 1


def test_json_logs_are_one_object_per_line(start: Start) -> None:
    process = start("--json", "--api-key", "sesame")
    url = process.ready()
    httpx.get(f"{url}/health")
    process.child.send_signal(signal.SIGTERM)
    assert process.ends() == 0
    assert process.out == ""
    records = [json.loads(line) for line in process.err.splitlines()]
    assert all({"time", "level", "logger", "message"} <= record.keys() for record in records)
    assert next(record for record in records if record["message"] == "ready")["models"] == ["fake"]
    access = next(record for record in records if record.get("path") == "/health")
    assert (access["logger"], access["method"], access["status"]) == ("uvicorn.access", "GET", 200)
    assert "sesame" not in process.err


def test_an_idle_connection_outlives_the_clients_own_patience(start: Start) -> None:
    # httpx drops what was idle for 5 s: where both ends do so at the same moment, a request is lost between them.
    address = httpx.URL(start().ready())
    with closing(HTTPConnection(address.host, address.port, timeout=6.5)) as connection:
        connection.request("GET", "/health")
        connection.getresponse().read()
        with pytest.raises(TimeoutError):
            connection.sock.recv(1)  # empty where the server has closed
