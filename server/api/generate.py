"""From a ``Job`` to its HTTP response, streamed or whole.

Requests are queued before the response begins, so that a refusal has its proper status. Whatever ends the
response early, a hang-up included, closes every engine stream of the job.
"""

from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from paceline.server.api.disconnect import until_disconnect
from paceline.server.api.errors import wire_error
from paceline.server.api.events import PromptEvent, concatenate, submit_all, with_prompt_logprobs
from paceline.server.api.middleware import log_failure, request_id_of
from paceline.server.api.sse import DONE, SseResponse, frame
from paceline.server.api.tally import Tally
from paceline.server.api.translate import Job
from paceline.server.engine.interface import AsyncEngine
from paceline.server.engine.request import TokenEvent


async def respond(engine: AsyncEngine, job: Job, http: HttpRequest) -> Response:
    """Run the job and answer ``http``, whose body has been read.

    Raises:
        PacelineError: the engine refused the job, or failed before a whole response was complete.
        ClientGone: nobody is left to answer.
    """
    merged = await submit_all(engine, job.requests)
    events = with_prompt_logprobs(merged) if job.echoes_logprobs else merged
    if job.stream:
        return SseResponse(_frames(job, events, request_id_of(http.scope)), merged.aclose)
    try:
        return JSONResponse(await until_disconnect(http.receive, _whole(job, events)))
    finally:
        await merged.aclose()


async def _whole(job: Job, events: AsyncIterator[PromptEvent]) -> dict[str, Any]:
    tally = Tally(job.requests)
    collected: dict[tuple[int, int], list[TokenEvent]] = {}
    async for prompt, event in events:
        tally.add(prompt, event)
        collected.setdefault((prompt, event.choice), []).append(event)
    tally.require_complete()
    choices = [
        job.renderer.choice(prompt, job.index(prompt, choice), concatenate(parts), whole=True)
        for (prompt, choice), parts in sorted(collected.items())
    ]
    body = {**_head(job, job.renderer.body_object), "choices": choices, "usage": tally.usage()}
    return body | _metrics(job, tally)


async def _frames(job: Job, events: AsyncIterator[PromptEvent], request_id: str) -> AsyncIterator[bytes]:
    tally = Tally(job.requests)
    try:
        async for prompt, event in events:
            tally.add(prompt, event)
            yield frame(_chunk(job, tally, prompt, event))
        tally.require_complete()
        if job.stream_options.include_usage:
            head = _head(job, job.renderer.chunk_object)
            yield frame({**head, "choices": [], "usage": tally.usage()} | _metrics(job, tally))
        yield DONE
    except Exception as error:
        # The status line is out: the error travels as an event, without a [DONE] after it.
        log_failure(error, request_id)
        yield frame(wire_error(error, request_id).body)


def _chunk(job: Job, tally: Tally, prompt: int, event: TokenEvent) -> dict[str, Any]:
    choice = job.renderer.choice(prompt, job.index(prompt, event.choice), event, whole=False)
    chunk = {**_head(job, job.renderer.chunk_object), "choices": [choice]}
    if job.stream_options.continuous_usage_stats:
        chunk["usage"] = tally.usage()
    elif job.stream_options.include_usage:
        chunk["usage"] = None
    last = tally.complete and not job.stream_options.include_usage
    return chunk | _metrics(job, tally) if last else chunk


def _head(job: Job, kind: str) -> dict[str, Any]:
    return {
        "id": job.id,
        "object": kind,
        "created": job.created,
        "model": job.model.name,
        "system_fingerprint": job.model.system_fingerprint or None,
    }


def _metrics(job: Job, tally: Tally) -> dict[str, Any]:
    """The ``metrics`` field of a body or of a stream's last chunk; absent when nothing could speculate."""
    return {"metrics": {"speculative_decoding": tally.speculation()}} if job.reports_speculation else {}
