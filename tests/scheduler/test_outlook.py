"""The outlook against what the scheduler then does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from toka.plan import I64
from toka.scheduler.admission import Load, Prospect
from toka.scheduler.outlook import HeadProspect

NewSimulation = Callable[..., Any]


class Probe:
    """Lets everybody in but the request that comes after `num_admitted`: of that moment it keeps the forecast."""

    retry_steps = 10**6

    def __init__(self, num_admitted: int):
        self.num_left = num_admitted
        self.forecast: I64 | None = None

    def admits(self, num_blocks_needed: int, load: Load, prospect: Prospect) -> bool:
        if self.num_left:
            self.num_left -= 1
            return True
        if self.forecast is None:
            assert isinstance(prospect, HeadProspect)
            prospect.unreserved()
            self.forecast = prospect._look().forecast.num_free
        return False


def free_from_then_on(simulation: Any, probe: Probe) -> list[int]:
    """Free blocks after each plan, from the one in which the probe looked; steps alternate as in the engine."""
    free: list[int] = []
    while probe.forecast is None or simulation.scheduler.stats().num_running:
        plan = simulation.plan()
        while plan is not None:
            if probe.forecast is not None:
                free.append(simulation.scheduler._pool.num_free)
            plan = simulation.plan()
        simulation.commit()
    return free


@pytest.mark.parametrize("steps_in_flight", [1, 2, 3, 8])
@pytest.mark.parametrize("num_steps_before", [0, 1, 5, 14])
def test_it_is_exact_where_everybody_decodes(
    new_simulation: NewSimulation, steps_in_flight: int, num_steps_before: int
) -> None:
    """Samples of one prompt share its blocks, another request shares some of them, others none; some drain already."""
    probe = Probe(7)
    simulation = new_simulation(
        probe,
        num_blocks=200,
        block_size=4,
        max_request_tokens=80,
        max_seqs_per_forward=16,
        steps_in_flight=steps_in_flight,
    )
    simulation.submit(list(range(13)), max_tokens=17, n=3)
    simulation.submit(list(range(9)), max_tokens=30)
    for length, max_tokens in ((4, 1), (7, 12), (8, 41)):
        simulation.submit([20] * length, max_tokens=max_tokens)
    for _ in range(num_steps_before):
        simulation.step()
    [last] = simulation.submit([1], max_tokens=1)
    free = free_from_then_on(simulation, probe)
    assert probe.forecast is not None
    assert free == probe.forecast.tolist()[: len(free)] and len(free) > 10
    simulation.abort(last)
    simulation.finish()


def test_prompts_in_chunks_make_it_cautious_not_wrong(new_simulation: NewSimulation) -> None:
    probe = Probe(5)
    simulation = new_simulation(
        probe, num_blocks=200, block_size=4, max_request_tokens=80, max_seqs_per_forward=8, max_tokens_per_forward=9
    )
    for length, max_tokens in ((30, 20), (9, 40), (41, 17), (3, 3), (22, 30)):
        simulation.submit([length % 23] * length, max_tokens=max_tokens)
    [last] = simulation.submit([1], max_tokens=1)
    free = np.array(free_from_then_on(simulation, probe))
    assert probe.forecast is not None
    expected = probe.forecast[: len(free)]
    assert np.all(expected <= free) and expected.min() >= free.min() - 4
    simulation.abort(last)
    simulation.finish()


def test_a_newcomer_that_overtakes_a_long_prompt_delays_it(new_simulation: NewSimulation) -> None:
    """Both fit only if it is counted that the blocks of the overtaken one stay taken for longer."""
    simulation = new_simulation(
        num_blocks=24,
        block_size=4,
        max_request_tokens=96,
        max_tokens_per_forward=4,
        max_seqs_per_forward=4,
        track_early_stopping=False,
    )
    simulation.submit([1] * 60, max_tokens=20)
    for _ in range(3):
        simulation.step()
    for priority in (-1, -2):
        simulation.submit([2 - priority] * 12, max_tokens=24, priority=priority)
    simulation.finish()
    scheduler = simulation.scheduler
    assert scheduler.stats().preemptions_total == scheduler.num_preemptions_by_priority
