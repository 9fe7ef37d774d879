"""Offers the full blocks of running requests to the prefix index, once each.

A block may be offered as soon as its tokens' ids are known to the host and plans made so far compute them: steps run in
order, and within a step KV is written before it is read, so whoever finds the block in a later plan (or in the same
one) reads it written. For a prompt that is when its chunk is planned; for generated tokens some steps later, when the
step that begins the next block is committed. A block that is not full is never offered, so nobody writes to a block
that another may share.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from toka.errors import InvariantError
from toka.plan import I32
from toka.scheduler.prefix_index import KeyChain, PrefixIndex
from toka.scheduler.request_table import RequestTable, Rows


class PrefixRegistrar:
    """Knows the key chain of every owned row. With enabled=False nothing is ever offered."""

    def __init__(self, table: RequestTable, index: PrefixIndex, *, enabled: bool):
        self._table, self._index, self._enabled = table, index, enabled
        self._chains: list[KeyChain | None] = [None] * len(table.request_id)
        # (row, number of its block, its chain) of blocks filled by committed steps and not offered yet
        self._filled: deque[tuple[int, int, KeyChain]] = deque()

    def take_row(self, row: int, chain: KeyChain, num_shared_blocks: int) -> None:
        """The row has a new owner whose first blocks come from the index."""
        self._chains[row] = chain
        self._table.num_registered_blocks[row] = num_shared_blocks

    def give_up_row(self, row: int) -> None:
        """The row's owner gives its blocks back: offer what is full, the last chance to keep its content."""
        self.offer(row)
        self._chains[row] = None

    def offer(self, row: int) -> None:
        """Offer all full blocks of the row that are not registered yet."""
        if not self._enabled:
            return
        table, chain = self._table, self._chain(row)
        start = int(table.num_registered_blocks[row])
        stop = int(min(table.num_computed_tokens[row], table.num_tokens[row])) // table.block_size
        if start < stop:
            chain.extend(table.tokens[row], stop)
            self._index.register(chain.keys_of(start, stop), table.blocks[row, start:stop])
            table.num_registered_blocks[row] = stop

    def offer_filled(self, filled: Rows, places: I32, num_rows: int) -> None:
        """A step of num_rows rows is committed that filled block number places[i] of filled[i]: offer some filled blocks, a
        little more than fill on average.

        Hashing them all at once would make slow the steps in which many rows fill a block together.
        """
        if not self._enabled:
            return
        for row, place in zip(filled.tolist(), places.tolist(), strict=True):
            self._filled.append((row, place, self._chain(row)))
        count = min(len(self._filled), 1 + num_rows // self._table.block_size)
        if count:
            self._offer_oldest(count)

    def _offer_oldest(self, count: int) -> None:
        """Offer the first `count` blocks of the queue. What a row gave up meanwhile it offered then: the chain knows it."""
        due: list[tuple[int, int, KeyChain]] = []
        for _ in range(count):
            row, place, chain = self._filled.popleft()
            if chain.num_blocks <= place:
                due.append((row, place, chain))
        if not due:
            return
        table, block_bytes = self._table, 4 * self._table.block_size
        rows = np.array([row for row, _, _ in due], dtype=np.intp)
        places = np.array([place for _, place, _ in due], dtype=np.int32)
        contents = table.block_contents(rows, places)
        keys: list[bytes] = []
        start = 0
        for row, place, chain in due:
            if chain.num_blocks != place:
                raise InvariantError(f"row {row} offers block {place} after {chain.num_blocks} blocks")
            keys.append(chain.append(contents[start : start + block_bytes]))
            start += block_bytes
        self._index.register(keys, table.blocks[rows, places])
        table.num_registered_blocks[rows] = places + np.int32(1)

    def _chain(self, row: int) -> KeyChain:
        chain = self._chains[row]
        if chain is None:
            raise InvariantError(f"row {row} has blocks to register but no owner")
        return chain
