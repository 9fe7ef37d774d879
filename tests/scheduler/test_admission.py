from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from toka.scheduler.admission import AdmitByForecast, AdmitWhenFree, Load, ReserveForMax, fewest_to_preempt, policy_of
from toka.scheduler.config import SchedulerConfig

NewSimulation = Callable[..., Any]


@dataclass
class Foreseen:
    """A prospect as told."""

    least: int = -1
    left: int = -1

    def least_free(self) -> int:
        return self.least

    def unreserved(self) -> int:
        return self.left


IDLE, BUSY = Load(num_running=0, num_free_blocks=12), Load(num_running=1, num_free_blocks=12)


def test_the_watermark_counts_only_while_something_runs() -> None:
    policy = AdmitWhenFree(watermark_blocks=2)
    assert policy.admits(12, IDLE, Foreseen()) and policy.admits(10, BUSY, Foreseen())
    assert not policy.admits(11, BUSY, Foreseen())


def test_by_forecast_the_tightest_moment_counts() -> None:
    policy = AdmitByForecast(reserve_blocks=2)
    assert policy.admits(1, IDLE, Foreseen()) and policy.admits(1, BUSY, Foreseen(least=2))
    assert not policy.admits(1, BUSY, Foreseen(least=1))


def test_reserving_counts_all_that_may_come() -> None:
    assert ReserveForMax().admits(1, IDLE, Foreseen()) and ReserveForMax().admits(1, BUSY, Foreseen(left=0))
    assert not ReserveForMax().admits(1, BUSY, Foreseen(left=-1))


def test_the_configuration_names_the_policy() -> None:
    def policy(**settings: Any) -> object:
        return policy_of(SchedulerConfig(num_blocks=150, max_request_tokens=8, **settings))

    assert policy() == AdmitByForecast(reserve_blocks=2)
    assert policy(track_early_stopping=False) == AdmitByForecast(reserve_blocks=0)
    assert policy(admission="when_free") == AdmitWhenFree(watermark_blocks=2)
    assert policy(admission="reserve_max") == ReserveForMax()


def test_who_fits_beside_one_that_ends_first_is_let_in(new_simulation: NewSimulation) -> None:
    """Together at full length they need 12 blocks of the 9; but the first has given its back when the second needs them."""
    running: dict[str, int] = {}
    for admission in ("forecast", "reserve_max"):
        simulation = new_simulation(
            num_blocks=9, block_size=4, max_request_tokens=36, admission=admission, track_early_stopping=False
        )
        simulation.submit([1] * 8, max_tokens=5)
        simulation.submit([2] * 8, max_tokens=25)
        simulation.plan()
        running[admission] = simulation.scheduler.stats().num_running
        simulation.finish()
        assert simulation.scheduler.stats().preemptions_total == 0
    assert running == {"forecast": 2, "reserve_max": 1}


def test_once_stops_are_known_more_are_let_in(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(
        num_blocks=40, block_size=4, max_request_tokens=80, max_seqs_per_forward=32, watermark=0.0
    )
    early_stops = {"max_tokens": 70, "stop_ids": tuple(range(16))}
    most_before = most_after = 0
    for token in range(20):
        simulation.submit([token] * 6, **early_stops)
    while simulation.live:
        simulation.step()
        most_before = (
            max(most_before, simulation.scheduler.stats().num_running) if simulation.done == {} else most_before
        )
    for token in range(20):
        simulation.submit([token, 1] * 3, **early_stops)
    while simulation.live:
        simulation.step()
        most_after = max(most_after, simulation.scheduler.stats().num_running)
    simulation.finish()
    assert most_before <= 3 and most_after >= 10


def test_recomputed_tokens_are_counted(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(
        num_blocks=6, block_size=4, max_request_tokens=24, watermark=0.0, admission="when_free", prefix_cache=False
    )
    for token in range(3):
        simulation.submit([token] * 7, max_tokens=10)
    simulation.finish()
    computed = np.sum([7 + 10 - 1] * 3)
    assert simulation.scheduler.stats().preemptions_total > 0
    assert simulation.num_planned_tokens - computed == simulation.scheduler.num_recomputed_tokens > 0


@pytest.mark.parametrize("steps_in_flight", range(1, 9))
def test_a_stop_noticed_late_costs_no_more_than_the_steps_in_flight(
    new_simulation: NewSimulation, steps_in_flight: int
) -> None:
    simulation = new_simulation(
        num_blocks=60, block_size=4, max_request_tokens=60, max_seqs_per_forward=8, steps_in_flight=steps_in_flight
    )
    ids = [simulation.submit([token] * 5, max_tokens=40, stop_ids=(1, 5, 9))[0] for token in range(20)]
    simulation.finish()
    wanted = [simulation.done[request_id] for request_id in ids]
    num_stopped = sum(w.got[-1] in w.stop_ids for w in wanted)
    num_wanted = sum(len(w.got) for w in wanted)
    assert num_stopped > 5
    assert num_wanted <= simulation.num_drawn <= num_wanted + num_stopped * (steps_in_flight - 1)
    if steps_in_flight > 1:
        assert simulation.num_drawn > num_wanted


@pytest.mark.parametrize("num_candidates", [0, 1, 2, 3, 7, 8, 100])
def test_fewest_to_preempt_is_the_least_that_suffices(num_candidates: int) -> None:
    for least in range(num_candidates + 2):
        asked: list[int] = []

        def suffices(count: int, least: int = least, asked: list[int] = asked) -> bool:
            asked.append(count)
            return count >= least

        assert fewest_to_preempt(num_candidates, suffices) == (least if least <= num_candidates else None)
        assert len(asked) == len(set(asked)) <= 2 * num_candidates.bit_length() + 2
