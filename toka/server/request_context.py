"""What is known of the request at hand wherever its code runs: set by the guard, or by whoever makes a request of its own."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from toka.server.keys import ANYBODY, Caller

if TYPE_CHECKING:
    from toka.server.generation import Generation

LEAST_PRIORITY = -(2**31)  # of all that a client may ask for


@dataclass
class RequestContext:
    """request_id: as in the header x-request-id. least_priority: a lower, so more urgent one is raised to it. traceparent: the header of
    W3C Trace Context, "" without. body: kept only where the log is to show it. generations: what the request has begun."""

    request_id: str
    caller: Caller = ANYBODY
    least_priority: int = LEAST_PRIORITY
    traceparent: str = ""
    keep_body: bool = False
    body: bytes = b""
    generations: list[Generation] = field(default_factory=list)


current: ContextVar[RequestContext] = ContextVar("request")
