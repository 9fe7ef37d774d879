"""Which groups the finder makes; that they are right is a law of every simulation (conftest.py)."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np

from toka.plan import MAX_SHARED_LEVELS, BatchPlan

NewSimulation = Callable[..., Any]
ROOMY: dict[str, Any] = {
    "num_blocks": 256,
    "block_size": 4,
    "max_request_tokens": 100,
    "max_seqs_per_forward": 32,
    "use_hydragen": True,
    "hydragen_min_group_size": 2,
    "hydragen_min_prefix_len": 8,
}
SYSTEM = [1, 2, 3, 4] * 5  # 20 tokens


def decode_plan(simulation: Any) -> BatchPlan:
    """The next step once all prompts are computed."""
    while True:
        plan = simulation.plan()
        if plan is None:
            simulation.commit()
        elif plan.num_tokens == plan.num_rows:
            return plan


def groups_of(plan: BatchPlan) -> list[tuple[int, int, int, int]]:
    """(level, number of members, begin, end) of each."""
    assert plan.shared is not None
    return [(level, stop - start, begin, end) for level, start, stop, begin, end in plan.shared.groups.tolist()]


def test_the_samples_of_one_prompt_are_a_group(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(**ROOMY)
    simulation.submit([*SYSTEM, 5], max_tokens=9, n=6)
    assert groups_of(decode_plan(simulation)) == [(0, 6, 0, 20)]
    simulation.finish()


def test_prompts_with_a_common_start_are_two_levels(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(**ROOMY)
    simulation.submit([*SYSTEM, *[5] * 9], max_tokens=9, n=4)
    simulation.submit([*SYSTEM, *[6] * 5], max_tokens=9, n=3)
    simulation.submit([*SYSTEM, 7, 7], max_tokens=9)
    assert groups_of(decode_plan(simulation)) == [(0, 8, 0, 20), (1, 4, 20, 28), (1, 3, 20, 24)]
    simulation.finish()


def test_a_short_common_start_is_not_worth_a_level(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(**ROOMY)
    for token in (5, 6):
        simulation.submit([1, 2, 3, 4, *[token] * 9], max_tokens=9, n=2)
    assert groups_of(decode_plan(simulation)) == [(0, 2, 0, 12), (0, 2, 0, 12)]
    simulation.finish()


def test_small_groups_are_left_alone(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(**{**ROOMY, "hydragen_min_group_size": 4})
    simulation.submit([*SYSTEM, 5], max_tokens=9, n=3)
    assert decode_plan(simulation).shared is None
    simulation.finish()


def test_levels_that_the_same_rows_share_are_one(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(**ROOMY)
    simulation.submit([*SYSTEM, *[5] * 9], max_tokens=20, n=4)
    [other] = simulation.submit([*SYSTEM, 6], max_tokens=20)
    assert groups_of(decode_plan(simulation)) == [(0, 5, 0, 20), (1, 4, 20, 28)]
    simulation.abort(other)
    assert groups_of(decode_plan(simulation)) == [(0, 4, 0, 28)]
    simulation.finish()


def test_what_was_found_is_kept_until_rows_change(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(**ROOMY)
    simulation.submit([*SYSTEM, 5], max_tokens=30, n=4)
    first = decode_plan(simulation)
    assert decode_plan(simulation).shared is first.shared
    simulation.abort(1)
    after = decode_plan(simulation)
    assert after.shared is not first.shared and groups_of(after) == [(0, 3, 0, 20)]
    simulation.finish()


def test_every_row_shares_as_much_as_enough_others_hold(new_simulation: NewSimulation) -> None:
    """Against a search through all block tables."""
    found = deep = 0
    for seed in range(40):
        rng = random.Random(seed)
        min_rows = rng.choice([2, 3])
        simulation = new_simulation(**{**ROOMY, "hydragen_min_group_size": min_rows, "hydragen_min_prefix_len": 1})
        for _ in range(rng.randrange(2, 10)):
            length = rng.randrange(1, 60)
            same = rng.randrange(length + 1)
            prompt = [1] * same + [rng.randrange(2, 4) for _ in range(length - same)]
            simulation.submit(prompt, max_tokens=12, n=rng.choice([1, 1, 2]))
            for _ in range(rng.randrange(3)):
                simulation.step()
        plan = decode_plan(simulation)
        table, size = simulation.scheduler._table, simulation.config.block_size
        lens = np.zeros(plan.num_rows, dtype=np.int32) if plan.shared is None else plan.shared.lens
        groups = [] if plan.shared is None else plan.shared.groups.tolist()
        for i, row in enumerate(plan.rows.tolist()):
            held = [table.blocks[r, : (plan.seq_lens[j] - 1) // size] for j, r in enumerate(plan.rows.tolist())]
            mine = table.blocks[row, : (plan.seq_lens[i] - 1) // size]
            common = sorted((_common(mine, other) for other in held), reverse=True)
            most = size * common[min_rows - 1] if len(common) >= min_rows else 0
            num_levels = sum(i in plan.shared.members[start:stop] for _, start, stop, _, _ in groups)
            assert lens[i] == most or (num_levels == MAX_SHARED_LEVELS and lens[i] < most)
            found += int(lens[i] > 0)
            deep += int(num_levels > 1)
        simulation.finish()
    assert found > 50 and deep > 10


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Blocks that both begin with."""
    length = min(len(a), len(b))
    differs = np.flatnonzero(a[:length] != b[:length])
    return int(differs[0]) if len(differs) else length
