"""Which decode rows of a step share a prefix, as groups whose attention is computed once (Juravsky et al. 2024, Hydragen).

The runs of shared_prefix.py are a forest: the blocks of a prefix, below it those of its longer forms. Each run that enough rows of the
step hold becomes a group, one level below that of the run before it. Groups are found anew only when rows or runs changed since
the last step; while all rows just decode, a step costs nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from toka.plan import I32, MAX_SHARED_LEVELS, SHARED_PREFIX_STEP, SharedPrefixPlan
from toka.scheduler.batching import DecodeSet
from toka.scheduler.config import SchedulerConfig
from toka.scheduler.shared_prefix import SharedPrefixes


@dataclass(slots=True)
class _Group:
    """Places in the batch that share the positions begin .. end - 1."""

    level: int
    members: I32
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class _Covered:
    """Of the rows of a run: the positions [0, end) are in groups, of so many levels, the last of which is this one."""

    end: int = 0
    num_levels: int = 0
    group: _Group | None = None


class GroupFinder:
    """Finds the groups of one step after another; holds what it found last."""

    def __init__(self, config: SchedulerConfig, shared: SharedPrefixes):
        self._shared = shared
        self._min_rows, self._min_tokens = config.hydragen_min_group_size, config.hydragen_min_prefix_len
        self._block_size = config.block_size
        self._unit = math.lcm(SHARED_PREFIX_STEP, config.block_size)  # where groups may begin and end
        self._place_of_row = np.full(config.max_rows, -1, dtype=np.int32)
        self._decodes: DecodeSet | None = None
        self._version = -1
        self._found: SharedPrefixPlan | None = None

    def groups(self, decodes: DecodeSet) -> SharedPrefixPlan | None:
        """The groups of a step that begins with these decode rows; None if there are none."""
        if self._decodes is not decodes or self._version != self._shared.version:
            self._found = self._plan(self._find(decodes), len(decodes))
            self._decodes, self._version = decodes, self._shared.version
        return self._found

    def _find(self, decodes: DecodeSet) -> list[_Group]:
        """By the runs' first blocks, so that of two groups of a row that of lower level comes first."""
        runs = self._shared.run_columns()
        if len(decodes) < self._min_rows or not len(runs.numbers):
            return []
        self._place_of_row[decodes.rows] = np.arange(len(decodes), dtype=np.int32)
        places = self._place_of_row[runs.rows]
        self._place_of_row[decodes.rows] = -1
        num_members = np.add.reduceat(places >= 0, runs.starts, dtype=np.int64)
        large = np.flatnonzero(num_members >= self._min_rows)

        groups: list[_Group] = []
        covered: dict[int, _Covered] = {}
        for i in large[np.argsort(runs.first_blocks[large], kind="stable")].tolist():
            first_block, first_row = int(runs.first_blocks[i]), int(runs.rows[runs.starts[i]])
            before = covered.get(self._shared.run_before(first_row, first_block)) if first_block else _Covered()
            if before is None:
                continue  # what lies before these blocks is not shared
            members = places[runs.starts[i] : runs.starts[i] + runs.sizes[i]]
            num_blocks = first_block + int(runs.num_blocks[i])
            covered[int(runs.numbers[i])] = self._cover(before, members[members >= 0], num_blocks, groups)
        return groups

    def _cover(self, before: _Covered, members: I32, num_blocks: int, groups: list[_Group]) -> _Covered:
        """What is covered of rows that share their first num_blocks blocks, once a group is made of them if that pays."""
        end = num_blocks * self._block_size // self._unit * self._unit
        if before.group is not None and len(before.group.members) == len(members):
            before.group.end = end  # the same rows: a run was cut in two that need not be
            return _Covered(end, before.num_levels, before.group)
        least = self._min_tokens if before.num_levels == 0 else SHARED_PREFIX_STEP
        if before.num_levels == MAX_SHARED_LEVELS or end - before.end < least:
            return before
        group = _Group(before.num_levels, members, before.end, end)
        groups.append(group)
        return _Covered(end, before.num_levels + 1, group)

    @staticmethod
    def _plan(groups: list[_Group], num_rows: int) -> SharedPrefixPlan | None:
        if not groups:
            return None
        sizes = np.array([len(group.members) for group in groups], dtype=np.int32)
        stops = np.cumsum(sizes, dtype=np.int32)
        table = np.empty((len(groups), 5), dtype=np.int32)
        table[:, 0] = [group.level for group in groups]
        table[:, 1], table[:, 2] = stops - sizes, stops
        table[:, 3], table[:, 4] = [group.begin for group in groups], [group.end for group in groups]
        lens = np.zeros(num_rows, dtype=np.int32)
        for group in groups:  # a row's later groups reach further
            lens[group.members] = group.end
        return SharedPrefixPlan(table, np.concatenate([group.members for group in groups]), lens)
