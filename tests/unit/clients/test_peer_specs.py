"""Who takes part in a side-by-side run, with which command lines, and who does not."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from bench_stand_ins import bench_plan

from paceline.clients import peer_llamacpp, peer_specs
from paceline.clients.bench_scenarios import Scenario
from paceline.clients.ceiling import Weights
from paceline.clients.peer_specs import Cast, context_tokens, our_name, vllm_version
from paceline.clients.peers import PeerError, Spec
from paceline.clients.traffic import ClosedLoop


@pytest.fixture(autouse=True)
def files(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file is read or made."""
    monkeypatch.setattr(peer_specs, "read_weights", lambda path: Weights(100, 60))
    monkeypatch.setattr(peer_specs, "quant_name", lambda path: path.stem.rpartition(".")[2])
    monkeypatch.setattr(peer_specs, "q8_0_file", lambda path: Path("/made/m.Q8_0.gguf"))
    monkeypatch.setattr(peer_specs, "hf_folder", lambda path: Path("/made/bf16"))
    monkeypatch.setattr(peer_specs, "pull", lambda model: Path("/drafts") / model)
    monkeypatch.setattr(peer_specs, "vllm_version", lambda python: "0.32.0")
    installed(monkeypatch, "xllamacpp", "transformers", "torch")


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in names else None)


def cast(model: str = "/models/m.Q4_1.gguf", **changes: Any) -> tuple[list[Spec], list[Spec], list[str]]:
    skipped: list[str] = []
    chosen = Cast(bench_plan(**changes), Path(model), skipped.append)
    return chosen.ours(), chosen.peers(), skipped


def test_everyone_takes_part() -> None:
    serve = [["--weights", "int8", "--draft", "none"], ["--weights", "int8", "--draft", "ngram"], []]
    ours, peers, skipped = cast(serve=serve, vllm_python=Path("/env/bin/python"))
    assert [(spec.name, spec.family) for spec in (*ours, *peers)] == [
        ("ours int8", "ours"),
        ("ours int8 + ngram", "ours"),
        ("ours auto + auto draft", "ours"),
        ("llama.cpp Q4_1", "llama.cpp"),
        ("llama.cpp Q8_0", "llama.cpp"),
        ("vllm bf16", "vllm"),
        ("transformers bf16", "transformers"),
        ("transformers fp32", "transformers"),
    ]
    assert [spec.forward_bytes for spec in (*ours, *peers)] == [100, 100, None, 60, 60, 200, 200, 400]
    assert skipped == []
    assert ours[1].argv[-6:-2] == ("--weights", "int8", "--draft", "ngram")
    assert len({spec.port for spec in (*ours, *peers[:3])}) == 6
    assert [spec.max_concurrency for spec in peers] == [None, None, None, 1, 1]


def test_streams_and_context_are_the_same_for_all() -> None:
    scenarios = [Scenario("short", (ClosedLoop(1), ClosedLoop(16)))]
    plan: dict[str, Any] = {"scenarios": scenarios, "max_tokens": 96, "vllm_python": Path("/env/bin/python")}
    (ours,), (llama, _, vllm, *_), _ = cast(**plan)
    assert context_tokens(bench_plan(**plan)) == 2048
    assert llama.argv[-2:] == ("16", "2048")
    assert ours.argv[-2:] == ("--context-length", "2048")
    words = list(vllm.argv)
    assert words[words.index("--max-num-seqs") + 1] == "16"
    assert words[words.index("--max-model-len") + 1] == "2048"
    assert (words[0], words[words.index("--model") + 1]) == ("/env/bin/python", "/made/bf16")
    assert vllm.env["PATH"].startswith("/env/bin:")


def test_all_are_asked_at_the_plans_temperature_or_not_at_all() -> None:
    ours, peers, skipped = cast(temperature=0.7, vllm_python=Path("/env/bin/python"))
    assert [spec.family for spec in peers] == ["llama.cpp", "llama.cpp", "vllm"]
    assert [spec.fields for spec in (*ours, *peers)] == [{"temperature": 0.7}] * 4
    assert skipped == ["transformers: measured greedily only, not at temperature 0.7"]


def test_the_same_draft_for_ours_and_llamacpp() -> None:
    _, peers, skipped = cast(draft="small.gguf", llamacpp_q8_0=False, peers=["llama.cpp"])
    assert [spec.name for spec in peers] == ["llama.cpp Q4_1", "llama.cpp Q4_1 + draft"]
    assert peers[1].argv[-1] == "/drafts/small.gguf"
    _, peers, skipped = cast(draft="folder", peers=["llama.cpp"])
    assert len(peers) == 2
    assert skipped == ["llama.cpp with the draft: folder is not a GGUF file"]


def test_who_cannot_take_part_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "torch")
    _, peers, skipped = cast()
    assert peers == []
    assert [line.split(":")[0] for line in skipped] == ["llama.cpp", "vllm", "transformers"]
    assert "paceline[bench]" in skipped[0]
    assert "--vllm-python" in skipped[1]
    installed(monkeypatch, "xllamacpp")
    monkeypatch.setattr(peer_specs, "vllm_version", lambda python: None)
    _, _, skipped = cast("/models/folder", vllm_python=Path("/env/bin/python"))
    assert "--gguf" in skipped[0]
    assert "not installed for /env/bin/python" in skipped[1]


def test_a_peer_whose_files_cannot_be_made_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> Path:
        raise PeerError("no room")

    monkeypatch.setattr(peer_specs, "q8_0_file", full)
    _, peers, skipped = cast(peers=["llama.cpp", "transformers"])
    assert [spec.family for spec in peers] == ["transformers", "transformers"]
    assert skipped == ["llama.cpp: no room"]


def test_names_of_ours() -> None:
    assert our_name(["--draft", "/some/draft", "--weights=bf16"]) == "ours bf16 + draft"
    assert our_name(["--draft", "none", "--threads", "1"]) == "ours auto --threads 1"


def test_local_paths_hold_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "draft").mkdir()
    monkeypatch.chdir(tmp_path)
    ours, _, _ = cast(serve=[["--draft", "draft"]], peers=[])
    assert str(tmp_path.resolve() / "draft") in ours[0].argv


def test_the_version_of_vllm_is_asked_of_its_environment(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 1.2.3\n", encoding="utf-8")
    fake.chmod(0o755)
    assert vllm_version(fake) == "1.2.3"
    fake.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    assert vllm_version(fake) is None
    assert vllm_version(tmp_path / "nothing") is None


def test_llamacpp_gets_all_cores_a_slot_per_stream_and_the_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # whether it is installed is asked for real
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    params = peer_llamacpp.settings("m.gguf", 1234, 16, 2048, "d.gguf")
    assert (params.model.path, params.port, params.n_parallel, params.n_ctx) == ("m.gguf", 1234, 16, 32768)
    assert (params.cpuparams.n_threads, params.cpuparams_batch.n_threads) == (3, 3)
    own = params.speculative
    assert own.draft.mparams.path == "d.gguf"
    assert (own.draft.cpuparams.n_threads, own.draft.cpuparams_batch.n_threads) == (3, 3)
    assert [kind.name for kind in own.types] == ["COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE"]
    plain = peer_llamacpp.settings("m.gguf", 1234, 1, 2048, None)
    assert [kind.name for kind in plain.speculative.types] == ["COMMON_SPECULATIVE_TYPE_NONE"]
