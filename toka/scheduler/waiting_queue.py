"""Requests that wait for a row: priority number first, then arrival."""

from __future__ import annotations

from heapq import heappop, heappush

from toka.scheduler.request import Waiting


class WaitingQueue:
    """A heap by rank. An aborted request stays in it, consumed, until it comes to the head."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], Waiting]] = []

    def push(self, waiting: Waiting) -> None:
        heappush(self._heap, (waiting.request.rank, waiting))

    def head(self) -> Waiting | None:
        """The request whose turn is next; it stays in the queue."""
        heap = self._heap
        while heap and heap[0][1].is_consumed:
            heappop(heap)
        return heap[0][1] if heap else None

    def pop(self) -> Waiting:
        """Take out the request that `head` has just shown."""
        return heappop(self._heap)[1]
