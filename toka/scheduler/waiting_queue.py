"""Requests that wait for a row, in rank order: priority number first, then deadline, then arrival."""

from __future__ import annotations

import math
from heapq import heappop, heappush

from toka.scheduler.request import Rank, Waiting


class WaitingQueue:
    """A heap by rank. An aborted request stays in it, consumed, until it comes to the head."""

    def __init__(self) -> None:
        self._heap: list[tuple[Rank, Waiting]] = []
        self._deadlines: list[
            tuple[float, int, Waiting]
        ] = []  # a heap; those who began stay in it, consumed, until then

    def push(self, waiting: Waiting) -> None:
        request = waiting.request
        heappush(self._heap, (request.rank, waiting))
        if request.deadline_s < math.inf and not request.has_begun:
            heappush(self._deadlines, (request.deadline_s, request.rank.arrival, waiting))

    def take_expired(self, now_s: float) -> list[Waiting]:
        """Who should have begun before now_s and never did, in order of their deadlines; the caller ends them."""
        expired: list[Waiting] = []
        while self._deadlines and self._deadlines[0][0] < now_s:
            waiting = heappop(self._deadlines)[2]
            if not waiting.is_consumed:
                expired.append(waiting)
        return expired

    def head(self) -> Waiting | None:
        """The request whose turn is next; it stays in the queue."""
        heap = self._heap
        while heap and heap[0][1].is_consumed:
            heappop(heap)
        return heap[0][1] if heap else None

    def pop(self) -> Waiting:
        """Take out the request that `head` has just shown."""
        return heappop(self._heap)[1]
