"""What the operator decides about the HTTP face: keys, limits and strictness.

Filled by the configuration layer; read by the middleware and the routes. Knows nothing of the engine's own
settings. Sizes are in bytes or characters, as their names say.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """Settings of the HTTP API.

    Attributes:
        api_keys: bearer tokens that open the client endpoints; empty means that no key is needed.
        admin_keys: bearer tokens of operators; they open the client endpoints too.
        allow_unknown_fields: drop unknown request fields with one logged warning each instead of a 400.
        max_body_bytes: larger request bodies are refused with 413, streamed ones included.
        max_choices: upper bound of prompts x ``n`` in one request.
        inline_tokenize_chars: longer texts are tokenised in a worker thread, so that the event loop stays
            free (about a millisecond of work at this size).
    """

    api_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    allow_unknown_fields: bool = False
    max_body_bytes: int = 4 * 1024 * 1024
    max_choices: int = 1024
    inline_tokenize_chars: int = 4096
