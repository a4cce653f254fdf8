"""A server in a process of its own: start it, find its URL, wait for what is to happen, see how it ends.

Its output lands in files, so that no pipe fills up. Nothing depends on how long anything takes.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

#: Only a test that would fail anyway waits this long.
PATIENCE_SECONDS = 300


class ServedProcess:
    """A running server.

    Args:
        folder: where its output goes.
        command: what to run; it logs "listening on URL" to standard error, as ``paceline serve`` does.
        environment: variables beside the inherited ones.
    """

    def __init__(self, folder: Path, command: Sequence[str], **environment: str) -> None:
        self.folder = folder
        with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
            self.child = subprocess.Popen(command, stdout=out, stderr=err, env=os.environ | environment)

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    @property
    def url(self) -> str:
        self.until(lambda: "listening on http" in self.err)
        return self.err.partition("listening on ")[2].partition(",")[0]  # in text and JSON alike

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something is so; it is a failure if the process ends before."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert self.child.poll() is None, f"the process ended: {self.err}"
            assert time.monotonic() < deadline, f"it never came: {self.err}"
            time.sleep(0.02)

    def status(self, path: str) -> int:
        return httpx.get(self.url + path).status_code

    def drained(self, sig: signal.Signals = signal.SIGTERM) -> None:
        """Send the first signal and wait until the process drains."""
        self.child.send_signal(sig)
        self.until(lambda: self.status("/ready") == 503)

    def ends(self) -> int:
        """The exit code, once it is there."""
        return self.child.wait(PATIENCE_SECONDS)

    def kill(self) -> None:
        self.child.kill()
        self.child.wait()


@contextmanager
def paceline_serve(folder: Path, *arguments: str) -> Iterator[ServedProcess]:
    """``paceline serve`` on a free port, ready; killed in the end if it still runs."""
    program = str(Path(sys.executable).with_name("paceline"))
    process = ServedProcess(folder, [program, "serve", "--port", "0", *arguments])
    try:
        process.until(lambda: "Try it" in process.out)
        yield process
    finally:
        process.kill()
