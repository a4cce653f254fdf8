"""A stand-in for vLLM's ``AsyncLLM`` with what the adapter calls: scripted tokens as outputs, one per step.

Outputs have the fields of ``vllm.outputs`` that are read; ``make_params`` refuses what vLLM's ``SamplingParams`` would.
Tokens are those of ``fake_engine.ByteTokenizer``.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from fake_engine import EOS_ID, VOCAB_SIZE, model_info

from paceline.server.backends.vllm.engine import Connected, VllmEngine
from paceline.server.backends.vllm.step_watch import StepWatch
from paceline.server.engine.interface import EngineObserver
from paceline.server.metrics import Metrics

FIELDS = {
    *(
        "max_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "min_tokens",
        "stop_token_ids",
        "ignore_eos",
        "seed",
    ),
    *(
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logit_bias",
        "logprobs",
        "prompt_logprobs",
    ),
    "detokenize",
}


class ClientError(Exception):
    """``vllm.exceptions.VLLMClientError``."""


class DeadError(Exception):
    """``vllm.v1.engine.exceptions.EngineDeadError``."""


def make_params(arguments: Mapping[str, Any]) -> SimpleNamespace:
    """``SamplingParams``: all that vLLM refuses is refused."""
    unknown = set(arguments) - FIELDS
    assert not unknown, f"vLLM has no {unknown}"
    params = SimpleNamespace(**arguments)
    assert params.max_tokens >= 1
    assert 0 <= params.min_tokens <= params.max_tokens
    assert params.detokenize is False
    return params


class FakeLlm:
    """See the module's docstring.

    Attributes:
        reply: what every request says, as steps of token ids; then end of sequence.
        asked: parameters by request id.
        aborted: requests that were left before their end.
        hold: requests wait before each step until it is set.
        failure: raised after the first step.
    """

    def __init__(self, reply: Sequence[Sequence[int]]) -> None:
        self.reply = reply
        self.asked: dict[str, Any] = {}
        self.aborted: list[str] = []
        self.hold = asyncio.Event()
        self.hold.set()
        self.failure: Exception | None = None
        self.errored = False
        self.shut_down = False
        self.spec_decode_metrics: Any = None
        self.watch: Callable[[Any, Any, int], None] | None = None

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str
    ) -> AsyncGenerator[SimpleNamespace, None]:
        self.asked[request_id] = sampling_params
        ids = prompt["prompt_token_ids"]
        try:
            left = sampling_params.max_tokens
            for step, tokens in enumerate([*self.reply, [EOS_ID]]):
                await self.hold.wait()
                await asyncio.sleep(0)
                if step == 1 and self.failure is not None:
                    raise self.failure
                kept = self._until_stop(tokens[:left], sampling_params)
                left -= len(kept)
                done = not left or kept[-1] in sampling_params.stop_token_ids
                yield self._output(kept, sampling_params, ids if step == 0 else None, done)
                if done:
                    return
        except (GeneratorExit, asyncio.CancelledError):
            self.aborted.append(request_id)
            raise

    def shutdown(self, timeout: float | None = None) -> None:
        self.shut_down = True

    def _until_stop(self, tokens: Sequence[int], params: Any) -> list[int]:
        ends = [i + 1 for i, token in enumerate(tokens) if token in params.stop_token_ids]
        return list(tokens[: ends[0]] if ends else tokens)

    def _output(self, tokens: Sequence[int], params: Any, prompt: Any, done: bool) -> SimpleNamespace:
        completion = SimpleNamespace(
            token_ids=tokens,
            logprobs=None if params.logprobs is None else [position(t, params.logprobs) for t in tokens],
            finish_reason=None if not done else "stop" if tokens[-1] in params.stop_token_ids else "length",
            spec_decode_metrics=self.spec_decode_metrics if done else None,
        )
        scored = None
        if prompt is not None and params.prompt_logprobs is not None:
            scored = [None, *(position(token, params.prompt_logprobs) for token in prompt[1:])]
        times = SimpleNamespace(queued_ts=1.0, scheduled_ts=1.25)
        return SimpleNamespace(
            outputs=[completion],
            prompt_logprobs=scored,
            num_cached_tokens=4,
            metrics=times,
            finished=done,
        )


def position(token: int, top: int) -> dict[int, SimpleNamespace]:
    """vLLM's dictionary: the token itself, here the third most likely, and the ``top`` most likely ones."""
    best = {(token + i) % VOCAB_SIZE: SimpleNamespace(logprob=-0.5 * i) for i in range(1, top + 1)}
    return {token: SimpleNamespace(logprob=-1.25), **best}


async def ready_engine(
    llm: FakeLlm,
    observer: EngineObserver | None = None,
    *,
    max_queued: int = 8,
    greedy_only: bool = False,
    unseeded: bool = False,
    **about: Any,
) -> VllmEngine:
    """An engine over ``llm`` that runs two choices at a time; ``about`` is of its model."""
    observer = observer or Metrics()
    watch = StepWatch("fake", observer)
    llm.watch = watch.record
    plain = {"drafts": (), "default_draft": None, "max_draft_tokens": 0, "engine": "vllm"}
    connected = Connected(
        llm,
        model_info(**{**plain, **about}),
        make_params,
        lambda error: isinstance(error, ClientError),
        max_running=2,
        watch=watch,
        greedy_only=greedy_only,
        unseeded=unseeded,
    )
    engine = VllmEngine(lambda: connected, observer, max_queued_requests=max_queued, kill=lambda: None)
    await engine.start()
    return engine
