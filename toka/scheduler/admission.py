"""Which waiting request may begin: the policies, apart from the mechanism.

The scheduler asks about one request at a time, the head of the queue (lowest priority number, then earliest arrival),
and stops at the first no. So nobody is overtaken by a request behind it, and a policy that says yes once enough blocks
are free starves nobody. The scheduler itself sees to it that the first blocks are free; when nothing runs, every policy
here says yes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from toka.scheduler.config import SchedulerConfig


@dataclass(frozen=True, slots=True)
class Load:
    """What the pool holds at the moment of the question. num_running: requests that run, the draining ones not counted."""

    num_running: int
    num_free_blocks: int


class Prospect(Protocol):
    """What would come if the head of the queue began; worked out only if asked for."""

    def least_free(self) -> int:
        """Fewest free blocks in any future step, everybody running for as long as expected; negative: some would be missing."""
        ...

    def unreserved(self) -> int:
        """Free blocks less all that the running requests and this one may still take, nothing given back meanwhile."""
        ...


class AdmissionPolicy(Protocol):
    """Says whether the head of the queue may begin."""

    @property
    def retry_steps(self) -> int:
        """After a no, ask again about the same request so many steps later (or when nothing runs any more)."""
        ...

    def admits(self, num_blocks_needed: int, load: Load, prospect: Prospect) -> bool:
        """num_blocks_needed: free blocks that its first tokens would take, shared ones that others hold not counted."""
        ...


@dataclass(frozen=True, slots=True)
class AdmitWhenFree:
    """Admit when the blocks are there, and while anything runs leave a few for its growth. Preempts when all grow."""

    watermark_blocks: int
    retry_steps: int = 1

    def admits(self, num_blocks_needed: int, load: Load, prospect: Prospect) -> bool:
        reserve = self.watermark_blocks if load.num_running else 0
        return num_blocks_needed + reserve <= load.num_free_blocks


@dataclass(frozen=True, slots=True)
class AdmitByForecast:
    """Admit whom the forecast sees through to the end, with reserve_blocks left over at the tightest moment."""

    reserve_blocks: int
    retry_steps: int = 4

    def admits(self, num_blocks_needed: int, load: Load, prospect: Prospect) -> bool:
        return not load.num_running or prospect.least_free() >= self.reserve_blocks


@dataclass(frozen=True, slots=True)
class ReserveForMax:
    """Admit while everybody's max_tokens fit at once; for comparison."""

    retry_steps: int = 1

    def admits(self, num_blocks_needed: int, load: Load, prospect: Prospect) -> bool:
        return not load.num_running or prospect.unreserved() >= 0


def policy_of(config: SchedulerConfig) -> AdmissionPolicy:
    """The policy that the configuration names."""
    if config.admission == "when_free":
        return AdmitWhenFree(config.watermark_blocks)
    if config.admission == "reserve_max":
        return ReserveForMax()
    return AdmitByForecast(config.watermark_blocks if config.track_early_stopping else 0)


def fewest_to_preempt(num_candidates: int, suffices: Callable[[int], bool]) -> int | None:
    """The least number of candidates that suffices, tried by doubling, then by halving the gap; None if not even all of them do.

    suffices: whether so many of them would do; it stays true once it is.
    """
    too_few, enough = -1, 0
    while not suffices(enough):
        if enough == num_candidates:
            return None
        too_few, enough = enough, min(max(2 * enough, 1), num_candidates)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if suffices(middle) else (middle, enough)
    return enough
