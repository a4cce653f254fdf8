"""Wire types that several endpoints share: the strict base, sampling fields, stream and speculation options.

Types and ranges that need no model are checked here; what depends on the model or on other fields is
checked in ``sampling``. A null is the same as an absent field.
"""

from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_STOP_STRINGS: Final = 4
MAX_STOP_CHARS: Final = 4096
MAX_STOP_TOKEN_IDS: Final = 256
MAX_CHOICES_PER_PROMPT: Final = 128
#: Beyond these the scaled logits leave the range of fp32.
REPETITION_PENALTY_RANGE: Final = (0.01, 100.0)


class WireModel(BaseModel):
    """Base of everything that arrives: no coercion, no NaN, no unknown fields, nulls dropped."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {name: value for name, value in data.items() if value is not None}
        return data


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Bookkeeping = Any  # Accepted in any shape, because it has no effect on what is generated.
Penalty = Annotated[float, Field(ge=-2, le=2)]
StopStrings = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]],
    BeforeValidator(_listed),
    Field(max_length=MAX_STOP_STRINGS),
]


class StreamOptions(WireModel):
    """``stream_options`` of both endpoints."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SpeculationBody(WireModel):
    """Our ``speculation`` object."""

    enabled: bool | None = None
    max_draft_tokens: int | None = Field(None, ge=0)
    draft: str | None = None
    lenience: float | None = Field(None, gt=0, le=1)


class SteeringBody(WireModel):
    """Our ``steering`` object: exactly one of its fields."""

    alpha: float | None = None
    beta: float | None = None
    weights: dict[str, float] | None = Field(None, min_length=1)


class GenerationBody(WireModel):
    """Fields that completions and chat completions share."""

    model: str
    max_tokens: int | None = Field(None, ge=0)
    max_completion_tokens: int | None = Field(None, ge=0)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    n: int = Field(1, ge=1, le=MAX_CHOICES_PER_PROMPT)
    stop: StopStrings = []
    stop_token_ids: list[int] = Field([], max_length=MAX_STOP_TOKEN_IDS)
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)  # Signed or unsigned 64 bits.
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: float = Field(1.0, ge=REPETITION_PENALTY_RANGE[0], le=REPETITION_PENALTY_RANGE[1])
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = {}
    stream: bool = False
    stream_options: StreamOptions | None = None
    speculation: SpeculationBody | None = None
    steering: SteeringBody | None = None

    # Refused by ``refusals`` unless they ask for nothing.
    response_format: Any = None
    prediction: Any = None

    user: Bookkeeping = None
    store: Bookkeeping = None
    metadata: Bookkeeping = None
    service_tier: Bookkeeping = None
    safety_identifier: Bookkeeping = None
    prompt_cache_key: Bookkeeping = None
    prompt_cache_retention: Bookkeeping = None

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """Name and value of the field that bounds the output; None if the client set neither."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens


class CompletionBody(GenerationBody):
    """``POST /v1/completions``. ``prompt`` has four shapes, told apart in ``prompts``."""

    prompt: Any
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: int | None = None
    suffix: str | None = None
