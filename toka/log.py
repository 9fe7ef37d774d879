"""One place that sets up logging, on stderr: short lines for people, or JSON objects for machines (floor 0)."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime

_FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The HTTP request that this code runs for; "" outside of any."""


def set_up_logging(level: str, http_level: str = "warning", log_format: str = "text") -> None:
    """Send toka's records from `level` on, and the HTTP server's from `http_level` on, to stderr.

    level: error, warning, info or debug; http_level: those of uvicorn (critical ... debug, trace). log_format: text or json.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(_FORMAT, "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("toka").setLevel(level.upper())
    logging.getLogger("uvicorn").setLevel(5 if http_level == "trace" else http_level.upper())


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: time (UTC), level, logger, message, request_id within a request, the `fields` that the caller
    gave in `extra`, and an exception's traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if of_request := request_id.get():
            line["request_id"] = of_request
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
