"""Which free cached block is overwritten next: the one whose content is worth least, by recency and by cost of computing it
again.

Each block has a worth w, a small whole number, and 2^w says how many times as long as an ordinary block it is kept. Time is counted in
cached blocks freed: a block freed at time t is due at t + (2^w - 1) * num_blocks, and what is due first goes first. This is GreedyDual
(Young 1994; Cao and Irani 1997) with few classes of cost: within a class blocks become due in the order of their freeing, so one queue
per class and a merge of their heads do, O(1) amortised and vectorised. With all worths 0 it is plain LRU.

A block is of use only if all blocks before it in its prefix are there. So it is never worth more than they are, which holds since
a request lends its worth to all its blocks, a block keeps the highest that it was lent, and who holds a block holds its prefix.
"""

from __future__ import annotations

import numpy as np

from toka.errors import InvariantError
from toka.plan import I32, I64

ORDINARY = 0  # seen once so far
FOUND_AGAIN = 1  # at least: it was found by another request after it had been free
COMES_BACK = 3  # part of a conversation that goes on, or of a request that was preempted
# Attention makes a token at position p of a prefix cost about 1 + p / (6 * hidden size) of what one at its start does: for the hidden
# sizes of today's models, twice and more from such lengths on.
LONG_PREFIX_TOKENS = (8192, 32768)
_NUM_WORTHS = COMES_BACK + len(LONG_PREFIX_TOKENS) + 1

_NEVER = np.iinfo(np.int64).max
_HOLES_AT_ONCE = 64
_QUEUE_SLACK = 2  # a queue holds so many times num_blocks entries before holes are squeezed out


def worth_of(*, comes_back: bool, num_tokens: int) -> int:
    """What the blocks of a request of so many tokens are worth when it gives them back."""
    worth = COMES_BACK if comes_back else ORDINARY
    return worth + sum(num_tokens >= length for length in LONG_PREFIX_TOKENS)


class RetentionQueues:
    """The free cached blocks in the order in which they will go; the only writer of worths."""

    def __init__(self, num_blocks: int):
        # Queue w is entries[heads[w] : tails[w]], from place w * room on. A block that is taken out leaves a hole: the entry at a place
        # counts only while the block's place is that one.
        self._num_blocks, self._room = num_blocks, _QUEUE_SLACK * num_blocks
        self._entries = np.zeros(_NUM_WORTHS * self._room, dtype=np.int32)
        self._due = np.zeros(_NUM_WORTHS * self._room, dtype=np.int64)
        self._heads = [worth * self._room for worth in range(_NUM_WORTHS)]
        self._tails = self._heads.copy()
        self._place = np.full(num_blocks, -1, dtype=np.int64)
        self._worth = np.zeros(num_blocks, dtype=np.int8)
        self._num_freed = 0
        self._num_queued = 0

    def __len__(self) -> int:
        return self._num_queued

    def put(self, blocks: I32) -> None:
        """These cached blocks are free now, in the order in which they may go."""
        if not len(blocks):
            return
        freed = np.arange(self._num_freed, self._num_freed + len(blocks), dtype=np.int64)
        self._num_freed += len(blocks)
        self._num_queued += len(blocks)
        worths = self._worth[blocks]
        lowest, highest = int(worths.min()), int(worths.max())
        if lowest == highest:
            self._append(blocks, freed, lowest)
            return
        for each in range(lowest, highest + 1):
            alike = worths == each
            self._append(blocks[alike], freed[alike], each)

    def remove(self, blocks: I32) -> None:
        """These free cached blocks are held again."""
        if np.any(self._place[blocks] < 0):
            raise InvariantError("a block without content cannot be shared")
        self._place[blocks] = -1
        self._num_queued -= len(blocks)

    def raise_worth(self, blocks: I32, worth: int) -> None:
        """These cached blocks, which are held, are worth so much at least."""
        self._worth[blocks] = np.maximum(self._worth[blocks], np.int8(worth))

    def pop(self, count: int) -> I32:
        """Take out the `count` blocks that go first, of at least as many; int32 [count]. They are worth nothing from now on."""
        found: list[I32] = []
        missing = count
        while missing:
            worth, until = self._first_due()
            blocks = self._pop_from(worth, missing, until)
            missing -= len(blocks)
            found.append(blocks)
        popped = found[0] if len(found) == 1 else np.concatenate(found)
        self._place[popped] = -1
        self._worth[popped] = ORDINARY
        self._num_queued -= count
        return popped

    def _first_due(self) -> tuple[int, int]:
        """The queue whose head is due first, and when that of the next queue is (or the end of time)."""
        first, first_due, next_due = -1, _NEVER, _NEVER
        for worth in range(_NUM_WORTHS):
            if self._has_any(worth):
                due = self._due.item(self._heads[worth])
                if due < first_due:
                    first, first_due, next_due = worth, due, first_due
                elif due < next_due:
                    next_due = due
        return first, next_due

    def _has_any(self, worth: int) -> bool:
        """Bring the queue's head to a block, past holes; False if it has none."""
        head, tail = self._heads[worth], self._tails[worth]
        while head < tail and self._place.item(self._entries.item(head)) != head:
            places = np.arange(head, min(head + _HOLES_AT_ONCE, tail))
            counts = self._place[self._entries[places]] == places
            head += int(counts.argmax()) if counts.any() else len(places)
        self._heads[worth] = head
        return head < tail

    def _pop_from(self, worth: int, count: int, until: int) -> I32:
        """Blocks of this queue's next `count` entries that are due by `until`."""
        head = self._heads[worth]
        stop = min(head + count, self._tails[worth])
        if until < _NEVER and self._due.item(stop - 1) > until:
            stop = head + int(np.searchsorted(self._due[head:stop], until, side="right"))
        entries = self._entries[head:stop]
        self._heads[worth] = stop
        blocks: I32 = entries[self._place[entries] == np.arange(head, stop)]
        return blocks

    def _append(self, blocks: I32, freed: I64, worth: int) -> None:
        if self._tails[worth] + len(blocks) > (worth + 1) * self._room:
            self._squeeze(worth)
        start, stop = self._tails[worth], self._tails[worth] + len(blocks)
        self._entries[start:stop] = blocks
        self._due[start:stop] = freed + (2**worth - 1) * self._num_blocks
        self._place[blocks] = np.arange(start, stop)
        self._tails[worth] = stop

    def _squeeze(self, worth: int) -> None:
        places = self._places_in_use(worth)
        start = worth * self._room
        kept, stop = self._entries[places], start + len(places)
        self._entries[start:stop] = kept
        self._due[start:stop] = self._due[places]
        self._place[kept] = np.arange(start, stop)
        self._heads[worth], self._tails[worth] = start, stop

    def _places_in_use(self, worth: int) -> I64:
        places = np.arange(self._heads[worth], self._tails[worth])
        in_use: I64 = places[self._place[self._entries[places]] == places]
        return in_use

    def queued(self) -> I32:
        """All blocks, for checks, in no useful order; int32."""
        return np.concatenate([self._entries[self._places_in_use(worth)] for worth in range(_NUM_WORTHS)])
