"""Server-sent events: framing, and a response that stops its source the moment the client hangs up.

Knows bytes and connections, nothing of tokens.
"""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from paceline.server.api.disconnect import until_disconnect

DONE: Final = b"data: [DONE]\n\n"


def frame(payload: dict[str, Any]) -> bytes:
    """One ``data:`` event; JSON escapes line breaks, so one line is enough."""
    text = json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return b"data: " + text.encode() + b"\n\n"


class SseResponse(StreamingResponse):
    """A ``text/event-stream`` response.

    Starlette's own notices a hang-up only when it next sends, or cancels in a way that forbids awaiting in
    clean-up code; this one listens all the time.

    Args:
        frames: encoded events.
        close: awaited exactly once, when the stream has ended in whatever way.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncIterator[bytes], close: Callable[[], Awaitable[None]]) -> None:
        # Without these headers, proxies collect the events and deliver them late.
        super().__init__(frames, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; raises ClientGone if the client hung up first."""
        try:
            await until_disconnect(receive, self.stream_response(send))
        finally:
            await self._close()
