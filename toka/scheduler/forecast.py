"""How many blocks will be free in every future step, if nobody else begins.

Step 0 is the one being planned, step t the t-th after it. A request holds blocks, takes one more whenever its tokens
cross a block's end, and gives all of them back some steps after its last one, when no step in flight touches them. So it
makes four events, however long it runs: its first new block, the end of its growth (it takes a block every block_size
steps in between), its release, and that of what it shares, which waits for the last holder. Counting events by step and
summing up over steps costs O(requests + steps); nothing depends on how many blocks anybody holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from toka.plan import I64


@dataclass(frozen=True, slots=True)
class Demand:
    """What R requests will take and give back; all int64 [R].

    num_held: blocks that are given back with the request (those that others hold too are SharedRelease's).
    spare: tokens that its blocks have room for beyond those computed. begin: the first step, at least 1, that computes one
    of its growth tokens, growth: how many it will compute, one a step. release: the step from which on its blocks are free,
    after its last one.
    """

    num_held: I64
    spare: I64
    begin: I64
    growth: I64
    release: I64

    def num_new_blocks(self, block_size: int) -> I64:
        """Blocks that each request will still take; int64 [R]."""
        num_new: I64 = np.maximum(-(-(self.growth - self.spare) // block_size), 0)
        return num_new


@dataclass(frozen=True, slots=True)
class SharedRelease:
    """Blocks that several requests hold: num_blocks int64 [S] are given back together in step release int64 [S], with the
    last holder."""

    num_blocks: I64
    release: I64


def used_blocks(demand: Demand, shared: SharedRelease, block_size: int, num_steps: int = 0) -> I64:
    """Blocks in use after steps 0, 1, ... took theirs, less those in use now; int64 [at least num_steps + 1].

    It ends with the last release or with num_steps, whichever is later; from there on nothing changes.
    """
    num_new = demand.num_new_blocks(block_size)
    grows = num_new > 0
    first = (demand.begin + demand.spare)[grows]
    after_last = first + block_size * num_new[grows]
    releases = np.concatenate((demand.release, shared.release))
    horizon = max(num_steps, int(releases.max(initial=0)))
    size = (horizon // block_size + 2) * block_size
    # Column c of line q is step q * block_size + c: down a column, a request that grows takes a block in every line.
    begun = np.bincount(first, minlength=size) - np.bincount(after_last, minlength=size)
    taken: I64 = begun.reshape(-1, block_size).cumsum(axis=0).reshape(-1)[: horizon + 1]
    freed = np.bincount(
        releases, weights=np.concatenate((demand.num_held + num_new, shared.num_blocks)), minlength=horizon + 1
    )
    used: npt.NDArray[np.float64] = np.cumsum(taken - freed)  # whole numbers below 2^53: exact
    return used.astype(np.int64)


class Forecast:
    """Free blocks after step 0, 1, ... took theirs, in num_free int64 [H + 1]; after the last entry nothing changes."""

    def __init__(self, num_free_now: int, demand: Demand, shared: SharedRelease, block_size: int):
        self._block_size = block_size
        self.num_free: I64 = num_free_now - used_blocks(demand, shared, block_size)

    def with_newcomer(self, newcomer: Demand, prolonged: SharedRelease) -> I64:
        """What num_free would be if this one request began in step 0.

        newcomer: its num_held blocks are taken in step 0. prolonged: blocks of others that it would hold until its own release,
        num_blocks of them until now free from step `release` on.
        """
        held_longer = prolonged.release < newcomer.release
        num_blocks = prolonged.num_blocks[held_longer]
        shared = SharedRelease(
            np.concatenate((-num_blocks, num_blocks)),
            np.concatenate((prolonged.release[held_longer], np.repeat(newcomer.release, len(num_blocks)))),
        )
        used = newcomer.num_held + used_blocks(newcomer, shared, self._block_size, len(self.num_free) - 1)
        free: I64 = self.num_free[-1] - used
        free[: len(self.num_free)] += self.num_free - self.num_free[-1]
        return free
