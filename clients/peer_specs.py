"""Who takes part in a side-by-side run, with which files and settings; and who does not, and why.

Owns the command lines of all contenders and the bytes that each reads per forward. It must not start contenders or
know rounds. All get the same number of streams and a context that holds the longest prompt; what a peer does better
with (all cores, no waiting for other requests, no prompt cache that only costs) it gets.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from paceline.clients.bench_presets import Plan
from paceline.clients.ceiling import BYTES_PER_WEIGHT, read_weights
from paceline.clients.peer_files import hf_folder, pull, q8_0_file, quant_name
from paceline.clients.peers import PACELINE, PeerError, Spec, free_port

#: Tokens of prompt that fit beside the answer.
PROMPT_ROOM_TOKENS = 1952
#: For 16 streams of 1,100 tokens ours and vLLM need half of it with the largest preset.
KV_CACHE_GIB = 1
OURS = "ours"


def context_tokens(plan: Plan) -> int:
    """Longest sequence of a stream: a multiple of 32."""
    return -(-(PROMPT_ROOM_TOKENS + plan.max_tokens) // 32) * 32


def reference(model: str) -> str:
    """A model reference that holds in any working directory."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def our_name(serve: Sequence[str]) -> str:
    """Short name of a server of ours: weights, what drafts, and whatever else was asked for."""
    words = [part for word in serve for part in (word.split("=", 1) if word.startswith("--") else [word])]
    weights, draft, rest = "auto", "auto", []
    while words:
        word = words.pop(0)
        if word == "--weights" and words:
            weights = words.pop(0)
        elif word == "--draft" and words:
            draft = words.pop(0)
        else:
            rest.append(word)
    drafts = {"none": [], "ngram": ["+", "ngram"], "auto": ["+", "auto", "draft"]}.get(draft, ["+", "draft"])
    return " ".join((OURS, weights, *drafts, *rest))


def paceline_spec(model: Path, serve: Sequence[str], plan: Plan) -> Spec:
    """Our own server with the given ``paceline serve`` options."""
    port = free_port()
    shared = ("--host", "127.0.0.1", "--port", str(port), "--kv-cache-gib", str(KV_CACHE_GIB))
    given = [reference(word) for word in serve]
    if "--context-length" not in given:
        given += ["--context-length", str(context_tokens(plan))]
    name = our_name(serve)
    weights = name.split()[1]
    size = read_weights(model).bytes_in(weights) if weights in BYTES_PER_WEIGHT else None
    argv = (*PACELINE, "serve", str(model), *shared, *given)
    return Spec(name, OURS, argv, size, port=port, ready_path="/ready", fields=_fields(plan))


def _fields(plan: Plan) -> dict[str, float]:
    """Request fields of contenders with a server."""
    return {"temperature": plan.temperature}


def llamacpp_spec(gguf_file: Path, plan: Plan, draft: Path | None = None) -> Spec:
    """llama.cpp's server on a GGUF file."""
    port = free_port()
    module = (sys.executable, "-m", "paceline.clients.peer_llamacpp")
    argv = (*module, str(gguf_file), str(port), str(plan.slots), str(context_tokens(plan)))
    name = f"llama.cpp {quant_name(gguf_file)}{' + draft' if draft else ''}"
    size = float(read_weights(gguf_file).stored_bytes)
    with_draft = (*argv, *([str(draft)] if draft else []))
    return Spec(name, "llama.cpp", with_draft, size, port=port, fields=_fields(plan))


def transformers_spec(folder: Path, dtype: str) -> Spec:
    """transformers ``generate`` in fp32 or bf16, one stream."""
    argv = (sys.executable, "-m", "paceline.clients.peer_transformers", str(folder), dtype)
    size = read_weights(folder).bytes_in(dtype)
    return Spec(f"transformers {dtype}", "transformers", argv, size, max_concurrency=1)


def vllm_spec(python: Path, folder: Path, plan: Plan) -> Spec:
    """vLLM's OpenAI server on CPU, bf16."""
    port = free_port()
    argv = (
        *(str(python), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(folder), "--served-model-name", "bench", "--dtype", "bfloat16"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--max-model-len", str(context_tokens(plan)), "--max-num-seqs", str(plan.slots)),
        # The checkpoint's own sampling defaults would add a repetition penalty with some models.
        *("--generation-config", "vllm"),
    )
    env = {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        # It compiles with what is on the path of its own environment.
        "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    size = read_weights(folder).bytes_in("bf16")
    return Spec("vllm bf16", "vllm", argv, size, port=port, env=env, fields=_fields(plan))


def vllm_version(python: Path) -> str | None:
    """Version of vLLM in an interpreter's environment; None if it has none."""
    code = "import importlib.metadata as m; print(m.version(m.packages_distributions()['vllm'][0]))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


class Cast:
    """Collects the contenders of a plan.

    Args:
        plan: what to compare.
        model: where the model lies.
        skip: told who cannot take part and why.
    """

    def __init__(self, plan: Plan, model: Path, skip: Callable[[str], None]) -> None:
        self._plan, self._model, self._skip = plan, model, skip

    def ours(self) -> list[Spec]:
        """Our servers."""
        return [paceline_spec(self._model, serve, self._plan) for serve in self._plan.serve]

    def peers(self) -> list[Spec]:
        """The peers that can take part; one whose files cannot be made is left out like one that is missing."""
        makers = {"llama.cpp": self._llamacpp, "vllm": self._vllm, "transformers": self._transformers}
        found = []
        for peer in self._plan.peers:
            try:
                found += makers[peer]()
            except PeerError as error:
                self._skip(f"{peer}: {error}")
        return found

    def _llamacpp(self) -> list[Spec]:
        if importlib.util.find_spec("xllamacpp") is None:
            raise PeerError("xllamacpp is not installed (pip install 'paceline[bench]')")
        gguf_file = self._plan.gguf or (self._model if self._model.suffix == ".gguf" else None)
        if gguf_file is None:
            raise PeerError("the model is not a GGUF file; name one with --gguf")
        files = [gguf_file]
        if self._plan.llamacpp_q8_0 and quant_name(gguf_file) != "Q8_0":
            files.append(q8_0_file(gguf_file))
        return [llamacpp_spec(file, self._plan) for file in files] + self._llamacpp_drafted(gguf_file)

    def _llamacpp_drafted(self, gguf_file: Path) -> list[Spec]:
        if self._plan.draft is None:
            return []
        draft = pull(self._plan.draft)
        if draft.suffix != ".gguf":
            self._skip(f"llama.cpp with the draft: {draft.name} is not a GGUF file")
            return []
        return [llamacpp_spec(gguf_file, self._plan, draft)]

    def _vllm(self) -> list[Spec]:
        python = self._plan.vllm_python
        if python is None:
            raise PeerError(
                "no environment with it given; vllm-cpu needs its own: name its interpreter with --vllm-python or "
                "PACELINE_VLLM_PYTHON (clients/README.md says how to make one)"
            )
        if vllm_version(python) is None:
            raise PeerError(f"not installed for {python}")
        return [vllm_spec(python, hf_folder(self._model), self._plan)]

    def _transformers(self) -> list[Spec]:
        if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None:
            raise PeerError("not installed (pip install 'paceline[server]')")
        if self._plan.temperature:
            raise PeerError(f"measured greedily only, not at temperature {self._plan.temperature:g}")
        folder = hf_folder(self._model)
        return [transformers_spec(folder, dtype) for dtype in self._plan.transformers_dtypes]
