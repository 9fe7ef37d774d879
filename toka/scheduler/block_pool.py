"""The KV blocks: who holds how many shares of which, and in which order free ones are reused.

Only this module writes block ids and reference counts. A block is free when nobody holds it; a free block may still be
cached, that is, findable through the prefix index until it is taken for something else. Free blocks without content go
first (last freed first, its memory is warm); then cached ones, those first whose content is worth least (retention.py).
A request gives its blocks back tail first, so that of two blocks freed together the one further from the root of the
prefix tree is evicted sooner.
"""

from __future__ import annotations

import numpy as np

from toka.errors import InvariantError
from toka.plan import I32
from toka.scheduler.prefix_index import PrefixIndex
from toka.scheduler.retention import FOUND_AGAIN, ORDINARY, RetentionQueues

_EVICTED_TOGETHER = 32


class BlockPool:
    """num_blocks blocks with reference counts, all operations vectorised over blocks.

    by_worth: evict cached blocks by their worth; else least recently used first, whatever they are worth.
    """

    def __init__(self, num_blocks: int, index: PrefixIndex, *, by_worth: bool = True):
        self.num_blocks = num_blocks
        self._index, self._by_worth = index, by_worth
        self._ref_counts = np.zeros(num_blocks, dtype=np.int32)
        self._blank = np.arange(num_blocks, dtype=np.int32)[::-1].copy()  # a stack of free blocks without content
        self._num_blank = num_blocks
        self._cached = RetentionQueues(num_blocks)

    @property
    def num_free(self) -> int:
        """Blocks free to take at once, cached or not."""
        return self._num_blank + len(self._cached)

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
        """Evict some cached blocks if clearly fewer than `wanted` free ones are without content.

        That is before they are needed, so that no single `take` has to evict many; max_evicted at a time or a small batch, if
        that is more, since evicting a few costs as much as one.
        """
        count = max(max_evicted, min(wanted, _EVICTED_TOGETHER))
        if 0 < count <= wanted - self._num_blank and len(self._cached):
            self._push_blank(self._evict(min(count, len(self._cached)))[::-1])

    def _evict(self, count: int) -> I32:
        evicted = self._cached.pop(count)
        self._index.forget(evicted)
        return evicted

    def share(self, blocks: I32) -> None:
        """Lease blocks found in the prefix index once more; distinct, held by someone or free."""
        counts = self._ref_counts[blocks]
        free = blocks[counts == 0]
        self._cached.remove(free)
        if len(free) and self._by_worth:
            self._cached.raise_worth(
                blocks, FOUND_AGAIN
            )  # also those held: none may be worth less than what follows it
        self._ref_counts[blocks] = counts + 1

    def release(self, blocks: I32, worth: int = ORDINARY) -> None:
        """Give one lease of each block back; distinct, in the order in which they may be reused; worth: see retention.worth_of."""
        counts = self._ref_counts[blocks] - 1
        if np.any(counts < 0):
            raise InvariantError("a block was given back that nobody holds")
        self._ref_counts[blocks] = counts
        free, cached = counts == 0, self._index.is_cached(blocks)
        if worth and self._by_worth:
            self._cached.raise_worth(blocks[cached], worth)
        self._push_blank(blocks[free & ~cached])
        self._cached.put(blocks[free & cached])

    def _push_blank(self, blocks: I32) -> None:
        end = self._num_blank + len(blocks)
        self._blank[self._num_blank : end] = blocks
        self._num_blank = end

    def check_invariants(self, held: I32) -> None:
        """Raise InvariantError unless reference counts equal `held` (every lease in force, one entry each) and each block
        that nobody holds is free exactly once."""
        if not np.array_equal(np.bincount(held, minlength=self.num_blocks), self._ref_counts):
            raise InvariantError("reference counts disagree with the block tables")
        queued = self._cached.queued()
        blank = self._blank[: self._num_blank]
        free = np.sort(np.concatenate((queued, blank)))
        if not np.array_equal(free, np.flatnonzero(self._ref_counts == 0)) or len(queued) != len(self._cached):
            raise InvariantError("the free lists disagree with the reference counts")
        if np.any(self._index.is_cached(blank)) or not np.all(self._index.is_cached(queued)):
            raise InvariantError("the free lists disagree with the prefix index")
