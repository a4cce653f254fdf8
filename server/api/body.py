"""From the bytes of a request body to a wire model, or one error sentence naming the field at fault.

Owns the parser's and the validator's error wording and the treatment of unknown fields. Knows no endpoint.
"""

import difflib
import logging
import re
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json

from paceline.server.api.schemas import WireModel
from paceline.server.errors import InvalidRequestError

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=WireModel)
Location = tuple[int | str, ...]


class BodyParser:
    """Parses request bodies; remembers which unknown fields it has warned about.

    Args:
        allow_unknown_fields: drop unknown fields with one logged warning each instead of refusing them.
    """

    def __init__(self, allow_unknown_fields: bool) -> None:
        self._allow_unknown_fields = allow_unknown_fields
        self._warned: set[str] = set()

    def parse(self, raw: bytes, schema: type[Model]) -> Model:
        """Validate a JSON object.

        Raises:
            InvalidRequestError: malformed JSON or UTF-8, a wrong type or range, or an unknown field.
        """
        data = _json_object(raw)
        while True:
            try:
                return schema.model_validate(data)
            except ValidationError as error:
                details = error.errors(include_url=False, include_context=False, include_input=False)
            # Ends, because each round drops at least one field or raises.
            self._drop_unknown(data, details, schema)

    def _drop_unknown(
        self, data: dict[str, Any], details: list[ErrorDetails], schema: type[WireModel]
    ) -> None:
        """Drop the unknown fields from ``data``, or raise for the first error that stays."""
        unknown = [error["loc"] for error in details if error["type"] == "extra_forbidden"]
        if len(unknown) < len(details):
            raise _invalid(next(error for error in details if error["type"] != "extra_forbidden"))
        if not self._allow_unknown_fields:
            raise _unknown_field(unknown[0], schema)
        for location in unknown:
            self._warn_once(location)
            _delete(data, location)

    def _warn_once(self, location: Location) -> None:
        name = re.sub(r"\[\d+\]", "[]", field_path(location))
        if name not in self._warned and len(self._warned) < 1000:  # Names come from clients: bounded.
            self._warned.add(name)
            logger.warning("request field %r is unknown and is ignored", name[:100])


def field_path(location: Sequence[int | str]) -> str:
    """``("messages", 0, "role")`` -> ``messages[0].role``."""
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in location)
    return path.removeprefix(".")


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        data = from_json(raw)
    except ValueError as error:
        raise InvalidRequestError(
            f"The request body is not valid JSON: {error}.", code="invalid_json"
        ) from error
    if not isinstance(data, dict):
        raise InvalidRequestError("The request body must be a JSON object.", code="invalid_json")
    return data


def _invalid(error: ErrorDetails) -> InvalidRequestError:
    param = field_path(error["loc"])
    if error["type"] == "missing":
        return InvalidRequestError(f"The field '{param}' is required.", param=param)
    message = error["msg"].removeprefix("Value error, ")
    return InvalidRequestError(
        f"Invalid '{param}': {message}." if param else f"{message}.", param=param or None
    )


def _unknown_field(location: Location, schema: type[WireModel]) -> InvalidRequestError:
    param = field_path(location)[:200]
    near = difflib.get_close_matches(param, schema.model_fields, n=1)
    hint = (
        f"did you mean '{near[0]}'?"
        if near
        else "remove it, or start the server with --allow-unknown-fields."
    )
    return InvalidRequestError(f"Unknown field '{param}': {hint}", param=param, code="unknown_field")


def _delete(data: dict[str, Any], location: Location) -> None:
    holder: Any = data
    for step in location[:-1]:
        holder = holder[step]
    del holder[location[-1]]
