"""Numbers of a plan that are neither on a data sheet nor measured when it is made, each with where it comes from.

They are printed with every plan. Those of GPUs have never been checked on one by us.
"""

from dataclasses import dataclass

from paceline.server.planning.roofline import Overheads


@dataclass(frozen=True, slots=True)
class Assumption:
    """A number that a plan rests on, as text, and its source."""

    name: str
    value: str
    source: str


#: gpt-fast's README: Llama-2-7B in bf16, one stream, reads 1397 GB/s of an A100-80GB's 2039, and 70B in int8 1323.
BANDWIDTH_EFFICIENCY = 0.7
BANDWIDTH_SOURCE = (
    "published: gpt-fast on A100-80GB, batch 1: 65-69% of the data sheet (7B quantized: 42-52%)"
)
#: Between the 38-43% that training Llama 3 reached (arXiv:2407.21783) and the 65-75% of large products alone.
COMPUTE_EFFICIENCY = 0.5
COMPUTE_SOURCE = "assumed, between 38-43% of training Llama 3 (arXiv:2407.21783) and products alone"
#: What remains of gpt-fast's table after its weights were read: 7B on 2, 4, 8 A100s 20, 25, 29 us; 70B on 8 24 us.
ALL_REDUCE_SECONDS = 25e-6
ALL_REDUCE_SOURCE = "derived from gpt-fast's tensor-parallel table, 20-29 us on A100s with NVLink"
#: vLLM's own default for gpu_memory_utilization.
GPU_MEMORY_SHARE = 0.9
GPU_MEMORY_SOURCE = "vLLM's default gpu_memory_utilization"
#: ``build`` gives the KV cache at most a quarter of the free memory unless kv_cache_gib says more; weights come on top.
CPU_MEMORY_SHARE = 0.8
CPU_MEMORY_SOURCE = "assumed; serve needs --kv-cache-gib to use so much"
#: How full a replica may be: queues grow without bound as it nears 1.
UTILIZATION = 0.8
UTILIZATION_SOURCE = "assumed, for bursts"
#: Measured with ``planning.check``; see server/DESIGN.md, 2026-11-30. Python at work: it scales with the processor.
CPU_OVERHEADS = Overheads(step=150e-6, sequence=20e-6, row=26e-6, drafted=50e-6)
CPU_OVERHEADS_SOURCE = "measured on an Intel Xeon of 2 cores, 2026-11-30 (server/DESIGN.md)"
GPU_OVERHEADS = Overheads()
GPU_OVERHEADS_SOURCE = (
    "assumed: launches and host work are hidden, which small models are too quick for; never measured here"
)
