"""``engine.kind = "vllm"``: the ``[engine.vllm]`` table, our keys that become vLLM's arguments, and refusals."""

from pathlib import Path
from typing import Any

import pytest

from paceline.server.config import PacelineConfig, load_config, resolve
from paceline.server.config.vllm import read_schedule
from paceline.server.errors import ConfigError

SCHEDULE = "[[models]]\ntarget = 't'\n[models.speculation]\ndraft_schedule = [{}]"
VLLM = "[engine]\nkind = 'vllm'\n"


def load(tmp_path: Path, text: str, **flags: Any) -> PacelineConfig:
    path = tmp_path / "p.toml"
    path.write_text(text)
    return load_config(path, {}, flags)


def test_arguments_are_passed_with_their_types(tmp_path: Path) -> None:
    text = VLLM + (
        "[engine.vllm]\ntensor_parallel_size = 2\npipeline_parallel_size = 2\ndata_parallel_size = 4\n"
        "distributed_executor_backend = 'ray'\ndtype = 'bfloat16'\nmax_model_len = 4096\n"
        "gpu_memory_utilization = 0.8\nsome_new_argument = {a = 1}\n"
    )
    assert load(tmp_path, text).engine.vllm == {
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 2,
        "data_parallel_size": 4,
        "distributed_executor_backend": "ray",
        "dtype": "bfloat16",
        "max_model_len": 4096,
        "gpu_memory_utilization": 0.8,
        "some_new_argument": {"a": 1},  # the installed vLLM says whether there is one
    }


def test_our_keys_become_arguments_only_when_somebody_set_them(tmp_path: Path) -> None:
    assert load(tmp_path, "", engine="vllm").engine.vllm == {}
    text = (
        "[engine]\nkind = 'vllm'\nmax_batch_tokens = 512\nmax_running = 9\nblock_size = 32\nprefix_caching = false\n"
        "kv_cache_gib = 1.5\n[[models]]\ntarget = 't'\nweights = 'fp32'\ncontext_length = 2048\n"
    )
    assert load(tmp_path, text).engine.vllm == {
        "max_num_batched_tokens": 512,  # also where it is our default, which is not vLLM's
        "max_num_seqs": 9,
        "block_size": 32,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 1_610_612_736,
        "dtype": "float32",
        "max_model_len": 2048,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[engine.vllm]\ntensor_parallel_size = 0",
            "engine.vllm.tensor_parallel_size: expected a whole number",
        ),
        ("[engine.vllm]\ndistributed_executor_backend = 'dask'", 'expected "mp", "ray"'),
        ("[engine.vllm]\ngpu_memory_utilization = 1.5", "expected a number above 0 and at most 1"),
        ("[engine.vllm]\nenforce_eager = 1", "expected true or false"),
        ("[engine.vllm]\nmodel = 'x'", "engine.vllm.model: not yours to set: set target"),
        ("[engine.vllm]\nspeculative_config = {}", r"\[models.speculation\]"),
        ("max_running = 4\n[engine.vllm]\nmax_num_seqs = 4", "engine.vllm.max_num_seqs says the same"),
        (
            "[engine.vllm]\ndtype = 'float16'\n[[models]]\ntarget = 't'\nweights = 'bf16'",
            "dtype says the same",
        ),
        ("[[models]]\ntarget = 't'\nweights = 'int8'", "format of the native engine"),
        ("[[models]]\ntarget = 't'\n[[models]]\ntarget = 'u'", 'one model per process.*"native"'),
        (
            "[[models]]\ntarget = 't'\n[[models.steering]]\nname = 's'\nexpert = 'e'\nanti_expert = 'self'",
            "only the native engine",
        ),
        (
            "[[models]]\ntarget = 't'\n[models.speculation]\nmin_lenience = 0.5",
            "min_lenience: only the native",
        ),
        (
            "[[models]]\ntarget = 't'\n[models.speculation]\nverify = 'block'",
            "verify: block: only the native",
        ),
        (
            "[[models]]\ntarget = 't'\n[models.speculation]\npolicy = 'adaptive'",
            "policy: adaptive: only the native",
        ),
        ("[[models]]\ntarget = 't'\n[models.speculation]\nngram = true", "ngram: true: only the native"),
        (SCHEDULE.format("'4-2', '0'"), 'entries like "16:2".*got "4-2"'),
        (SCHEDULE.format("'4:2', '8:1'"), 'a last one like "0" for all beyond, got "8:1"'),
        (SCHEDULE.format("'2', '8:1', '0'"), 'got "2"'),
        (SCHEDULE.format("'4:2', '4:1', '0'"), '"4:1" does not go beyond'),
        (SCHEDULE.format("'4:5', '0'"), '"4:5" drafts more than max_draft_tokens = 4'),
        ("[engine.vllm]\ndata_parallel_size = 2\n" + SCHEDULE.format("'4:2', '0'"), "leave one out"),
    ],
)
def test_what_vllm_does_not_take_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, VLLM + text)


def test_a_schedule_becomes_ranges_of_batch_sizes(tmp_path: Path) -> None:
    config = load(tmp_path, VLLM + SCHEDULE.format("'4:3', '16:1', '0'"))
    lengths = config.models[0].speculation.draft_schedule
    ranges = read_schedule(lengths, 4, "here")
    assert [first for first, _, _ in ranges] == [1, 5, 17]
    assert [last for _, last, _ in ranges[:-1]] == [4, 16]
    assert [length for _, _, length in ranges] == [3, 1, 0]
    assert ranges[-1][1] > 100_000


def test_the_native_engine_has_no_schedule(tmp_path: Path) -> None:
    config = load(tmp_path, SCHEDULE.format("'4:2', '0'"))
    with pytest.raises(ConfigError, match="draft_schedule: for vLLM only"):
        resolve(config)


def test_the_table_is_not_read_for_another_engine(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.vllm: read with engine\.kind"):
        load(tmp_path, "[engine.vllm]\ndtype = 'auto'")


def test_nothing_is_asked_of_this_machine(tmp_path: Path) -> None:
    config = load(tmp_path, VLLM + "device = 'cuda'")
    assert resolve(config) is config
