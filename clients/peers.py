"""The contenders of the side-by-side bench: processes that are started once and run one at a time.

Owns starting, pausing, asking and stopping them; it must not know rounds, tables or ratios. A paused
contender is stopped by the kernel (SIGSTOP), so that none of its spinning threads slows the measured one.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import IO, Any

import httpx

from paceline.clients.stats import Sample
from paceline.clients.stream import ServerError, Target, first_model, measure, negotiate, new_client
from paceline.clients.workload import Prompt

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 20.0
PACELINE = (sys.executable, "-c", "import sys; from paceline.clients.console import main; sys.exit(main())")


class PeerError(Exception):
    """A contender did not start or died; the text names it and ends with its last words."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Spec:
    """How to run one contender.

    Attributes:
        family: whose it is: ``"ours"``, ``"llama.cpp"``...; ours is compared with the best of each other family.
        forward_bytes: weight bytes that a forward reads; None if not known.
        port: where its HTTP server listens; None for a worker that talks over its pipes.
        ready_path: answers 200 once the model is loaded.
        env: environment variables beyond the caller's.
        fields: request fields beyond the common ones.
        max_concurrency: None if it takes any number of streams.
    """

    name: str
    family: str
    argv: Sequence[str]
    forward_bytes: float | None = None
    port: int | None = None
    ready_path: str = "/health"
    env: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    max_concurrency: int | None = None


def free_port() -> int:
    """A port of the loopback interface that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Contender(ABC):
    """One running process; ``async with`` starts and stops it. Subclasses know how to ask it."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed in __aexit__
        self._process: subprocess.Popen[bytes] | None = None

    async def __aenter__(self) -> "Contender":
        pipe = subprocess.PIPE if self.spec.port is None else subprocess.DEVNULL
        self._process = subprocess.Popen(
            self.spec.argv,
            stdin=pipe,
            stdout=pipe if self.spec.port is None else self._log,
            stderr=self._log,
            env={**os.environ, **self.spec.env},
            cwd=tempfile.gettempdir(),  # No configuration file or folder of the caller's may leak in.
            start_new_session=True,  # So that its threads and children are paused and stopped with it.
        )
        try:
            await asyncio.wait_for(self._wait_ready(), START_TIMEOUT_S)
        except TimeoutError as error:
            failure = self.failure(f"was not ready after {START_TIMEOUT_S:.0f} s")
            await self.__aexit__()
            raise failure from error
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_details: object) -> None:
        process = self.process
        if process.poll() is None:
            self.resume()
            os.killpg(process.pid, signal.SIGTERM)
            try:
                await asyncio.to_thread(process.wait, STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        with suppress(ProcessLookupError):  # Children that outlived it; vLLM has some.
            os.killpg(process.pid, signal.SIGKILL)
        for stream in (process.stdin, process.stdout, self._log):
            if stream is not None:
                with suppress(BrokenPipeError):  # A request that a dead worker never read.
                    stream.close()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The running process."""
        assert self._process is not None, "used before it was started"
        return self._process

    def failure(self, what: str) -> PeerError:
        """An error that names the contender and ends with its last line of output."""
        self._log.seek(0)
        words = self._log.read().decode("utf-8", "replace").strip()
        return PeerError(": ".join((f"{self.spec.name} {what}", *words.splitlines()[-1:])))

    def check_alive(self) -> None:
        """Raise PeerError if the process has ended."""
        if self.process.poll() is not None:
            raise self.failure(f"ended with exit code {self.process.returncode}")

    def pause(self) -> None:
        """Take it off the processor altogether."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on where it was."""
        os.killpg(self.process.pid, signal.SIGCONT)

    @abstractmethod
    async def _wait_ready(self) -> None:
        """Return when it can be asked."""

    @abstractmethod
    async def ask(self, prompt: Prompt, max_tokens: int) -> Sample:
        """One request of exactly ``max_tokens`` tokens, measured; a failure is in the sample."""


class HttpContender(Contender):
    """A server with the OpenAI API on the loopback interface."""

    _client: httpx.AsyncClient
    _target: Target

    async def _wait_ready(self) -> None:
        try:
            await self._get_ready()
        except ServerError as error:
            raise PeerError(f"{self.spec.name}: {error}") from error

    async def _get_ready(self) -> None:
        base = f"http://127.0.0.1:{self.spec.port}"
        # A paused server misses the end of idle connections, so each request gets a fresh one.
        self._client = new_client(None, timeout_s=START_TIMEOUT_S, keep_alive=False)
        while not await self._answers(base + self.spec.ready_path):
            self.check_alive()
            await asyncio.sleep(0.2)
        fields = {"temperature": 0.0, "ignore_eos": True, **self.spec.fields}
        target = Target(f"{base}/v1", await first_model(self._client, f"{base}/v1"), "chat", fields)
        self._target = await negotiate(self._client, target, Prompt(text="Hello"))

    async def _answers(self, url: str) -> bool:
        try:
            return (await self._client.get(url)).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    async def __aexit__(self, *details: object) -> None:
        await self._client.aclose()
        await super().__aexit__(*details)

    async def ask(self, prompt: Prompt, max_tokens: int) -> Sample:
        """One streamed chat request."""
        return await measure(self._client, self._target, prompt, max_tokens=max_tokens)


class PipeContender(Contender):
    """A worker that answers JSON lines, such as ``peer_transformers``."""

    async def _wait_ready(self) -> None:
        await self._read()

    async def _exchange(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        return await self._read()

    async def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = await asyncio.to_thread(self.process.stdout.readline)
        if not line:
            raise self.failure(f"ended with exit code {self.process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    async def ask(self, prompt: Prompt, max_tokens: int) -> Sample:
        """One call of ``generate``."""
        started_s = time.perf_counter()
        try:
            reply = await self._exchange({**prompt.body("chat"), "max_tokens": max_tokens})
        except (PeerError, OSError) as error:
            return Sample(started_s=started_s, e2e_s=time.perf_counter() - started_s, error=str(error))
        times_s = reply["times_s"]
        return Sample(
            started_s=started_s,
            e2e_s=time.perf_counter() - started_s,
            ttft_s=times_s[0],
            token_gaps=tuple((late - early, 1.0) for early, late in pairwise(times_s)),
            output_tokens=len(times_s),
            prompt_tokens=reply["prompt_tokens"],
            counted_by="usage",
        )


def contender(spec: Spec) -> Contender:
    """The contender for a spec, not yet started."""
    return PipeContender(spec) if spec.port is None else HttpContender(spec)
