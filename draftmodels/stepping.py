"""Stepping an engine through a list of prompts on the caller's thread. Knows nothing of models and their loading."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain

import torch

from paceline.draftmodels.acceptance import Commits
from paceline.draftmodels.data.member_prompts import member_prompts
from paceline.draftmodels.data.seeds import derive_seed
from paceline.draftmodels.data.sequences import TokenSequence
from paceline.server.engine.engine import Engine
from paceline.server.engine.interface import ModelInfo
from paceline.server.engine.request import Request, SamplingParams, SpeculationParams, SteeringParams
from paceline.server.errors import DataError

#: Told (done, total) requests.
Progress = Callable[[int, int], None]


def make_requests(
    model: ModelInfo,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    speculation: SpeculationParams,
    seed: int | None,
    *,
    steered: bool = True,
) -> list[Request]:
    """One request per prompt.

    Args:
        sampling: of all; answers are shorter where the context ends.
        seed: request i gets one derived from (seed, i); None leaves them unseeded.
        steered: as the model is configured; off: by its target alone.

    Raises:
        DataError: a prompt leaves no room in the context, or a steered model's members cannot be given it.
    """
    off = SteeringParams(dict.fromkeys(pair.name for pair in model.steering.pairs) if model.steering else {})
    made = []
    for i, prompt in enumerate(prompts):
        steering = SteeringParams(prompts=member_prompts(prompt, model)) if steered else off
        room = model.context_length - max(map(len, (prompt, *steering.prompts)))
        if not prompt or room < 1:
            raise DataError(
                f"prompt {i} has {len(prompt)} tokens, but must have at least 1 and leave room for an answer in the "
                f"context of {model.context_length}"
            )
        own = replace(
            sampling,
            max_tokens=min(sampling.max_tokens, room),
            seed=None if seed is None else derive_seed(seed, i),
        )
        made.append(Request(str(i), model.name, tuple(prompt), own, speculation, steering=steering))
    return made


def run(engine: Engine, requests: Sequence[Request], progress: Progress | None = None) -> list[Commits]:
    """Step the engine until all requests are done; returns what each one's forwards committed."""
    commits: dict[str, Commits] = {request.id: [] for request in requests}
    for request in requests:
        engine.check(request)
        engine.submit(request)
    done = 0
    while engine.has_work:
        for request_id, event in engine.step():
            commits[request_id].append(event.token_ids)
            if event.finish_reason is not None:
                done += 1
                if progress is not None:
                    progress(done, len(requests))
    return list(commits.values())


def sequences(requests: Sequence[Request], commits: Sequence[Commits]) -> list[TokenSequence]:
    """Prompts with their answers."""
    return [
        TokenSequence((*request.prompt_ids, *chain.from_iterable(own)), len(request.prompt_ids))
        for request, own in zip(requests, commits, strict=True)
    ]


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """``count`` torch threads inside, as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
