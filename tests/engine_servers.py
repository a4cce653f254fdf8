"""SmolLM2 served by either engine in a process of its own, bf16 on both, set up to be compared.

``crash`` ends what computes: of vLLM its engine core's process, of the native engine, which has none, its thread, by a
bug that a file sets off.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx
import openai
import psutil
from served_process import PATIENCE_SECONDS, ServedProcess
from vllm_process import vllm_serve

Engine = Literal["native", "vllm"]
MODEL = "smol"
#: Fixed blocks of three drafted tokens, accepted token by token: what both engines can do.
_NATIVE = "kv_cache_gib = 0.5\nmax_running = 16\n"
_NATIVE_DRAFT = "policy = 'fixed'\nverify = 'token'\nngram = false\n"
_VLLM = """kind = 'vllm'
kv_cache_gib = 0.3
max_running = 64
[engine.vllm]
max_model_len = 1024
enforce_eager = true
"""
#: vLLM drafts nothing for one sequence alone and for more than 16, so that one start shows text with and without a
#: draft. The native engine is told by each request.
SCHEDULE = ("1:0", "16:3", "0")
#: ``paceline serve`` with a bug: the engine's next step fails once the file exists.
_MAIN = """
import sys
from pathlib import Path
from paceline.clients.console import main
from paceline.server.engine.engine import Engine
step, file = Engine.step, Path(sys.argv.pop(1))
def broken(self):
    if file.exists():
        raise RuntimeError("a bug in a step")
    return step(self)
Engine.step = broken
sys.exit(main())
"""


@dataclass(frozen=True)
class Served:
    """A ready server.

    Attributes:
        draft: None where it serves without one.
        loading: its answers to GET /health, GET /ready and a completion before it was ready.
    """

    engine: Engine
    process: ServedProcess
    draft: str | None
    loading: tuple[httpx.Response, httpx.Response, httpx.Response]

    @property
    def url(self) -> str:
        return self.process.url

    def crash(self) -> None:
        """End what computes, while it computes."""
        if self.engine == "native":
            (self.process.folder / "crash").touch()
            return
        children = psutil.Process(self.process.child.pid).children()
        (core,) = [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
        core.kill()


def client_of(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.url + "/v1", api_key="x", max_retries=0, timeout=PATIENCE_SECONDS)


def ready(engine: Engine, process: ServedProcess, draft: str | None) -> Served:
    """A server that has just been started, once it is ready."""
    body = {"model": MODEL, "prompt": "a", "max_tokens": 1}
    health, readiness = (httpx.get(process.url + path) for path in ("/health", "/ready"))
    answer = httpx.post(process.url + "/v1/completions", json=body)
    process.until(lambda: "Try it" in process.out)
    return Served(engine, process, draft, (health, readiness, answer))


@contextmanager
def serving(
    engine: Engine, folder: Path, target: Path, draft: str | None, *, schedule: Sequence[str] = ()
) -> Iterator[Served]:
    """Serve ``target`` until the end of the block; skips the test where there is no vLLM.

    Args:
        folder: empty; for output and files.
        draft: a reference, drafting three tokens at a time.
        schedule: vLLM's draft length by batch size, ``models.speculation.draft_schedule``.
    """
    native = engine == "native"
    config = f"""[server]
drain_seconds = {PATIENCE_SECONDS}
[engine]
{_NATIVE if native else _VLLM}
[[models]]
name = '{MODEL}'
target = {str(target)!r}
weights = 'bf16'
[models.speculation]
draft = {draft or "none"!r}
max_draft_tokens = 3
{_NATIVE_DRAFT if native else f"draft_schedule = {list(schedule)!r}"}
"""
    if not native:
        with vllm_serve(folder, config) as process:
            yield ready(engine, process, draft)
        return
    (folder / "paceline.toml").write_text(config, encoding="utf-8")
    arguments = [str(folder / "crash"), "serve", "--port", "0", "--config", str(folder / "paceline.toml")]
    process = ServedProcess(folder, [sys.executable, "-c", _MAIN, *arguments])
    try:
        yield ready(engine, process, draft)
    finally:
        process.kill()
