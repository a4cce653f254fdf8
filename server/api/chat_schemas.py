"""Wire types of ``POST /v1/chat/completions``: messages in, and nothing but text in them.

A message's content is normalised to a list of text parts; ``ChatMessage.text`` joins them. Templates get
plain role/content dictionaries from ``template_messages``.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from paceline.server.api.schemas import Bookkeeping, GenerationBody, WireModel

Role = Literal["system", "developer", "user", "assistant", "tool"]


class TextPart(WireModel):
    """One part of a message; this version serves text only."""

    type: Literal["text"]
    text: str


def _parts(content: Any) -> Any:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise PydanticCustomError("content_type", "Input should be a string or a list of text parts")
    return content


def _no_calls(value: Any) -> Any:
    # Calls that a template silently leaves out would change the conversation.
    if value not in (None, []):
        raise PydanticCustomError("tool_calls", "Tool calls are not supported yet by this version")
    return value


class ChatMessage(WireModel):
    """One message of a conversation."""

    role: Role
    content: Annotated[list[TextPart], BeforeValidator(_parts)]
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[Any, AfterValidator(_no_calls)] = None
    function_call: Annotated[Any, AfterValidator(_no_calls)] = None
    # What clients echo from an earlier answer or add without meaning.
    type: Literal["text", "message"] | None = None
    annotations: Bookkeeping = None

    @property
    def text(self) -> str:
        """The content as one string; parts are joined by line breaks."""
        return "\n".join(part.text for part in self.content)


Messages = Annotated[list[ChatMessage], Field(min_length=1)]


class ChatBody(GenerationBody):
    """``POST /v1/chat/completions``."""

    messages: Messages
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    # Refused by ``refusals`` unless they ask for nothing.
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    parallel_tool_calls: Bookkeeping = None


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    """Messages as chat templates expect them; developer is the system role under its newer name."""
    return [_template_message(message) for message in messages]


def _template_message(message: ChatMessage) -> dict[str, str]:
    role = "system" if message.role == "developer" else message.role
    optional = {"name": message.name, "tool_call_id": message.tool_call_id}
    return {
        "role": role,
        "content": message.text,
        **{name: value for name, value in optional.items() if value is not None},
    }
