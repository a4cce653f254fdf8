"""vLLM behind the same engine interface, in process: many GPUs and nodes, the same API.

Nothing of this package is imported unless ``engine.kind`` is "vllm", and only ``connect`` imports vLLM.
"""
