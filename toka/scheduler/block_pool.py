"""The KV blocks: who holds how many shares of which, and in which order free ones are reused.

Only this module writes block ids and reference counts. A block is free when nobody holds it; a free block may still be
cached, that is, findable through the prefix index until it is taken for something else. Free blocks without content go
first (last freed first, its memory is warm); then cached ones, least recently used first. A request gives its blocks
back tail first, so that of two blocks freed together the one further from the root of the prefix tree is evicted
sooner.
"""

from __future__ import annotations

import numpy as np

from toka.errors import InvariantError
from toka.plan import I32, I64
from toka.scheduler.prefix_index import PrefixIndex

_QUEUE_SLACK = 4  # the queue holds so many times num_blocks entries before holes are squeezed out; amortised cost of a push is O(1)


class BlockPool:
    """num_blocks blocks with reference counts, all operations vectorised over blocks."""

    def __init__(self, num_blocks: int, index: PrefixIndex):
        self.num_blocks = num_blocks
        self._index = index
        self._ref_counts = np.zeros(num_blocks, dtype=np.int32)
        self._blank = np.arange(num_blocks, dtype=np.int32)[::-1].copy()  # a stack of free blocks without content
        self._num_blank = num_blocks
        # Free cached blocks in order of their freeing. A block that is shared again leaves a hole: entry i counts only
        # while _place[_queue[i]] == i.
        self._queue = np.zeros(_QUEUE_SLACK * num_blocks, dtype=np.int32)
        self._place = np.full(num_blocks, -1, dtype=np.int64)
        self._head = self._tail = 0
        self._num_cached_free = 0

    @property
    def num_free(self) -> int:
        """Blocks free to take at once, cached or not."""
        return self._num_blank + self._num_cached_free

    def ref_counts(self, blocks: I32) -> I32:
        """Holders of each block; int32, shape of blocks."""
        return self._ref_counts[blocks]

    def take(self, count: int) -> I32:
        """Lease `count` free blocks, evicting cached ones if need be; int32 [count]. The caller has looked at num_free."""
        if count > self.num_free:
            raise InvariantError(f"{count} blocks wanted, {self.num_free} free")
        num_blank = min(count, self._num_blank)
        self._num_blank -= num_blank
        blocks = self._blank[self._num_blank : self._num_blank + num_blank][::-1].copy()
        if num_blank < count:
            blocks = np.concatenate((blocks, self._evict(count - num_blank)))
        self._ref_counts[blocks] = 1
        return blocks

    def keep_blank(self, wanted: int, max_evicted: int) -> None:
        """Evict cached blocks, at most max_evicted of them, while fewer than `wanted` free ones are without content.

        A little at a time before they are needed, so that no single `take` has to evict many.
        """
        count = min(wanted - self._num_blank, max_evicted, self._num_cached_free)
        if count > 0:
            self._push_blank(self._evict(count)[::-1])

    def _evict(self, count: int) -> I32:
        evicted = self._pop_least_recent(count)
        self._index.forget(evicted)
        return evicted

    def share(self, blocks: I32) -> None:
        """Lease blocks found in the prefix index once more; distinct, held by someone or free."""
        counts = self._ref_counts[blocks]
        free = blocks[counts == 0]
        if np.any(self._place[free] < 0):
            raise InvariantError("a block without content cannot be shared")
        self._place[free] = -1
        self._num_cached_free -= len(free)
        self._ref_counts[blocks] = counts + 1

    def release(self, blocks: I32) -> None:
        """Give one lease of each block back; distinct, in the order in which they may be reused."""
        counts = self._ref_counts[blocks] - 1
        if np.any(counts < 0):
            raise InvariantError("a block was given back that nobody holds")
        self._ref_counts[blocks] = counts
        free = blocks[counts == 0]
        cached = self._index.is_cached(free)
        self._push_blank(free[~cached])
        self._push_least_recent(free[cached])

    def _push_blank(self, blocks: I32) -> None:
        end = self._num_blank + len(blocks)
        self._blank[self._num_blank : end] = blocks
        self._num_blank = end

    def _push_least_recent(self, blocks: I32) -> None:
        if self._tail + len(blocks) > len(self._queue):
            self._squeeze()
        places: I64 = np.arange(self._tail, self._tail + len(blocks), dtype=np.int64)
        self._queue[places] = blocks
        self._place[blocks] = places
        self._tail += len(blocks)
        self._num_cached_free += len(blocks)

    def _pop_least_recent(self, count: int) -> I32:
        found: list[I32] = []
        missing = count
        while missing:
            window = self._queue[self._head : min(self._head + missing, self._tail)]
            blocks = window[self._place[window] == np.arange(self._head, self._head + len(window))]
            self._head += len(window)
            missing -= len(blocks)
            found.append(blocks)
        blocks = found[0].copy() if len(found) == 1 else np.concatenate(found)
        self._place[blocks] = -1
        self._num_cached_free -= count
        return blocks

    def _squeeze(self) -> None:
        entries = self._queue[self._head : self._tail]
        kept = entries[self._place[entries] == np.arange(self._head, self._tail)]
        self._queue[: len(kept)] = kept
        self._place[kept] = np.arange(len(kept))
        self._head, self._tail = 0, len(kept)

    def check_invariants(self, held: I32) -> None:
        """Raise InvariantError unless reference counts equal `held` (every lease in force, one entry each) and each block
        that nobody holds is free exactly once."""
        if not np.array_equal(np.bincount(held, minlength=self.num_blocks), self._ref_counts):
            raise InvariantError("reference counts disagree with the block tables")
        entries = self._queue[self._head : self._tail]
        queued = entries[self._place[entries] == np.arange(self._head, self._tail)]
        blank = self._blank[: self._num_blank]
        free = np.sort(np.concatenate((queued, blank)))
        if not np.array_equal(free, np.flatnonzero(self._ref_counts == 0)) or len(queued) != self._num_cached_free:
            raise InvariantError("the free lists disagree with the reference counts")
        if np.any(self._index.is_cached(blank)) or not np.all(self._index.is_cached(queued)):
            raise InvariantError("the free lists disagree with the prefix index")
