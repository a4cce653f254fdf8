"""A server process around a scripted engine, steered from outside by files in a folder; run as a script.

``load``: loading ends. ``finish``: running requests end. ``fail``: the engine has failed. Nothing depends on
how long anything takes. Arguments: the folder, ``Options`` as JSON, further arguments of ``paceline serve``.
"""

import asyncio
import json
import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from fake_engine import FakeEngine, Scripted, event

from paceline.clients.console import main
from paceline.server import serving
from paceline.server.engine.interface import EngineState, EventStream
from paceline.server.engine.request import Request
from paceline.server.errors import ArtifactError, UnavailableError


@dataclass(frozen=True)
class Options:
    """What goes wrong; ``helper``: the engine has a process of its own, whose number lands in a file of that name."""

    load_error: str | None = None
    stop_hangs: bool = False
    helper: bool = False


class SteeredEngine(FakeEngine):
    """Loads, finishes and fails when told; draining and stopping are those of the interface."""

    def __init__(self, folder: Path, options: Options) -> None:
        self._folder, self._options = folder, options
        self._state: EngineState = "loading"
        self._loader = threading.Thread(target=self._load, daemon=True)
        super().__init__(script=self._script, state="loading")

    @property
    def state(self) -> EngineState:
        return "failed" if (self._folder / "fail").exists() else self._state

    @state.setter
    def state(self, state: EngineState) -> None:
        self._state = state

    def _script(self, request: Request) -> Iterator[Scripted]:
        yield event(request, 0, "begun ")
        yield self._until("finish")
        if self._state == "stopped":
            yield UnavailableError("the server has stopped", code="stopped")
        yield event(request, 0, "ended", finish_reason="stop")

    def submit(self, request: Request) -> EventStream:
        if self._state != "ready":
            raise UnavailableError(f"the server is {self._state}", code=self._state)
        return super().submit(request)

    async def _until(self, name: str) -> None:
        while not (self._folder / name).exists() and self._state != "stopped":
            await asyncio.sleep(0.01)

    def _load(self) -> None:
        while not (self._folder / "load").exists():
            time.sleep(0.01)

    async def start(self) -> None:
        """Loading happens on a thread that cannot be interrupted, as in the native engine."""
        self._loader.start()
        if self._options.helper:
            helper = multiprocessing.get_context("fork").Process(target=signal.pause)
            helper.start()
            (self._folder / "helper").write_text(str(helper.pid))
        while self._loader.is_alive():
            await asyncio.sleep(0.01)
        if self._options.load_error == "user":
            raise ArtifactError("model.gguf: the file is cut off; fetch it again")
        if self._options.load_error == "crash":
            raise RuntimeError("a bug while loading")
        self.state = "ready"

    async def drain(self, timeout_seconds: float) -> bool:
        self.state = "draining"
        try:
            async with asyncio.timeout(timeout_seconds):
                while self.open:
                    await asyncio.sleep(0.01)
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        await asyncio.to_thread(self._loader.join)
        self.state = "stopped"
        if self._options.stop_hangs:
            await asyncio.Event().wait()


def serve(folder: Path, options: Options, arguments: list[str]) -> int:
    """``paceline serve`` as it is, but for the engine it builds."""
    build = ModuleType("paceline.server.engine.build")
    vars(build)["build_engine"] = lambda config, observer: SteeredEngine(folder, options)
    sys.modules[build.__name__] = build
    if options.stop_hangs:
        serving.STOP_SECONDS = 0.1
    return main(["serve", "--device", "cpu", *arguments])


if __name__ == "__main__":
    sys.exit(serve(Path(sys.argv[1]), Options(**json.loads(sys.argv[2])), sys.argv[3:]))
