"""The ``[engine.vllm]`` table: arguments that vLLM's engine gets, and what of our own keys becomes one of them.

Owns which arguments are checked here (those that people set, by type and range), which are ours to set, and which of
our keys vLLM does not have. Whether an argument exists at all is for the installed vLLM to say, when it starts: this
module must work without one.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from paceline.server.config.schema import EngineConfig, ModelSpec, key_field, keys_of
from paceline.server.config.values import convert
from paceline.server.errors import ConfigError

NATIVE_ONLY = 'only the native engine has it; leave it out or use engine.kind = "native"'


@dataclass(frozen=True)
class _KnownArguments:
    """Arguments whose values are checked before vLLM is loaded; names and meaning are vLLM's."""

    tensor_parallel_size: int = key_field("GPUs that share each layer.", 1, low=1)
    pipeline_parallel_size: int = key_field("Groups of layers, each on GPUs of its own.", 1, low=1)
    data_parallel_size: int = key_field("Copies of the model.", 1, low=1)
    data_parallel_size_local: int = key_field("Copies on this node.", 1, low=0)
    data_parallel_backend: Literal["mp", "ray"] = key_field("What starts the copies.", "mp")
    data_parallel_address: str = key_field("Address of the node that runs the API.", "")
    data_parallel_rpc_port: int = key_field("Port there.", 0, low=1, high=65535)
    distributed_executor_backend: Literal["mp", "ray", "uni", "external_launcher"] = key_field(
        "What starts the workers.", "mp"
    )
    nnodes: int = key_field("Nodes of a multiprocessing set-up.", 1, low=1)
    node_rank: int = key_field("Which of them this is.", 0, low=0)
    master_addr: str = key_field("Address of node 0.", "")
    master_port: int = key_field("Port there.", 0, low=1, high=65535)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = key_field("Type of the weights.", "auto")
    kv_cache_dtype: str = key_field("Type of the KV cache.", "auto")
    quantization: str = key_field("How the weights are quantized.", "")
    max_model_len: int = key_field("Longest sequence, tokens.", 1, low=2)
    gpu_memory_utilization: float = key_field("Share of a GPU's memory to use.", 0.9, above=0, high=1)
    kv_cache_memory_bytes: int = key_field("Memory for the KV cache, per GPU.", 1, low=1)
    cpu_offload_gb: float = key_field("Weights kept in main memory, GiB per GPU.", 0.0, low=0)
    max_num_seqs: int = key_field("Sequences that run at the same time.", 1, low=1)
    max_num_batched_tokens: int = key_field("Tokens per step.", 1, low=1)
    block_size: int = key_field("Tokens per KV block.", 16, low=1)
    enable_prefix_caching: bool = key_field("Reuse the KV cache of equal prompt beginnings.", True)
    enable_chunked_prefill: bool = key_field("Cut long prompts into several steps.", True)
    enable_expert_parallel: bool = key_field("Spread the experts over GPUs.", False)
    enforce_eager: bool = key_field("Do not compile and capture the model.", False)
    trust_remote_code: bool = key_field("Run code that a checkpoint brings.", False)
    seed: int = key_field("Of unseeded sampling.", 0, low=0)


#: Arguments that say what Paceline has a key for, or that its API depends on.
_OURS: Mapping[str, str] = {
    "model": "set target in [[models]]",
    "served_model_name": "set name in [[models]]",
    "tokenizer": "the tokenizer is the target's",
    "tokenizer_mode": "the tokenizer is the target's",
    "skip_tokenizer_init": "Paceline tokenizes and detokenizes itself",
    "generation_config": "requests say how to sample",
    "override_generation_config": "requests say how to sample",
    "speculative_config": "set draft and max_draft_tokens in [models.speculation]",
    "spec_method": "set draft in [models.speculation]",
    "spec_model": "set draft in [models.speculation]",
    "spec_tokens": "set max_draft_tokens in [models.speculation]",
    "logits_processors": "steering is for the native engine",
    "logprobs_mode": "the API returns log-probabilities of the unprocessed logits",
    "max_logprobs": "the API allows 20",
    "disable_log_stats": "the metrics need them",
    "per_request_spec_decode_metrics": "Paceline sets it where a draft is served",
    "max_num_queued_reqs": "set max_queued_requests in [server]",
    "runner": "Paceline serves text generation",
    "convert": "Paceline serves text generation",
}

#: Our key in [engine] -> the argument that it becomes.
_FROM_ENGINE = {
    "max_batch_tokens": "max_num_batched_tokens",
    "max_running": "max_num_seqs",
    "block_size": "block_size",
    "prefix_caching": "enable_prefix_caching",
}
#: More than ever run at the same time.
_ANY_BATCH = 10_000_000
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def read_arguments(table: object, place: str) -> dict[str, Any]:
    """The arguments of a file's table, as far as they can be checked without vLLM.

    Raises:
        ConfigError: a wrong type or value, or an argument that is not the user's to set.
    """
    if not isinstance(table, dict):
        raise ConfigError(f"{place}: expected a table, got {table!r:.60}")
    known = keys_of("vllm", _KnownArguments)
    arguments = {}
    for name, value in table.items():
        if name in _OURS:
            raise ConfigError(f"{place}.{name}: not yours to set: {_OURS[name]}")
        spot = f"{place}.{name}"
        arguments[name] = convert(known[name], value, spot, text=False) if name in known else value
    return arguments


def engine_arguments(given: Mapping[str, tuple[Any, str]], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The table's arguments and those that follow from keys of [engine].

    Args:
        given: keys of [engine] that somebody set: value and place.
        arguments: of the table.

    Raises:
        ConfigError: the same thing said twice.
    """
    merged = dict(arguments)
    for name, argument in _FROM_ENGINE.items():
        if name in given:
            value, place = given[name]
            _once(argument, merged, place)
            merged[argument] = value
    if "kv_cache_gib" in given:
        value, place = given["kv_cache_gib"]
        _once("kv_cache_memory_bytes", merged, place)
        merged["kv_cache_memory_bytes"] = int(value * 2**30)
    return merged


def model_arguments(spec: ModelSpec, arguments: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The arguments with those that follow from a model's own keys.

    Raises:
        ConfigError: something that vLLM does not do, or the same thing said twice.
    """
    merged = dict(arguments)
    if spec.weights not in ("auto", *_DTYPES):
        raise ConfigError(
            f'{place}.weights: "{spec.weights}" is a format of the native engine; vLLM runs "bf16", "fp32" or what '
            "engine.vllm.quantization names"
        )
    if spec.weights != "auto":
        _once("dtype", merged, f"{place}.weights")
        merged["dtype"] = _DTYPES[spec.weights]
    if spec.context_length is not None:
        _once("max_model_len", merged, f"{place}.context_length")
        merged["max_model_len"] = spec.context_length
    return merged


def check_vllm(
    engine: EngineConfig,
    specs: tuple[ModelSpec, ...],
    given: Mapping[str, tuple[Any, str]],
) -> None:
    """Refuse what only the native engine does.

    Args:
        given: keys of [models.speculation] that somebody set for the one model.

    Raises:
        ConfigError: names the key.
    """
    if len(specs) > 1:
        raise ConfigError(
            f"models: vLLM serves one model per process, and {len(specs)} are listed; start one server for each, or "
            'use engine.kind = "native"'
        )
    spec = specs[0]
    if spec.steering:
        raise ConfigError(f"models.steering of {spec.name}: {NATIVE_ONLY}")
    if spec.speculation.min_lenience != 1:
        raise ConfigError(f"{given['min_lenience'][1]}: {NATIVE_ONLY}")
    if "draft_schedule" in given:
        place = given["draft_schedule"][1]
        read_schedule(spec.speculation.draft_schedule, spec.speculation.max_draft_tokens, place)
        if engine.vllm.get("data_parallel_size", 1) > 1:
            raise ConfigError(
                f"{place}: vLLM has none with engine.vllm.data_parallel_size above 1; leave one out"
            )
    for name, other in (("verify", "block"), ("policy", "adaptive"), ("ngram", True)):
        if name in given and given[name][0] == other:
            raise ConfigError(f"{given[name][1]}: {str(other).lower()}: {NATIVE_ONLY}")


def read_schedule(texts: Sequence[str], longest: int, place: str) -> list[tuple[int, int, int]]:
    """``draft_schedule`` as vLLM's ``num_speculative_tokens_per_batch_size``: (first, last, draft tokens) in order.

    Args:
        longest: ``max_draft_tokens``.

    Raises:
        ConfigError: entries that cannot be read or do not rise, or more draft tokens than that.
    """
    ranges: list[tuple[int, int, int]] = []
    for number, text in enumerate(texts):
        match = re.fullmatch(r"(?:([1-9][0-9]{0,6}):)?([0-9]{1,4})", text)
        if match is None or (match[1] is None) != (number == len(texts) - 1):
            raise ConfigError(
                f'{place}: expected entries like "16:2", up to 16 sequences draft 2, and a last one like "0" for all '
                f'beyond, got "{text}"'
            )
        first, length = ranges[-1][1] + 1 if ranges else 1, int(match[2])
        last = int(match[1]) if match[1] is not None else _ANY_BATCH
        if last < first:
            raise ConfigError(f'{place}: "{text}" does not go beyond the entry before it')
        if length > longest:
            raise ConfigError(f'{place}: "{text}" drafts more than max_draft_tokens = {longest}')
        ranges.append((first, last, length))
    return ranges


def _once(argument: str, arguments: Mapping[str, Any], place: str) -> None:
    if argument in arguments:
        raise ConfigError(f"{place}: engine.vllm.{argument} says the same; keep one of the two")
