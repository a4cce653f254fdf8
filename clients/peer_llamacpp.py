"""llama.cpp's HTTP server as a process: ``python -m paceline.clients.peer_llamacpp GGUF PORT SLOTS``.

Owns the settings that llama.cpp is compared with; it must not measure anything. All cores, no GPU, one slot
per stream, continuous batching. Runs until it is killed. Needs the ``bench`` extra.
"""

import os
import signal
import sys

CONTEXT_PER_SLOT = 2048


def main(argv: list[str]) -> None:
    """Serve the model file ``argv[0]`` on loopback port ``argv[1]`` with ``argv[2]`` slots."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = argv[0]
    params.hostnames = ["127.0.0.1"]
    params.port = int(argv[1])
    params.n_parallel = int(argv[2])
    params.n_ctx = CONTEXT_PER_SLOT * params.n_parallel
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count() or 1
    server = xllamacpp.Server(params)  # Listens as long as the object lives.
    signal.pause()
    del server


if __name__ == "__main__":
    main(sys.argv[1:])
