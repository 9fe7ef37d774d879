"""Which running requests hold which blocks together, kept up as requests come and go.

Blocks that the same rows share make a *run*: the blocks of a common prefix, or of the part of it that goes on for some of
them (so runs nest as prefixes do). A row that begins joins the runs it found, splits one of which it found a part only,
and makes new ones of blocks that one row held alone so far. The cost is that of the blocks found, once, at admission.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from toka.errors import InvariantError
from toka.plan import I32, I64
from toka.scheduler.request_table import Rows

NO_RUN = -1
_NO_ROWS = np.empty(0, dtype=np.intp)


@dataclass(slots=True)
class _Run:
    """Blocks first_block .. first_block + num_blocks - 1 of each of these rows, in the order in which they joined.

    column: the rows as an array, made when asked for after a change.
    """

    first_block: int
    num_blocks: int
    rows: dict[int, None]
    column: Rows | None = None


class SharedPrefixes:
    """The only writer of who shares what. A block's entries count only while somebody holds it."""

    def __init__(self, num_blocks: int, max_rows: int):
        self._run_of = np.full(num_blocks, NO_RUN, dtype=np.int64)  # NO_RUN: held by one row alone,
        self._row_of = np.zeros(num_blocks, dtype=np.int64)  # this one
        self._runs: dict[int, _Run] = {}
        self._runs_of_row: list[list[int]] = [[] for _ in range(max_rows)]
        self._next_run = 0
        self.num_shared_blocks = np.zeros(max_rows, dtype=np.int64)  # of each row, the blocks that are in runs
        self._columns: RunColumns | None = None  # made anew when asked for after a change
        self.version = 0  # changes whenever a run does

    def take(self, rows: Rows | int, blocks: I32) -> None:
        """Row rows[i] (or all of them the same) leased block blocks[i], which nobody held."""
        self._run_of[blocks] = NO_RUN
        self._row_of[blocks] = rows

    def join(self, row: int, blocks: I32, held: npt.NDArray[np.bool_]) -> None:
        """The row leased these blocks, its first ones, once more; held: whether others did already."""
        shared = blocks[held]
        if len(shared) < len(blocks):
            self.take(row, blocks[~held])
        elif (whole := self._whole_runs(blocks)) is not None:
            for run in whole:
                self._add(run, row)
            return
        if not len(shared):
            return
        runs = self._run_of[shared]
        alike = np.where(runs == NO_RUN, -1 - self._row_of[shared], runs)  # a run, or below zero -1 - the row alone
        # With a gap where the index knew another block of the same content, which nobody held:
        places = np.flatnonzero(held)
        cuts = np.flatnonzero((np.diff(alike) != 0) | (np.diff(places) != 1)) + 1
        for start, stop in pairwise([0, *cuts.tolist(), len(shared)]):
            run = self._run_of_exactly(int(places[start]), shared[start:stop], int(alike[start]))
            self._add(run, row)

    def _whole_runs(self, blocks: I32) -> list[int] | None:
        """The runs that these held blocks are made of, if none of them goes on past the last block or was held by one row alone."""
        found: list[int] = []
        place = 0
        while place < len(blocks):
            number = self._run_of.item(blocks.item(place))
            if number == NO_RUN:
                return None
            place += self._runs[number].num_blocks
            if place > len(blocks) or self._run_of.item(blocks.item(place - 1)) != number:
                return None
            found.append(number)
        return found

    def _run_of_exactly(self, first_block: int, blocks: I32, alike: int) -> int:
        """The run of these blocks that the same rows hold: as it is, split off, or new."""
        if alike >= 0 and self._runs[alike].num_blocks == len(blocks):
            return alike
        run, self._next_run = self._next_run, self._next_run + 1
        self._run_of[blocks] = run
        self._runs[run] = _Run(first_block, len(blocks), {})
        if alike < 0:
            self._add(run, -1 - alike)
        else:
            whole = self._runs[alike]
            whole.first_block += len(blocks)  # what was found is the part nearer to the root
            whole.num_blocks -= len(blocks)
            self._runs[run].rows.update(whole.rows)
            self._change(self._runs[run])
            for row in whole.rows:
                self._runs_of_row[row].append(run)
        return run

    def _add(self, run: int, row: int) -> None:
        self._runs[run].rows[row] = None
        self._change(self._runs[run])
        self._runs_of_row[row].append(run)
        self.num_shared_blocks[row] += self._runs[run].num_blocks

    def leave(self, row: int) -> None:
        """The row gives all its blocks back."""
        if not self._runs_of_row[row]:
            return
        for number in self._runs_of_row[row]:
            run = self._runs[number]
            del run.rows[row]
            self._change(run)
            if not run.rows:
                del self._runs[number]
        self._runs_of_row[row] = []
        self.num_shared_blocks[row] = 0

    def releases(self, release_of_row: I64) -> tuple[I64, I64]:
        """Number of blocks of every run, and when the last of its rows gives them back; int64 [S] each.

        release_of_row: int64 [M].
        """
        columns = self.run_columns()
        if not len(columns.num_blocks):
            return columns.num_blocks, columns.num_blocks
        return columns.num_blocks, np.maximum.reduceat(release_of_row[columns.rows], columns.starts)

    def release_of(self, blocks: I32, release_of_row: I64) -> I64:
        """When each of these blocks, which somebody holds, will be given back by the last who does; int64, shape of blocks."""
        release: I64 = release_of_row[self._row_of[blocks]]
        runs = self._run_of[blocks]
        shared = runs != NO_RUN
        if shared.any():
            columns = self.run_columns()
            places = np.searchsorted(columns.numbers, runs[shared])
            release[shared] = self.releases(release_of_row)[1][places]
        return release

    def run_before(self, row: int, block: int) -> int:
        """The run of the row that ends where its block number `block` begins; NO_RUN if that is its first."""
        for number in self._runs_of_row[row]:
            run = self._runs[number]
            if run.first_block + run.num_blocks == block:
                return number
        return NO_RUN

    def run_columns(self) -> RunColumns:
        """All runs, in the order of their numbers."""
        if self._columns is None:
            runs = self._runs.values()
            for run in runs:
                if run.column is None:
                    run.column = np.fromiter(run.rows, dtype=np.intp, count=len(run.rows))
            sizes = np.array([len(run.rows) for run in runs], dtype=np.int64)
            self._columns = RunColumns(
                numbers=np.array(list(self._runs), dtype=np.int64),
                first_blocks=np.array([run.first_block for run in runs], dtype=np.int64),
                num_blocks=np.array([run.num_blocks for run in runs], dtype=np.int64),
                sizes=sizes,
                starts=np.cumsum(sizes) - sizes,
                rows=np.concatenate([run.column for run in runs if run.column is not None] or [_NO_ROWS]),
            )
        return self._columns

    def _change(self, run: _Run) -> None:
        """The run has other rows or blocks."""
        run.column = self._columns = None
        self.version += 1

    def check_invariants(self, rows: list[int], blocks_of_rows: list[I32]) -> None:
        """Raise InvariantError unless runs and lone blocks are what these rows hold."""
        held = np.concatenate((*blocks_of_rows, np.empty(0, dtype=np.int32)))
        holders = np.repeat(np.array(rows, dtype=np.int64), [len(blocks) for blocks in blocks_of_rows])
        runs = self._run_of[held]
        alone = runs == NO_RUN
        strangers = np.flatnonzero(alone & (self._row_of[held] != holders))
        if len(strangers) or np.bincount(held[alone], minlength=1).max() > 1:
            raise InvariantError(f"blocks {held[strangers]} are held by rows {holders[strangers]}, which nobody knew")
        max_rows = len(self._runs_of_row)
        pairs, sizes = np.unique(runs[~alone] * max_rows + holders[~alone], return_counts=True)
        known = {number * max_rows + row: run.num_blocks for number, run in self._runs.items() for row in run.rows}
        if dict(zip(pairs.tolist(), sizes.tolist(), strict=True)) != known:
            raise InvariantError("the runs disagree with the blocks that their rows hold")
        of_row = {number * max_rows + row for row, numbers in enumerate(self._runs_of_row) for number in numbers}
        num_shared = np.bincount(holders[~alone], minlength=max_rows)
        if of_row != known.keys() or not np.array_equal(num_shared, self.num_shared_blocks):
            raise InvariantError("the rows disagree with their runs")


@dataclass(frozen=True, slots=True)
class RunColumns:
    """All runs as arrays. numbers, first_blocks (place in their rows), num_blocks, sizes, starts: int64 [S]; the sizes[i] rows from
    rows[starts[i]] on hold run i; rows intp."""

    numbers: I64
    first_blocks: I64
    num_blocks: I64
    sizes: I64
    starts: I64
    rows: Rows
