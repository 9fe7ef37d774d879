"""The forecast against a simulation that moves every block by hand, one step at a time."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from toka.plan import I64
from toka.scheduler.forecast import Demand, Forecast, SharedRelease


@dataclass
class Holder:
    """A request as the simulation sees it: tokens of its prompt not planned yet and how many a step it gets of them, the
    tokens it has once the prompt is computed, how many it computes after that, its blocks (ids, shared with others or not)."""

    num_missing: int
    chunk: int
    num_tokens: int
    growth: int
    blocks: set[int]


@dataclass
class Case:
    block_size: int
    lag: int
    holders: list[Holder]


def free_by_hand(case: Case, num_free: int) -> list[int]:
    """Free blocks after every step until all have ended, the first entry as things are."""
    everything = set().union(*(h.blocks for h in case.holders))
    next_block = max(everything, default=0) + 1
    total = len(everything) + num_free
    ends: dict[int, int] = {}
    missing, tokens = [h.num_missing for h in case.holders], [h.num_tokens for h in case.holders]
    growth, blocks = [h.growth for h in case.holders], [set(h.blocks) for h in case.holders]
    step, history = 0, [num_free]
    for i in range(len(case.holders)):
        if not missing[i] and not growth[i]:
            ends[i] = 0
    while any(blocks):
        step += 1
        for i, held in enumerate(blocks):
            if i in ends:
                if step == ends[i] + case.lag:
                    held.clear()
            elif missing[i]:
                missing[i] = max(missing[i] - case.holders[i].chunk, 0)
            else:
                tokens[i] += 1
                growth[i] -= 1
                if tokens[i] > len(held) * case.block_size:
                    held.add(next_block)
                    next_block += 1
            if i not in ends and not missing[i] and not growth[i]:
                ends[i] = step
        history.append(total - len(set().union(*blocks)))
    return history


def demand_of(case: Case) -> tuple[Demand, SharedRelease]:
    """The same for the forecast: private blocks with their request, those of several with the last of these."""
    columns: list[tuple[int, ...]] = []
    for holder in case.holders:
        others = set().union(*(h.blocks for h in case.holders if h is not holder))
        prefill = -(-holder.num_missing // holder.chunk)
        spare = len(holder.blocks) * case.block_size - holder.num_tokens
        release = prefill + holder.growth + case.lag
        columns.append((len(holder.blocks - others), spare, 1 + prefill, holder.growth, release))
    demand = Demand(*np.array(columns, dtype=np.int64).reshape(-1, 5).T)
    last: dict[int, int] = {}
    shared: dict[int, int] = {}
    for holder, release in zip(case.holders, demand.release.tolist(), strict=True):
        for block in holder.blocks:
            if block in last:
                shared[block] = max(last[block], release)
            last[block] = max(last.get(block, 0), release)
    releases = np.array(list(shared.values()), dtype=np.int64)
    return demand, SharedRelease(np.ones(len(releases), dtype=np.int64), releases)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Up to 8 requests, prefixes shared in nested ways, at and around the ends of blocks."""
    block_size = draw(st.sampled_from([1, 2, 3, 4, 16]))
    holders: list[Holder] = []
    next_block = 0
    for _ in range(draw(st.integers(0, 8))):
        prefix: list[int] = []
        if holders and draw(st.booleans()):
            other = sorted(draw(st.sampled_from(holders)).blocks)
            prefix = other[: draw(st.integers(0, len(other)))]
        num_own = draw(st.integers(0 if prefix else 1, 4))
        blocks = {*prefix, *range(next_block, next_block + num_own)}
        next_block += num_own
        num_tokens = len(blocks) * block_size - draw(st.integers(0, block_size - 1) if num_own else st.just(0))
        num_missing = draw(st.sampled_from([0, 0, 1, 5, 9]))
        holders.append(
            Holder(num_missing, draw(st.integers(1, 5)), num_tokens, draw(st.integers(0, 3 * block_size + 2)), blocks)
        )
    return Case(block_size, draw(st.integers(1, 5)), holders)


def forecast_of(case: Case, num_free: int) -> I64:
    return Forecast(num_free, *demand_of(case), case.block_size).num_free


@settings(max_examples=400, deadline=None, derandomize=True)
@given(case=cases(), num_free=st.integers(0, 20))
def test_it_is_exact(case: Case, num_free: int) -> None:
    assert forecast_of(case, num_free).tolist() == free_by_hand(case, num_free)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(case=cases().filter(lambda case: len(case.holders) > 0), num_free=st.integers(0, 20))
def test_adding_the_last_one_is_as_good_as_forecasting_it_with_the_rest(case: Case, num_free: int) -> None:
    rest = Case(case.block_size, case.lag, case.holders[:-1])
    newcomer = case.holders[-1]
    demand, _ = demand_of(Case(case.block_size, case.lag, [newcomer]))
    releases = dict.fromkeys(newcomer.blocks, 0)
    for holder, release in zip(rest.holders, demand_of(rest)[0].release.tolist(), strict=True):
        for block in holder.blocks & newcomer.blocks:
            releases[block] = max(releases[block], release)
    held = np.array([release for release in releases.values() if release], dtype=np.int64)
    demand.num_held[0] -= len(held)
    forecast = Forecast(num_free + int(demand.num_held[0]), *demand_of(rest), case.block_size)
    with_newcomer = forecast.with_newcomer(demand, SharedRelease(np.ones(len(held), dtype=np.int64), held))
    expected = forecast_of(case, num_free).tolist()
    assert with_newcomer.tolist() == expected + [expected[-1]] * (len(with_newcomer) - len(expected))


def test_nobody_there() -> None:
    assert forecast_of(Case(16, 2, []), 7).tolist() == [7]
