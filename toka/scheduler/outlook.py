"""From the running requests to a forecast, and what one more would change in it.

Where the forecast cannot know, it errs on the safe side: a row that prefills is taken to begin to grow as early as it
might and to end as late as it might. With no predictor everybody is taken to run up to max_tokens; then whoever is let in
by the forecast never finds a block missing, whatever stops early or is aborted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from toka.plan import I32, I64
from toka.scheduler.config import SchedulerConfig
from toka.scheduler.forecast import Demand, Forecast, SharedRelease
from toka.scheduler.request_table import RequestTable, Rows
from toka.scheduler.shared_prefix import SharedPrefixes
from toka.scheduler.stop_predictor import StopPredictor


@dataclass(frozen=True, slots=True)
class RunningRows:
    """Who holds blocks, in the step being planned: rows that decode; rows that prefill, in rank order; rows that drain, and
    drained_since int64: how many steps before this one the last that touches each was planned."""

    decodes: Rows
    prefilling: Rows
    draining: Rows
    drained_since: I64
    num_free_blocks: int

    @property
    def num_running(self) -> int:
        return len(self.decodes) + len(self.prefilling)


@dataclass(frozen=True, slots=True)
class Newcomer:
    """The request that might begin in this step. num_tokens: those known so far, of which num_cached are in shared blocks;
    num_needed: free blocks it takes now; held: the shared blocks that others hold, int32.

    stop_class, arrival, num_prompt_tokens, max_total_tokens, num_unscored: as in RequestTable.
    """

    num_tokens: int
    num_cached: int
    num_needed: int
    held: I32
    stop_class: int
    arrival: int
    num_prompt_tokens: int
    max_total_tokens: int
    num_unscored: int = 0

    @property
    def num_missing(self) -> int:
        """Tokens that it has to compute before it draws its first one."""
        return self.num_tokens - self.num_cached


class HeadProspect:
    """What would come if this newcomer began, see admission.Prospect. look: makes or finds the outlook that it meets."""

    def __init__(self, look: Callable[[], Outlook], newcomer: Newcomer):
        self._look, self._newcomer = look, newcomer

    def least_free(self) -> int:
        return self._look().least_free_with(self._newcomer)

    def unreserved(self) -> int:
        return self._look().unreserved_with(self._newcomer)


class Forecaster:
    """Makes Outlooks from the scheduler's tables. predictor None: everybody runs up to max_tokens."""

    def __init__(
        self, config: SchedulerConfig, table: RequestTable, shared: SharedPrefixes, predictor: StopPredictor | None
    ):
        self.config, self._table, self.shared, self._predictor = config, table, shared, predictor

    def look(self, running: RunningRows, *, prefill_first: Newcomer | None = None, settled: bool = False) -> Outlook:
        """As of the step being planned, its decode rows planned already.

        prefill_first: a newcomer whose tokens go before those of the rows that prefill now. settled: take it that what the draining
        rows hold is free already.
        """
        table, size, lag = self._table, self.config.block_size, self.config.steps_in_flight
        rows = np.concatenate((running.decodes, running.prefilling, running.draining))
        num_decodes, num_running = len(running.decodes), running.num_running
        prefills = slice(num_decodes, num_running)
        room = table.token_room[rows].astype(np.int64)
        reached = table.num_computed_tokens[rows].astype(np.int64)  # tokens that growth starts from
        begin = np.ones(len(rows), dtype=np.int64)
        latest = np.ones(len(rows), dtype=np.int64)
        num_prefill = num_unscored = 0
        if num_running > num_decodes:
            lengths = table.num_tokens[running.prefilling].astype(np.int64)
            missing = lengths - reached[prefills]
            reached[prefills] = lengths
            unscored = table.num_unscored[running.prefilling].astype(np.int64)
            num_prefill, num_unscored = int(missing.sum()), int(unscored.sum())
            begin[prefills] = self.earliest(missing)
            missing, unscored = np.cumsum(missing), np.cumsum(unscored)
            if prefill_first is not None:
                missing += prefill_first.num_missing
                unscored += prefill_first.num_unscored
            latest[prefills] = self.latest(missing, unscored, num_running + (prefill_first is not None))
        growth = np.zeros(len(rows), dtype=np.int64)
        growth[:num_running] = np.maximum(self._expected_ends(rows[:num_running]) - reached[:num_running], 0)
        release = latest - 1 + growth + lag
        release[num_running:] = 0 if settled else np.maximum(lag - running.drained_since, 1)
        release_of_row = np.zeros(len(table.request_id), dtype=np.int64)
        release_of_row[rows] = release
        demand = Demand(room // size - self.shared.num_shared_blocks[rows], room - reached, begin, growth, release)
        return Outlook(self, running, demand, release_of_row, num_prefill, num_unscored)

    def _expected_ends(self, rows: Rows) -> I64:
        table = self._table
        return self.expected_end(
            table.stop_class[rows],
            table.arrival[rows],
            table.num_prompt_tokens[rows].astype(np.int64),
            table.num_tokens[rows].astype(np.int64),
            table.max_total_tokens[rows].astype(np.int64),
        )

    def expected_end(self, stop_class: I64, arrival: I64, num_prompt: I64, num_tokens: I64, max_total: I64) -> I64:
        """Tokens that requests will have computed when they end, a stop noticed late included; int64, all the same shape."""
        if self._predictor is None:
            return max_total - 1
        predicted = num_prompt + self._predictor.predict(
            stop_class, arrival, num_tokens - num_prompt, max_total - num_prompt
        )
        noticed: I64 = np.minimum(predicted - 1 + self.config.steps_in_flight - 1, max_total - 1)
        return noticed

    def earliest(self, num_missing: I64) -> I64:
        """First step in which a row can compute its first drawn token, num_missing tokens of its prompt not planned yet."""
        return np.maximum(-(-num_missing // self.config.max_tokens_per_forward), 1)

    def latest(self, num_missing: I64, num_unscored: I64, num_running: int) -> I64:
        """Last such step, num_missing tokens of it and of those before it not planned yet, num_running rows in all.

        num_unscored: places of their prompts that are to be scored. Each step until then has either no room for more tokens, or none for
        more logits, of which they need no more than those places and one for each row.
        """
        steps = 1 - (-num_missing // max(self.config.max_tokens_per_forward - (num_running - 1), 1))
        room = max(self.config.max_running - (num_running - 1), 1)
        return np.where(num_unscored > 0, steps - (-(num_unscored + num_running) // room), steps)


@dataclass(frozen=True, slots=True)
class _Trial:
    """What it would mean if this newcomer began. num_free: see Forecast; num_blocks: all it will ever take itself; release: the
    step from which on these are free."""

    newcomer: Newcomer
    num_free: I64
    num_blocks: int
    release: int


class Outlook:
    """The forecast of one step, and what is left of it as newcomers begin.

    demand: what the running ones will take and give back; release_of_row: int64 [M], when each row gives its blocks back;
    num_prefill: tokens of prompts that are not planned yet; num_unscored: places among them that are to be scored.
    """

    def __init__(
        self,
        forecaster: Forecaster,
        running: RunningRows,
        demand: Demand,
        release_of_row: I64,
        num_prefill: int,
        num_unscored: int,
    ):
        size = forecaster.config.block_size
        shared = SharedRelease(*forecaster.shared.releases(release_of_row))
        self.forecast = Forecast(running.num_free_blocks, demand, shared, size)
        self._forecaster = forecaster
        self._num_running = running.num_running
        self._release_of_row = release_of_row
        self._num_prefill, self._num_unscored = num_prefill, num_unscored
        self._unreserved = int(self.forecast.num_free[0] - demand.num_new_blocks(size).sum())
        self._last_trial: _Trial | None = None

    def least_free_with(self, newcomer: Newcomer) -> int:
        """Fewest free blocks in any step if it begins now."""
        return int(self._try(newcomer).num_free.min())

    def unreserved_with(self, newcomer: Newcomer) -> int:
        """Free blocks less all that may still be taken if it begins now."""
        return self._unreserved - self._try(newcomer).num_blocks

    def add(self, newcomer: Newcomer, row: int) -> None:
        """It begins, in this row."""
        trial = self._try(newcomer)
        self.forecast.num_free = trial.num_free
        self._unreserved -= trial.num_blocks
        self._release_of_row[row] = trial.release
        self._num_running += 1
        self._num_prefill += newcomer.num_missing
        self._num_unscored += newcomer.num_unscored
        self._last_trial = None

    def _try(self, newcomer: Newcomer) -> _Trial:
        last = self._last_trial
        if last is None or last.newcomer is not newcomer:
            demand, prolonged = self._effects(newcomer)
            num_blocks = int(demand.num_held[0] + demand.num_new_blocks(self._forecaster.config.block_size)[0])
            num_free = self.forecast.with_newcomer(demand, prolonged)
            last = self._last_trial = _Trial(newcomer, num_free, num_blocks, int(demand.release[0]))
        return last

    def _effects(self, newcomer: Newcomer) -> tuple[Demand, SharedRelease]:
        """What it takes itself, and which blocks of others it holds longer."""
        forecaster, length = self._forecaster, newcomer.num_tokens
        size = forecaster.config.block_size
        end = forecaster.expected_end(
            *(
                np.array([value], dtype=np.int64)
                for value in (
                    newcomer.stop_class,
                    newcomer.arrival,
                    newcomer.num_prompt_tokens,
                    length,
                    newcomer.max_total_tokens,
                )
            )
        )
        missing = np.array([newcomer.num_missing], dtype=np.int64)
        growth = np.maximum(end - length, 0)  # who generates nothing ends with one token less
        unscored = np.array([self._num_unscored + newcomer.num_unscored], dtype=np.int64)
        latest = forecaster.latest(self._num_prefill + missing, unscored, self._num_running + 1)
        demand = Demand(
            num_held=np.array([newcomer.num_needed], dtype=np.int64),
            spare=np.array([-length % size], dtype=np.int64),
            begin=forecaster.earliest(missing),
            growth=growth,
            release=latest - 1 + growth + forecaster.config.steps_in_flight,
        )
        held = forecaster.shared.release_of(newcomer.held, self._release_of_row)
        return demand, SharedRelease(np.ones(len(held), dtype=np.int64), held)
