"""The endpoints. Each one reads as: is the engine there, parse, translate, answer.

``Services`` is what they share; ``app.create_app`` puts it on ``app.state``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from paceline.server.api.body import BodyParser
from paceline.server.api.chat_schemas import ChatBody
from paceline.server.api.generate import respond
from paceline.server.api.prompts import check_vocabulary, conversation_ids, text_ids
from paceline.server.api.schemas import CompletionBody
from paceline.server.api.settings import ApiSettings
from paceline.server.api.tokenize_schemas import DetokenizeBody, TokenizeBody
from paceline.server.api.translate import chat_job, completion_job
from paceline.server.engine.interface import AsyncEngine, EngineState, ModelInfo
from paceline.server.errors import InvalidRequestError, UnavailableError, UnknownModelError
from paceline.server.metrics import Metrics

router = APIRouter()

#: Why each state cannot serve, and after how many seconds a retry makes sense.
_UNAVAILABLE: Mapping[EngineState, tuple[str, int]] = {
    "loading": ("The server is still loading its models; try again soon.", 5),
    "draining": ("The server is shutting down and takes no new requests.", 5),
    "stopped": ("The server has stopped.", 10),
    "failed": ("The engine has failed; the server has to be restarted.", 30),
}


@dataclass(frozen=True, slots=True)
class Services:
    """What the endpoints work with."""

    engine: AsyncEngine
    settings: ApiSettings
    metrics: Metrics
    parser: BodyParser

    def require(self, *usable: EngineState) -> None:
        """Raise UnavailableError unless the engine is in one of the ``usable`` states."""
        state = self.engine.state
        if state not in usable:
            message, retry_after_seconds = _UNAVAILABLE[state]
            raise UnavailableError(message, code=state, retry_after_seconds=retry_after_seconds)

    def model(self, name: str) -> ModelInfo:
        """The served model of this name."""
        model = self.engine.models.get(name)
        if model is None:
            raise UnknownModelError(
                f"The model '{name[:200]}' is not served here; there is: {', '.join(self.engine.models)}.",
                param="model",
                code="model_not_found",
            )
        return model

    def model_or_only(self, name: str | None) -> ModelInfo:
        """The named model, or the only one there is."""
        if name is None and len(self.engine.models) != 1:
            raise InvalidRequestError(
                f"Several models are served; name one of them: {', '.join(self.engine.models)}.",
                param="model",
            )
        return self.model(next(iter(self.engine.models)) if name is None else name)


@router.post("/v1/completions")
async def completions(http: Request) -> Response:
    """Complete prompts."""
    services = _services(http)
    # Draining: the engine itself refuses, so that no request slips in between.
    services.require("ready", "draining")
    body = services.parser.parse(await http.body(), CompletionBody)
    job = await completion_job(body, services.model(body.model), services.settings)
    return await respond(services.engine, job, http)


@router.post("/v1/chat/completions")
async def chat_completions(http: Request) -> Response:
    """Answer a conversation."""
    services = _services(http)
    services.require("ready", "draining")
    body = services.parser.parse(await http.body(), ChatBody)
    job = await chat_job(body, services.model(body.model), services.settings)
    return await respond(services.engine, job, http)


@router.get("/v1/models")
async def list_models(http: Request) -> Response:
    """All served models."""
    services = _services(http)
    services.require("ready", "draining")
    return JSONResponse(
        {"object": "list", "data": [_model_card(model) for model in services.engine.models.values()]}
    )


@router.get("/v1/models/{name:path}")
async def get_model(http: Request, name: str) -> Response:
    """One served model."""
    services = _services(http)
    services.require("ready", "draining")
    return JSONResponse(_model_card(services.model(name)))


@router.post("/tokenize")
async def tokenize(http: Request) -> Response:
    """Token ids of a text or a conversation."""
    services = _services(http)
    services.require("ready", "draining")
    body = services.parser.parse(await http.body(), TokenizeBody)
    model = services.model_or_only(body.model)
    ids = await _tokenized(body, model, services.settings.inline_tokenize_chars)
    return JSONResponse({"count": len(ids), "max_model_len": model.context_length, "tokens": ids})


@router.post("/detokenize")
async def detokenize(http: Request) -> Response:
    """Text of token ids, special tokens included."""
    services = _services(http)
    services.require("ready", "draining")
    body = services.parser.parse(await http.body(), DetokenizeBody)
    model = services.model_or_only(body.model)
    check_vocabulary(body.tokens, model, "tokens")
    return JSONResponse({"prompt": model.tokenizer.decode(body.tokens, skip_special_tokens=False)})


@router.get("/health")
async def health(http: Request) -> Response:
    """Alive: yes from the first moment on, until the engine has failed for good."""
    _services(http).require("loading", "ready", "draining", "stopped")
    return JSONResponse({"status": "ok"})


@router.get("/ready")
async def ready(http: Request) -> Response:
    """Loaded and taking requests."""
    _services(http).require("ready")
    return JSONResponse({"status": "ready"})


@router.get("/metrics")
async def metrics(http: Request) -> Response:
    """Prometheus text."""
    return Response(_services(http).metrics.render(), media_type=CONTENT_TYPE_LATEST)


@router.get("/version")
async def get_version() -> Response:
    """Version of the server."""
    return JSONResponse({"version": version("paceline")})


def _services(http: Request) -> Services:
    services: Services = http.app.state.services
    return services


async def _tokenized(body: TokenizeBody, model: ModelInfo, inline_chars: int) -> list[int]:
    if body.prompt is not None:
        special = body.add_special_tokens is not False
        return await text_ids(body.prompt, model, inline_chars=inline_chars, add_special_tokens=special)
    assert body.messages is not None
    prompting = body.add_generation_prompt is not False
    return list(
        await conversation_ids(
            body.messages, model, inline_chars=inline_chars, add_generation_prompt=prompting
        )
    )


def _model_card(model: ModelInfo) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "paceline",
        "max_model_len": model.context_length,
    }
