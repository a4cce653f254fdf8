"""Every exception a user can cause or see, in one tree, and the one table that maps it to HTTP.

    PacelineError
     |-- UserError                 what the person at the command line can mend (exit code 1; ConfigError: 2)
     |    |-- ConfigError          bad flag, environment variable or configuration file
     |    |-- ModelNotFoundError   a model reference that names nothing
     |    |-- UnsupportedModelError  an architecture or format that the native engine does not run
     |    |-- ArtifactError        a checkpoint or manifest that is broken or does not fit
     |    |-- DataError            prompts or token files that cannot be read or used
     |    `-- DownloadError        no source delivered the file
     |         `-- ChecksumError   a source delivered other bytes than the pinned SHA-256
     |-- RequestError              what an API client can mend (4xx)
     |    |-- InvalidRequestError  |-- ContextLengthError |-- AuthenticationError
     |    |-- UnknownModelError    |-- PayloadTooLargeError `-- QueueFullError
     |-- UnavailableError          loading, draining or stopped: try again later (503)
     `-- EngineError               our own failure (500)

This module imports nothing of ours and no HTTP library.
"""

from dataclasses import dataclass
from typing import ClassVar


def _printable(char: str) -> str:
    return char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode("ascii")


class PacelineError(Exception):
    """Base of everything Paceline raises on purpose; ``str(error)`` is one line fit for a user.

    ``exit_code`` is what the command line returns; it knows our errors by this attribute, not by import.
    """

    exit_code: ClassVar[int] = 1


class UserError(PacelineError):
    """Something the person at the command line can mend.

    Args:
        message: one line. What it quotes of a file may be anything, so that what is not printable is escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(map(_printable, message)))


class ConfigError(UserError):
    """A bad flag, environment variable or configuration file."""

    exit_code: ClassVar[int] = 2


class ModelNotFoundError(UserError):
    """A model reference that names nothing known."""


class UnsupportedModelError(UserError):
    """A checkpoint whose architecture or format the native engine does not run."""


class ArtifactError(UserError):
    """A checkpoint, tokenizer or manifest that is broken or does not fit its use."""


class DataError(UserError):
    """Prompts or token files that cannot be read or used; the message names file and line where there are such."""


class DownloadError(UserError):
    """No source delivered the file that was asked for."""


class ChecksumError(DownloadError):
    """A source delivered other bytes than the pinned SHA-256."""


class RequestError(PacelineError):
    """Something an API client can mend.

    Args:
        message: one sentence saying what is wrong and how to mend it.
        param: the request field at fault, if one is.
        code: a stable machine-readable word, if one fits.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class InvalidRequestError(RequestError):
    """A field that is malformed, out of range or cannot be honoured."""


class ContextLengthError(InvalidRequestError):
    """Prompt (plus the tokens asked for) longer than the model's context; the message states both lengths."""


class AuthenticationError(RequestError):
    """Missing or wrong API key."""


class UnknownModelError(RequestError):
    """A model name that this server does not serve."""


class PayloadTooLargeError(RequestError):
    """A request body over the size limit."""


class QueueFullError(RequestError):
    """The queue limit is reached; ``retry_after_seconds`` becomes the Retry-After header."""

    def __init__(self, message: str, *, retry_after_seconds: int = 1) -> None:
        super().__init__(message, code="queue_full")
        self.retry_after_seconds = retry_after_seconds


class UnavailableError(PacelineError):
    """The engine is loading, draining or stopped; ``retry_after_seconds`` becomes the Retry-After header."""

    def __init__(self, message: str, *, code: str, retry_after_seconds: int = 1) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_seconds = retry_after_seconds


class EngineError(PacelineError):
    """The engine failed; the message is for the log, clients get a request id only."""


@dataclass(frozen=True, slots=True)
class HttpError:
    """How one exception class looks on the wire: HTTP status and the ``type`` of the OpenAI error shape."""

    status: int
    type: str


#: Most specific class first; the first ``isinstance`` match decides.
HTTP_ERRORS: tuple[tuple[type[PacelineError], HttpError], ...] = (
    (AuthenticationError, HttpError(401, "authentication_error")),
    (UnknownModelError, HttpError(404, "invalid_request_error")),
    (PayloadTooLargeError, HttpError(413, "invalid_request_error")),
    (QueueFullError, HttpError(429, "rate_limit_error")),
    (RequestError, HttpError(400, "invalid_request_error")),
    (UnavailableError, HttpError(503, "service_unavailable")),
    (PacelineError, HttpError(500, "server_error")),
)


def http_error(error: PacelineError) -> HttpError:
    """Status and error type for an exception of the tree."""
    return next(http for kind, http in HTTP_ERRORS if isinstance(error, kind))
