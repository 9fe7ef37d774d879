"""The running requests as columns: one numpy array a fact, one stable row a request.

A row is taken when a request is admitted and given up when it settles. Its generation number changes whenever results
that are still under way stop being wanted (the request was stopped or aborted, the row was given up), so a late result is
recognised and dropped.

Legend: M max_rows, S MAX_STOP_IDS_PER_ROW, B max_blocks_per_row, L max_tokens_per_request.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from toka.errors import InvariantError
from toka.params import MAX_STOP_TOKEN_IDS
from toka.plan import I32
from toka.scheduler.config import SchedulerConfig

MAX_STOP_IDS_PER_ROW = 2 * MAX_STOP_TOKEN_IDS  # those of the request and those of the model
_CACHE_LINE_TOKENS = 16

Rows = npt.NDArray[np.intp]


class RequestTable:
    """Columns, all of length M:

    request_id int64; priority int64, due_s float64, arrival int64: the rank, lower runs first.
    num_prompt_tokens int32. num_cached_tokens int32: prompt tokens found in the prefix cache. max_total_tokens int32: prompt +
    max_tokens. stop_class int64: see stop_predictor. predicted_tokens int32: the output length expected at admission.
    num_tokens int32: tokens whose ids the host knows. num_computed_tokens int32: tokens whose KV is written once every
    plan made so far has run. A row prefills until its tokens are computed; from its first draw on a step computes one.
    token_room int32: tokens that the row's blocks can hold, block_size times their number.
    num_registered_blocks int32: blocks from the row's start that were offered to the prefix index or found there.
    num_logprobs, num_prompt_logprobs int32: likeliest tokens wanted with each generated token and each of the prompt; -1 = no logprobs.
    num_unscored int32: places of the prompt that are to be scored and that no plan has scored yet.
    has_grammar bool: whether tokens are drawn under masks. is_adjusted bool: whether they are drawn from adjusted logits.
    generation int32: changes when results under way stop being wanted.
    tokens int32 [M, L]; blocks int32 [M, B]; stop_ids int32 [S, M], -1 where unused.
    """

    def __init__(self, config: SchedulerConfig):
        rows = config.max_rows
        self.block_size = config.block_size
        self.request_id = np.full(rows, -1, dtype=np.int64)
        self.priority = np.zeros(rows, dtype=np.int64)
        self.due_s = np.zeros(rows, dtype=np.float64)
        self.arrival = np.zeros(rows, dtype=np.int64)
        self.num_prompt_tokens = np.zeros(rows, dtype=np.int32)
        self.stop_class = np.zeros(rows, dtype=np.int64)
        self.predicted_tokens = np.zeros(rows, dtype=np.int32)
        self.num_cached_tokens = np.zeros(rows, dtype=np.int32)
        self.max_total_tokens = np.zeros(rows, dtype=np.int32)
        self.num_tokens = np.zeros(rows, dtype=np.int32)
        self.num_computed_tokens = np.zeros(rows, dtype=np.int32)
        self.token_room = np.zeros(rows, dtype=np.int32)
        self.num_registered_blocks = np.zeros(rows, dtype=np.int32)
        self.num_logprobs = np.full(rows, -1, dtype=np.int32)
        self.num_prompt_logprobs = np.full(rows, -1, dtype=np.int32)
        self.num_unscored = np.zeros(rows, dtype=np.int32)
        self.has_grammar = np.zeros(rows, dtype=np.bool_)
        self.is_adjusted = np.zeros(rows, dtype=np.bool_)
        self.generation = np.zeros(rows, dtype=np.int32)
        # Whole blocks and whole cache lines a row, an odd number of the least such unit: rows a power of two apart would all
        # fall into the same few sets of the cache. Pages are touched only as requests grow into them.
        unit = math.lcm(config.block_size, _CACHE_LINE_TOKENS)
        width = (-(-config.max_tokens_per_request // unit) | 1) * unit
        self.tokens = np.zeros((rows, width), dtype=np.int32)
        self._token_blocks = self.tokens.reshape(rows, width // config.block_size, config.block_size)
        self.blocks = np.zeros((rows, config.max_blocks_per_row), dtype=np.int32)
        self.stop_ids = np.full((MAX_STOP_IDS_PER_ROW, rows), -1, dtype=np.int32)
        self._num_stop_ids = [0] * rows
        self._num_rows_with = [rows] + [0] * MAX_STOP_IDS_PER_ROW  # rows by their number of stop ids
        self._stop_width = 0  # stop ids of the row that has most of them
        self._free_rows = list(range(rows - 1, -1, -1))
        self.epoch = 0  # changes whenever any generation does

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    def take_row(self) -> int:
        """A row for a new owner. The caller has looked at num_free_rows."""
        return self._free_rows.pop()

    def give_up_row(self, row: int) -> None:
        """No step in flight touches the row and its blocks are given back: the next request may have it."""
        if self.request_id[row] < 0:
            raise InvariantError(f"row {row} was given up twice")
        self.drop_late_results(row)
        self.request_id[row] = -1
        self.token_room[row] = 0
        self.set_stop_ids(row, ())
        self._free_rows.append(row)

    def drop_late_results(self, row: int) -> None:
        """Results of plans made so far are not wanted for this row."""
        self.generation[row] += 1
        self.epoch += 1

    def set_stop_ids(self, row: int, stop_token_ids: tuple[int, ...]) -> None:
        """Replace the token ids that end the row's request; at most MAX_STOP_IDS_PER_ROW."""
        self.stop_ids[: self._num_stop_ids[row], row] = -1
        self.stop_ids[: len(stop_token_ids), row] = stop_token_ids
        self._num_rows_with[self._num_stop_ids[row]] -= 1
        self._num_rows_with[len(stop_token_ids)] += 1
        self._num_stop_ids[row] = len(stop_token_ids)
        self._stop_width = max((width for width, rows in enumerate(self._num_rows_with) if width and rows), default=0)

    def is_stop(self, rows: Rows, sampled: I32) -> npt.NDArray[np.bool_]:
        """Whether each row's new token ends its request; bool [R]."""
        hit: npt.NDArray[np.bool_] = self.stop_ids[0].take(rows) == sampled
        for place in range(1, self._stop_width):
            hit |= self.stop_ids[place].take(rows) == sampled
        return hit

    def num_blocks(self, row: int) -> int:
        """Blocks that the row holds."""
        return int(self.token_room[row]) // self.block_size

    def blocks_of(self, row: int) -> I32:
        """View of the row's blocks in order; int32 [num_blocks]."""
        return self.blocks[row, : self.num_blocks(row)]

    def tokens_of(self, row: int) -> I32:
        """View of the row's token ids that the host knows; int32 [num_tokens]."""
        return self.tokens[row, : self.num_tokens[row]]

    def block_contents(self, rows: Rows, places: I32) -> bytes:
        """Token ids of block number places[i] of rows[i], one after another; int32 bytes."""
        return self._token_blocks[rows, places].tobytes()

    def append_blocks(self, rows: Rows, blocks: I32) -> I32:
        """Give one more block to each of these distinct rows; returns the columns they went to, int32 [C]."""
        room = self.token_room.take(rows)
        columns: I32 = room // np.int32(self.block_size)
        self.blocks[rows, columns] = blocks
        self.token_room[rows] = room + np.int32(self.block_size)
        return columns

    def append_tokens(self, rows: Rows, sampled: I32) -> I32:
        """Append one token to each of these distinct rows; returns their new num_tokens, int32 [R]."""
        lengths = self.num_tokens.take(rows)
        self.tokens[rows, lengths] = sampled
        lengths += np.int32(1)
        self.num_tokens[rows] = lengths
        return lengths

    def by_rank(self, rows: Rows) -> Rows:
        """Permutation of 0 .. R - 1 that puts the rows in rank order: priority, then due_s, then arrival."""
        return np.lexsort((self.arrival[rows], self.due_s[rows], self.priority[rows]))

    def live_rows(self) -> Rows:
        """Rows that have an owner, running or draining; for checks, O(M)."""
        return np.flatnonzero(self.request_id >= 0)

    def check_invariants(self) -> None:
        """Raise InvariantError unless each row is free or owned, exactly once."""
        both = sorted(self._free_rows + self.live_rows().tolist())
        if both != list(range(len(self.request_id))):
            raise InvariantError("the free rows disagree with the owned ones")
