"""``AsyncPaceline``: the ``openai.AsyncOpenAI`` client with typed speculation and steering.

Owns the asynchronous classes only; the fields and their types are in ``extensions``. Everything not written
here (retries, timeouts, raw responses, pagination, errors) is the ``openai`` package's behaviour, unchanged.

    client = AsyncPaceline()
    reply = await client.chat.completions.create(model=..., messages=[...], speculation={"enabled": False})
    print(reply.choices[0].message.content, reply.speculation)
"""

from functools import cached_property
from typing import TYPE_CHECKING, Any, Unpack, overload

from openai import AsyncOpenAI, resources

from paceline.clients.extensions import (
    AsyncSpeculationStream,
    ChatCompletion,
    ChatCompletionChunk,
    ChatMaybeStreamParams,
    ChatParams,
    ChatStreamParams,
    Completion,
    CompletionMaybeStreamParams,
    CompletionParams,
    CompletionStreamParams,
    local_defaults,
    same_signature,
    typed_reply,
    with_extensions,
)

__all__ = ["AsyncPaceline"]


class AsyncChatCompletions(resources.chat.AsyncCompletions):
    """``client.chat.completions``."""

    # The override: openai's annotations also allow its ``omit`` marker as a value; ours ask to leave it out.
    @overload  # type: ignore[override]
    async def create(self, **params: Unpack[ChatParams]) -> ChatCompletion: ...
    @overload
    async def create(
        self, **params: Unpack[ChatStreamParams]
    ) -> AsyncSpeculationStream[ChatCompletionChunk]: ...
    @overload
    async def create(
        self, **params: Unpack[ChatMaybeStreamParams]
    ) -> ChatCompletion | AsyncSpeculationStream[ChatCompletionChunk]: ...
    async def create(self, **params: Any) -> Any:
        """openai's ``create`` plus ``speculation`` and ``steering``; see ``extensions``."""
        return await super().create(**with_extensions(params))


class AsyncCompletions(resources.AsyncCompletions):
    """``client.completions``."""

    # The override: openai's annotations also allow its ``omit`` marker as a value; ours ask to leave it out.
    @overload  # type: ignore[override]
    async def create(self, **params: Unpack[CompletionParams]) -> Completion: ...
    @overload
    async def create(
        self, **params: Unpack[CompletionStreamParams]
    ) -> AsyncSpeculationStream[Completion]: ...
    @overload
    async def create(
        self, **params: Unpack[CompletionMaybeStreamParams]
    ) -> Completion | AsyncSpeculationStream[Completion]: ...
    async def create(self, **params: Any) -> Any:
        """openai's ``create`` plus ``speculation`` and ``steering``; see ``extensions``."""
        return await super().create(**with_extensions(params))


class AsyncChat(resources.AsyncChat):
    """``client.chat``."""

    @cached_property
    def completions(self) -> AsyncChatCompletions:
        """Chat completions with Paceline's extensions."""
        return AsyncChatCompletions(self._client)


class AsyncPaceline(AsyncOpenAI):
    """Asynchronous client; takes what ``openai.AsyncOpenAI`` takes.

    ``base_url`` defaults to ``PACELINE_BASE_URL`` or http://127.0.0.1:8000/v1, ``api_key`` to
    ``PACELINE_API_KEY`` or a placeholder.
    """

    @same_signature(AsyncOpenAI.__init__)
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **local_defaults(options))

    @cached_property
    def chat(self) -> AsyncChat:
        """The chat resource."""
        return AsyncChat(self)

    @cached_property
    def completions(self) -> AsyncCompletions:
        """The text completion resource."""
        return AsyncCompletions(self)

    if not TYPE_CHECKING:  # The signature stays openai's; only the classes that replies become are exchanged.

        def post(self, path, **options):
            """openai's ``post``, parsing completions into the classes of ``extensions``."""
            return super().post(path, **typed_reply(options))
