"""What travels between the API and the engine: requests in, token events out.

Everything here is immutable and free of tensors and HTTP, so it can cross threads and be built by any
front end. The mutable per-choice state machine is ``sequence.Sequence``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen; the processing order is that of the HTTP contract.

    Attributes:
        max_tokens: upper bound of generated tokens; 0 only scores the prompt.
        temperature: 0 is greedy (argmax of the processed logits).
        top_k: 0 is off. ``top_p``: 1.0 is off. ``min_p``: 0.0 is off.
        min_tokens: end-of-sequence and stop ids are masked until this many tokens are generated.
        seed: if set, sampling noise is a pure function of (seed, choice, position, token id).
        logprobs: None is off; k returns the chosen token's log-probability and the k most likely.
        prompt_logprobs: the same for the prompt's tokens (``echo`` with ``logprobs``).
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class SpeculationParams:
    """A request's own wishes for speculation; None means the model's configured value.

    Attributes:
        max_draft_tokens: longest block; under a fixed policy, the length of every block.
        draft: name of one of the model's proposers (``ModelInfo.drafts``), e.g. ``"ngram"``.
        lenience: 1 is exact; below it more draft tokens are accepted than exactness allows.
    """

    enabled: bool = True
    max_draft_tokens: int | None = None
    draft: str | None = None
    lenience: float = 1.0


@dataclass(frozen=True, slots=True)
class SteeringParams:
    """A request's own steering.

    Attributes:
        strengths: of the model's pairs by name, in place of their defaults; None switches a pair off.
        prompts: what each of the model's members reads, in the order of ``SteeringInfo.views``; none where all read
            the request's prompt.
    """

    strengths: Mapping[str, float | None] = field(default_factory=dict)
    prompts: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt with ``n`` choices for one served model; ids are within the model's vocabulary.

    Attributes:
        continues_text: the output goes on with the prompt's text (completions), so a leading space counts.
        streams: whether events are wanted as they come; else an engine may keep them until the last choice has ended.
    """

    id: str
    model: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    speculation: SpeculationParams = SpeculationParams()
    n: int = 1
    continues_text: bool = False
    steering: SteeringParams = SteeringParams()
    streams: bool = True


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability (nats) of one token under the raw model distribution.

    ``logprob`` is None only for a prompt's first token. ``top`` holds (token id, logprob) pairs, most likely
    first, exactly the number asked for.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """What speculation did for one choice; see the words in the HTTP contract.

    ``acceptance_histogram[i]`` counts verify steps that accepted exactly i draft tokens (length K+1, K the
    longest block this choice drafted). ``num_spec_steps`` counts the target forwards that verified a block.
    """

    num_spec_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
    acceptance_histogram: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Tokens committed by one engine step for one choice.

    The concatenation of ``text`` over a choice's events is its text, stop strings already removed. A final event
    (``finish_reason`` set) always comes, possibly with no tokens. ``token_ids`` lists every committed token,
    including a final end-of-sequence token, which adds no text.

    Attributes:
        logprobs: one entry per token of ``token_ids`` if the request asked for log-probabilities.
        prompt_logprobs: on choice 0's first event, if asked for: one entry per prompt token.
        cached_tokens: prompt tokens taken from the prefix cache.
        speculation: on the final event only.
    """

    choice: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    speculation: SpeculationStats | None = None
