"""Engines for tests: over tiny checkpoints (the real loader and builder), or over a lookup table whose exact
distribution is known (for statistics through ``Engine.step``)."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from paceline.server.config.schema import EngineConfig, ModelSpec, PacelineConfig, SpeculationConfig
from paceline.server.decoding.lenience import LenienceForm
from paceline.server.decoding.mixture import Pair
from paceline.server.decoding.policy import FixedPolicy, Policy
from paceline.server.engine.batch import Batch
from paceline.server.engine.build import build_native
from paceline.server.engine.draft_proposer import DraftModelProposer
from paceline.server.engine.engine import Engine
from paceline.server.engine.examine import Examiner
from paceline.server.engine.expert_proposer import ExpertProposer
from paceline.server.engine.interface import ModelInfo, RequestStats, StepStats
from paceline.server.engine.kv_blocks import KvBlocks, MemberLayout
from paceline.server.engine.proposers import NgramProposer, Proposer
from paceline.server.engine.request import Request, SamplingParams, SpeculationParams, TokenEvent
from paceline.server.engine.runner import spread
from paceline.server.engine.scheduler import Scheduler
from paceline.server.engine.served import ServedModel
from paceline.server.engine.steering import Member, Steering
from paceline.server.models.attention import SequenceRows

_ids = itertools.count()
NO_DRAFT = SpeculationParams(enabled=False)


class Recorder:
    """An observer that keeps everything."""

    def __init__(self) -> None:
        self.steps: list[StepStats] = []
        self.requests: list[RequestStats] = []

    def on_step(self, stats: StepStats) -> None:
        self.steps.append(stats)

    def on_request(self, stats: RequestStats) -> None:
        self.requests.append(stats)


def spec(
    target: Path,
    name: str = "m",
    *,
    context_length: int | None = None,
    weights: Literal["fp32", "bf16", "int8"] = "fp32",
    **speculation: Any,
) -> ModelSpec:
    """A model whose blocks have the length asked for, unless ``policy`` says otherwise."""
    speculation.setdefault("policy", "fixed")
    if isinstance(speculation.get("draft"), Path):
        speculation["draft"] = str(speculation["draft"])
    return ModelSpec(name, str(target), weights, context_length, SpeculationConfig(**speculation))


def tiny_engine(*models: ModelSpec, observer: Recorder | None = None, **engine: Any) -> Engine:
    """The real builder on CPU; 4 MiB of KV and blocks of 16 unless told otherwise."""
    settings = {"device": "cpu", "threads": 1, "kv_cache_gib": 4 / 1024, "block_size": 16, **engine}
    config = PacelineConfig(engine=EngineConfig(**settings), models=models)
    return build_native(config, observer or Recorder()).engine


def request(
    prompt: Sequence[int],
    *,
    model: str = "m",
    n: int = 1,
    speculation: SpeculationParams | None = None,
    **sampling: Any,
) -> Request:
    sampling.setdefault("max_tokens", 24)
    sampling.setdefault("temperature", 0.0)
    return Request(
        f"r{next(_ids)}",
        model,
        tuple(prompt),
        SamplingParams(**sampling),
        speculation or SpeculationParams(),
        n,
    )


def submit(engine: Engine, *requests: Request) -> None:
    for r in requests:
        engine.check(r)
        engine.submit(r)


def run(engine: Engine, *requests: Request) -> list[list[list[TokenEvent]]]:
    """Submit all, step to the end; events[request][choice]."""
    submit(engine, *requests)
    events: dict[str, list[list[TokenEvent]]] = {r.id: [[] for _ in range(r.n)] for r in requests}
    while engine.has_work:
        for request_id, event in engine.step():
            events[request_id][event.choice].append(event)
    for r in requests:
        for choice in events[r.id]:
            assert choice[-1].finish_reason is not None
            assert all(e.finish_reason is None for e in choice[:-1])
    return [events[r.id] for r in requests]


def ids(events: Sequence[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def text(events: Sequence[TokenEvent]) -> str:
    return "".join(event.text for event in events)


def tokens(engine: Engine, *requests: Request) -> list[list[int]]:
    """Token ids of choice 0 of each request."""
    return [ids(choices[0]) for choices in run(engine, *requests)]


class TableTokenizer:
    """Stands in for a tokenizer where no text is looked at."""

    eos_ids: frozenset[int] = frozenset()
    sha256 = "table"
    has_chat_template = False

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [int(c) for c in text]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(str(i) for i in ids)

    def token_text(self, token_id: int) -> str:
        return str(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        return str(token_id).encode()

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        return [0]


class TableRunner:
    """A model whose logits are ``table[previous token, current token]``.

    The previous token is read back from a block cache, so wrong block tables, positions or rollbacks show.
    With ``vocab_ids`` it computes logits of those only, as drafts of a restricted vocabulary do.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        key: str,
        table: np.ndarray,
        *,
        num_blocks: int,
        block_tokens: int = 4,
        vocab_ids: Sequence[int] | None = None,
    ) -> None:
        self.vocab_size = table.shape[-1]
        self.layout = MemberLayout(key, block_tokens)
        self._table = torch.tensor(table, dtype=torch.float32)
        self._vocab_ids = None if vocab_ids is None else torch.tensor(vocab_ids, dtype=torch.int32)
        self._cache = np.full((num_blocks, block_tokens), -1)
        self.forwards = 0

    def forward(self, batch: Batch) -> torch.Tensor:
        self.forwards += 1
        size, previous = self.layout.block_tokens, np.zeros(len(batch.tokens), dtype=np.int64)
        for rows in batch.sequences:
            for i in range(rows.count):
                at, row = rows.start + i, rows.first_row + i
                self._cache[rows.pages[at // size], at % size] = batch.tokens[row]
                if at:
                    previous[row] = self._cache[rows.pages[(at - 1) // size], (at - 1) % size]
        wanted = np.array(batch.wanted, dtype=np.int64)
        logits = self._table[previous[wanted], np.array(batch.tokens)[wanted]]
        own = logits if self._vocab_ids is None else logits[:, self._vocab_ids.long()]
        return spread(own, self._vocab_ids, self.vocab_size)

    def argmax(self, logits: torch.Tensor) -> list[int]:
        return [int(i) for i in logits.argmax(-1)]


class FeatureTableRunner(TableRunner):
    """A target that keeps states, or a draft that reads them: the previous token comes from the features, not from the
    cache. A state is (previous token, current token)."""

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.forward_states(batch)[0]

    def forward_states(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        logits = super().forward(batch)
        if batch.features is None:
            return logits, torch.empty(0, 2)
        states = torch.stack((batch.features[:, 1], torch.tensor(batch.tokens).float()), dim=1)[batch.wanted]
        read, current = states.long().unbind(1)
        own = self._table[read, current]
        own = own if self._vocab_ids is None else own[:, self._vocab_ids.long()]
        return spread(own, self._vocab_ids, self.vocab_size), states

    def read_states(self, spans: Sequence[SequenceRows]) -> torch.Tensor:
        size = self.layout.block_tokens
        positions = [(s.pages, s.start + i) for s in spans for i in range(s.count)]
        states = [
            [self._cache[pages[i // size], i % size] if i >= 0 else 0 for i in (at - 1, at)]
            for pages, at in positions
        ]
        return torch.tensor(np.array(states), dtype=torch.float32)


def table_engine(
    target: np.ndarray,
    draft: np.ndarray | None,
    *,
    max_draft_tokens: int,
    rule: Any = "token",
    seed: int = 0,
    num_blocks: int = 4096,
    draft_ids: Sequence[int] | None = None,
    reads_states: bool = False,
    policy: Policy | None = None,
    min_lenience: float = 1.0,
    lenience_form: LenienceForm = "exp",
    observer: Recorder | None = None,
    examiner: Examiner | None = None,
    steering: tuple[np.ndarray, np.ndarray, float] | None = None,
) -> Engine:
    """An engine over table models; ``draft`` None means n-gram proposals only, ``draft_ids`` restricts the draft,
    ``reads_states`` makes it one that reads the target's, ``steering`` steers by (expert, anti-expert, alpha): the
    expert then drafts, too."""
    vocab, kind = target.shape[-1], FeatureTableRunner if reads_states else TableRunner
    runner = kind("target", target, num_blocks=num_blocks)
    proposers: dict[str, Proposer] = {"ngram": NgramProposer()}
    if draft is not None:
        draft_runner = kind("draft", draft, num_blocks=num_blocks, vocab_ids=draft_ids)
        proposers["draft"] = DraftModelProposer(
            draft_runner,
            vocab_size=vocab,
            max_batch_tokens=4096,
            target=runner if isinstance(runner, FeatureTableRunner) else None,
        )
    steered = None
    if steering is not None:
        expert, anti_expert, alpha = steering
        members = [
            Member(name, TableRunner(name, table, num_blocks=num_blocks), 256)
            for name, table in (("expert", expert), ("anti-expert", anti_expert))
        ]
        steered = Steering([Pair("p", "proxy", 1, 2, alpha, (0.0, 4.0))], members, vocab_size=vocab)
        proposers = {"expert": ExpertProposer(members[0].runner, 1, vocab_size=vocab), **proposers}
    info = ModelInfo(
        "m",
        0,
        256,
        vocab,
        TableTokenizer(vocab),
        tuple(proposers),
        next(reversed(proposers)),
        max_draft_tokens,
        min_lenience,
    )
    served = {
        "m": ServedModel(info, runner, proposers, policy or FixedPolicy(), rule, lenience_form, steered)
    }
    blocks = KvBlocks(num_blocks)
    scheduler = Scheduler(served, blocks, max_batch_tokens=4096, max_running=512)
    return Engine(served, blocks, scheduler, observer or Recorder(), seed=seed, examiner=examiner)
