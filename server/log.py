"""How log lines look: plain text, or one JSON object per line; always on stderr, access log included.

Configures the loggers of Paceline, uvicorn and everything else once, when a server starts. Callers attach
machine-readable fields with ``logger.info(message, extra={"data": {...}})``; text shows the message only.
"""

import json
import logging
import logging.config
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

#: Arguments of uvicorn's access log line, in its order.
_ACCESS_FIELDS = ("client", "method", "path", "http_version", "status")


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time (UTC), level, logger, message, and the record's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update(_fields(record))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    if record.name == "uvicorn.access" and isinstance(record.args, tuple):
        return dict(zip(_ACCESS_FIELDS, record.args, strict=False))
    data: Mapping[str, Any] = getattr(record, "data", {})
    return data


def configure_logging(log_format: Literal["text", "json"]) -> None:
    """Send every logger of this process to stderr in the given format; Python warnings too."""
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {
                "text": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"},
                "json": {"()": JsonFormatter},
            },
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": log_format}},
            "root": {"handlers": ["stderr"], "level": "WARNING"},
            "loggers": {
                "paceline": {"level": "INFO"},
                "uvicorn": {"level": "WARNING"},
                "uvicorn.access": {"level": "INFO"},
            },
        }
    )
    logging.captureWarnings(True)
