"""One place that sets up logging: short lines on stderr (floor 0)."""

from __future__ import annotations

import logging
import sys

_FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"


def set_up_logging(level: str, http_level: str = "warning") -> None:
    """Send toka's records from `level` on, and the HTTP server's from `http_level` on, to stderr.

    level: error, warning, info or debug; http_level: those of uvicorn (critical ... debug, trace).
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT, "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("toka").setLevel(level.upper())
    logging.getLogger("uvicorn").setLevel(5 if http_level == "trace" else http_level.upper())
