"""llama.cpp's HTTP server as a process: ``python -m paceline.clients.peer_llamacpp GGUF PORT SLOTS CONTEXT [DRAFT]``.

Owns the settings that llama.cpp is compared with; it must not measure anything. All cores, no GPU, one slot
per stream, continuous batching, with DRAFT speculation of its own default length. Runs until it is killed. Needs the
``bench`` extra.
"""

import os
import signal
import sys
from typing import Any


def settings(gguf: str, port: int, slots: int, context: int, draft: str | None) -> Any:
    """``CommonParams`` for ``slots`` streams of at most ``context`` tokens each."""
    import xllamacpp

    cores = os.cpu_count() or 1
    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_parallel = slots
    params.n_ctx = context * slots
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = cores
    # Copies the state of finished requests to memory in case they are asked again: here they never are.
    params.cache_ram_mib = 0
    if draft is not None:
        own = params.speculative
        own.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        own.draft.mparams.path = draft
        own.draft.n_gpu_layers = 0
        own.draft.cpuparams.n_threads = own.draft.cpuparams_batch.n_threads = cores
    return params


def main(argv: list[str]) -> None:
    """Serve until killed; arguments as in the module's docstring."""
    import xllamacpp

    gguf, port, slots, context, *draft = argv
    server = xllamacpp.Server(
        settings(gguf, int(port), int(slots), int(context), draft[0] if draft else None)
    )
    signal.pause()  # It listens as long as the object lives.
    del server


if __name__ == "__main__":
    main(sys.argv[1:])
