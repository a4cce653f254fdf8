"""``Paceline``: the ``openai.OpenAI`` client with typed speculation and steering.

Owns the synchronous classes only; the fields and their types are in ``extensions``. Everything not written
here (retries, timeouts, raw responses, pagination, errors) is the ``openai`` package's behaviour, unchanged.

    client = Paceline()
    reply = client.chat.completions.create(model=..., messages=[...], speculation={"enabled": False})
    print(reply.choices[0].message.content, reply.speculation)
"""

from functools import cached_property
from typing import TYPE_CHECKING, Any, Unpack, overload

from openai import OpenAI, resources

from paceline.clients.extensions import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatMaybeStreamParams,
    ChatParams,
    ChatStreamParams,
    Completion,
    CompletionMaybeStreamParams,
    CompletionParams,
    CompletionStreamParams,
    SpeculationStream,
    local_defaults,
    same_signature,
    typed_reply,
    with_extensions,
)

__all__ = ["Paceline"]


class ChatCompletions(resources.chat.Completions):
    """``client.chat.completions``."""

    # The override: openai's annotations also allow its ``omit`` marker as a value; ours ask to leave it out.
    @overload  # type: ignore[override]
    def create(self, **params: Unpack[ChatParams]) -> ChatCompletion: ...
    @overload
    def create(self, **params: Unpack[ChatStreamParams]) -> SpeculationStream[ChatCompletionChunk]: ...
    @overload
    def create(
        self, **params: Unpack[ChatMaybeStreamParams]
    ) -> ChatCompletion | SpeculationStream[ChatCompletionChunk]: ...
    def create(self, **params: Any) -> Any:
        """openai's ``create`` plus ``speculation`` and ``steering``; see ``extensions``."""
        return super().create(**with_extensions(params))


class Completions(resources.Completions):
    """``client.completions``."""

    # The override: openai's annotations also allow its ``omit`` marker as a value; ours ask to leave it out.
    @overload  # type: ignore[override]
    def create(self, **params: Unpack[CompletionParams]) -> Completion: ...
    @overload
    def create(self, **params: Unpack[CompletionStreamParams]) -> SpeculationStream[Completion]: ...
    @overload
    def create(
        self, **params: Unpack[CompletionMaybeStreamParams]
    ) -> Completion | SpeculationStream[Completion]: ...
    def create(self, **params: Any) -> Any:
        """openai's ``create`` plus ``speculation`` and ``steering``; see ``extensions``."""
        return super().create(**with_extensions(params))


class Chat(resources.Chat):
    """``client.chat``."""

    @cached_property
    def completions(self) -> ChatCompletions:
        """Chat completions with Paceline's extensions."""
        return ChatCompletions(self._client)


class Paceline(OpenAI):
    """Synchronous client; takes what ``openai.OpenAI`` takes.

    ``base_url`` defaults to ``PACELINE_BASE_URL`` or http://127.0.0.1:8000/v1, ``api_key`` to
    ``PACELINE_API_KEY`` or a placeholder.
    """

    @same_signature(OpenAI.__init__)
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **local_defaults(options))

    @cached_property
    def chat(self) -> Chat:
        """The chat resource."""
        return Chat(self)

    @cached_property
    def completions(self) -> Completions:
        """The text completion resource."""
        return Completions(self)

    if not TYPE_CHECKING:  # The signature stays openai's; only the classes that replies become are exchanged.

        def post(self, path, **options):
            """openai's ``post``, parsing completions into the classes of ``extensions``."""
            return super().post(path, **typed_reply(options))
