"""The generations that run, by the id of the request they belong to."""

from __future__ import annotations

from toka.server.generation import Generation
from toka.server.keys import Caller
from toka.server.request_context import RequestContext


class RunningRequests:
    """A client may use one id for several requests at once: then all of them go by it."""

    def __init__(self) -> None:
        self._by_id: dict[str, list[tuple[RequestContext, Generation]]] = {}

    def add(self, context: RequestContext, generation: Generation) -> None:
        """It is about to begin."""
        self._by_id.setdefault(context.request_id, []).append((context, generation))

    def remove(self, context: RequestContext, generation: Generation) -> None:
        """It is over."""
        of_id = self._by_id[context.request_id]
        of_id[:] = [entry for entry in of_id if entry[1] is not generation]
        if not of_id:
            del self._by_id[context.request_id]

    def of(self, name: str, caller: Caller) -> list[Generation]:
        """What runs under this name and belongs to caller, or to anybody if caller is the admin.

        name: the request's x-request-id, or the id of its reply, which is made of it (`chatcmpl-...`).
        """
        entries = self._by_id.get(name) or self._by_id.get(name.partition("-")[2], [])
        return [
            generation for context, generation in entries if caller.is_admin or context.caller.owner == caller.owner
        ]
