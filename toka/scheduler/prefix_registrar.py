"""Offers the full blocks of running requests to the prefix index, once each.

A block may be offered as soon as its tokens' ids are known to the host and plans made so far compute them: steps run in
order, and within a step KV is written before it is read, so whoever finds the block in a later plan (or in the same
one) reads it written. For a prompt that is when its chunk is planned; for generated tokens some steps later, when the
step that begins the next block is committed. A block that is not full is never offered, so nobody writes to a block
that another may share.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from toka.errors import InvariantError
from toka.plan import I32
from toka.scheduler.batching import Filled
from toka.scheduler.prefix_index import KeyChain, PrefixIndex
from toka.scheduler.request_table import RequestTable, Rows


@dataclass(frozen=True, slots=True)
class _FilledBlocks:
    """Blocks that one step filled, see Filled; blocks int32 [F]: their ids, contents: their token ids, int32 bytes."""

    rows: Rows
    places: I32
    generations: I32
    blocks: I32
    contents: bytes


class PrefixRegistrar:
    """Knows the key chain of every owned row. With enabled=False nothing is ever offered."""

    def __init__(self, table: RequestTable, index: PrefixIndex, *, enabled: bool):
        self._table, self._index, self._enabled = table, index, enabled
        self._chains: list[KeyChain | None] = [None] * len(table.request_id)
        self._filled: deque[_FilledBlocks] = deque()  # what committed steps filled and is not offered yet
        self._num_filled = 0  # blocks of _filled that are not offered yet
        self._num_offered = 0  # blocks of its first element that are

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

    def offer_filled(self, filled: Filled, num_rows: int) -> None:
        """A step of num_rows rows is committed that filled these blocks: offer some filled blocks, a little more than fill
        on average.

        Hashing them all at once would make slow the steps in which many rows fill a block together.
        """
        if not self._enabled:
            return
        if len(filled.rows):
            self._queue_filled(filled)
        count = min(self._num_filled, 1 + num_rows // self._table.block_size)
        while count:
            count -= self._offer_oldest(count)

    def _queue_filled(self, filled: Filled) -> None:
        """Queue them, but for the last blocks of prompts, which were offered with their chunks."""
        table = self._table
        rows, places, generations = filled
        new = places >= table.num_registered_blocks[rows]
        rows, places, generations = rows[new], places[new], generations[new]
        if len(rows):
            contents = table.block_contents(rows, places)
            self._filled.append(_FilledBlocks(rows, places, generations, table.blocks[rows, places], contents))
            self._num_filled += len(rows)

    def _offer_oldest(self, max_blocks: int) -> int:
        """Offer the first max_blocks of the queue or as many of them as one step filled; returns how many.

        Passed over are those of rows that were stopped, aborted or given up since they were planned: such a row offers what is
        full and known when it is given up.
        """
        filled, start, table = self._filled[0], self._num_offered, self._table
        stop = min(start + max_blocks, len(filled.rows))
        rows, places, blocks = filled.rows[start:stop], filled.places[start:stop], filled.blocks[start:stop]
        due = table.generation[rows] == filled.generations[start:stop]
        keys = self._extend_chains(rows.tolist(), places.tolist(), due.tolist(), filled.contents, start)
        if len(keys) < len(rows):
            rows, places, blocks = rows[due], places[due], blocks[due]
        if keys:
            self._index.register(keys, blocks)
            table.num_registered_blocks[rows] = places + np.int32(1)
        self._num_filled -= stop - start
        self._num_offered = stop
        if stop == len(filled.rows):
            self._filled.popleft()
            self._num_offered = 0
        return stop - start

    def _extend_chains(
        self, rows: list[int], places: list[int], due: list[bool], contents: bytes, first_block: int
    ) -> list[bytes]:
        """Keys of the blocks that are due; contents: the token ids of block first_block are those of rows[0]."""
        block_bytes = 4 * self._table.block_size
        start = first_block * block_bytes
        keys: list[bytes] = []
        for row, place, wanted in zip(rows, places, due, strict=True):
            if wanted:
                chain = self._chain(row)
                if chain.num_blocks != place:
                    raise InvariantError(f"row {row} offers block {place} after {chain.num_blocks} blocks")
                keys.append(chain.append(contents[start : start + block_bytes]))
            start += block_bytes
        return keys

    def _chain(self, row: int) -> KeyChain:
        chain = self._chains[row]
        if chain is None:
            raise InvariantError(f"row {row} has blocks to register but no owner")
        return chain
