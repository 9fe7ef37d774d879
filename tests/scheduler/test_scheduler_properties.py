"""Random traffic against the laws: whatever order submits, aborts, plans and commits come in, on pools that are too small.

The laws are in conftest.py and looked at after every event: conservation of rows and blocks, no slot written twice, no block
free that a step in flight touches, each output the one of its request alone, deadlines ending those and only those who had not
begun by then, an end for everybody. TOKA_TEST_SCHEDULER_EVENTS
sets how many events are tried, 200,000 by default: most of them in days of random traffic, which are cheap, the rest chosen
by Hypothesis, which shrinks what fails.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from toka.messages import FinishReason

NUM_EVENTS = int(os.environ.get("TOKA_TEST_SCHEDULER_EVENTS", "200000"))
CHOSEN_SHARE = 0.07
STEPS_PER_EXAMPLE = 60
EVENTS_PER_EXAMPLE = 150  # at least; a step of it is several events


def test_random_days_of_traffic(walk: Callable[[int, int], Any]) -> None:
    num_events = preemptions = by_priority = cached = expired = extended = seed = 0
    while num_events < (1 - CHOSEN_SHARE) * NUM_EVENTS:
        simulation = walk(seed, 300)
        stats = simulation.scheduler.stats()
        num_events += simulation.num_events
        preemptions += stats.preemptions_total
        by_priority += simulation.scheduler.num_preemptions_by_priority
        cached += stats.cached_prompt_tokens_total
        expired += sum(wanted.finish is FinishReason.EXPIRED for wanted in simulation.done.values())
        extended += simulation.num_extended
        seed += 1
    assert preemptions > by_priority > 0 and cached > 0 and expired > 0, "the traffic did not press the pool"
    assert extended > 0


def test_every_order_of_events(new_simulation: Callable[..., Any]) -> None:
    num_events = 0

    class Traffic(RuleBasedStateMachine):
        """Hypothesis chooses the limits and the events, and shrinks what fails."""

        @initialize(
            num_blocks=st.integers(4, 24),
            block_size=st.sampled_from([1, 2, 4]),
            max_request_tokens=st.integers(3, 40),
            max_tokens_per_forward=st.sampled_from([1, 4, 16]),
            max_seqs_per_forward=st.integers(1, 6),
            prefix_cache=st.booleans(),
            steps_in_flight=st.integers(1, 4),
            watermark=st.sampled_from([0.0, 0.1]),
            admission=st.sampled_from(["forecast", "when_free", "reserve_max"]),
            track_early_stopping=st.booleans(),
            use_hydragen=st.booleans(),
            hydragen_min_group_size=st.integers(1, 3),
            hydragen_min_prefix_len=st.sampled_from([1, 6]),
            retention=st.sampled_from(["worth", "lru"]),
        )
        def start(self, **config: Any) -> None:
            self.simulation = new_simulation(**config)

        @rule(
            data=st.data(),
            n=st.sampled_from([1, 1, 2, 3]),
            stop_ids=st.sampled_from([(), (3,), (1, 5, 9)]),
            salt=st.sampled_from(["", "a"]),
            priority=st.integers(-1, 1),
            session_id=st.sampled_from(["", "chat"]),
            deadline_s=st.sampled_from([math.inf, 2.0, 5.0]),
            logprobs=st.sampled_from([None, None, 2]),
            prompt_logprobs=st.sampled_from([None, None, 1]),
            grammar=st.booleans(),
        )
        def submit(self, data: st.DataObject, **asked: Any) -> None:
            limit = self.simulation.config.max_tokens_per_request
            length = data.draw(st.integers(1, limit - 1))
            tail = data.draw(st.integers(0, 2))  # few different prompts, so that prefixes meet
            prompt = [7] * (length - min(tail, length)) + [tail] * min(tail, length)
            max_tokens = data.draw(st.none() | st.integers(0, limit - length))
            most = limit - length if max_tokens is None else max_tokens
            min_tokens = data.draw(st.integers(0, min(2, most)))
            self.simulation.submit(
                prompt,
                max_tokens=max_tokens,
                min_tokens=min_tokens,
                **asked,
            )

        @rule(seconds=st.sampled_from([0.0, 1.0, 3.0]))
        def expire(self, seconds: float) -> None:
            self.simulation.expire(seconds)

        @precondition(lambda self: self.simulation.live)
        @rule(data=st.data())
        def abort(self, data: st.DataObject) -> None:
            self.simulation.abort(data.draw(st.sampled_from(list(self.simulation.live))))

        @rule(times=st.integers(1, 4))
        def plan(self, times: int) -> None:
            for _ in range(times):
                self.simulation.plan()

        @precondition(lambda self: self.simulation.in_flight)
        @rule()
        def commit(self) -> None:
            self.simulation.commit()

        @rule(times=st.integers(1, 8))
        def step(self, times: int) -> None:
            for _ in range(times):
                self.simulation.step()

        def teardown(self) -> None:
            nonlocal num_events
            if hasattr(self, "simulation"):
                self.simulation.finish()
                num_events += self.simulation.num_events

    run_state_machine_as_test(
        Traffic,
        settings=settings(
            max_examples=max(1, int(CHOSEN_SHARE * NUM_EVENTS / EVENTS_PER_EXAMPLE)),
            stateful_step_count=STEPS_PER_EXAMPLE,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert num_events >= CHOSEN_SHARE * NUM_EVENTS
