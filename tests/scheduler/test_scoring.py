"""Logprobs: how prompts are cut that are scored, what the prefix cache gives them, and that nothing is lost or said twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]


def samples_of_plans(simulation: Any) -> list[tuple[int, int]]:
    """Of every plan until all is over: tokens drawn, places of prompts scored."""
    found = []
    while simulation.scheduler.has_work:
        while (plan := simulation.plan()) is not None:
            found.append((int(np.count_nonzero(plan.samples)), 0 if plan.scoring is None else len(plan.scoring.places)))
        simulation.commit()
    return found


def test_a_step_scores_no_more_places_than_it_has_rows(new_simulation: Callable[..., Any]) -> None:
    simulation = new_simulation(num_blocks=40, block_size=4, max_request_tokens=60, max_seqs_per_forward=6)
    simulation.submit(PROMPT, max_tokens=2, prompt_logprobs=2)
    assert samples_of_plans(simulation) == [(0, 6), (0, 6), (0, 6), (1, 1), (1, 0)]


def test_rows_that_decode_take_their_places_first(new_simulation: Callable[..., Any]) -> None:
    simulation = new_simulation(num_blocks=40, block_size=4, max_request_tokens=60, max_seqs_per_forward=3)
    simulation.submit([1, 2], max_tokens=9)
    simulation.step()
    simulation.submit(PROMPT[:6], max_tokens=1, prompt_logprobs=0)
    assert (1, 2) in samples_of_plans(simulation) and not simulation.live


def test_only_those_who_ask_are_asked_for(new_simulation: Callable[..., Any]) -> None:
    simulation = new_simulation(num_blocks=40, block_size=4, max_request_tokens=60)
    simulation.submit(PROMPT, max_tokens=3)
    plan = simulation.plan()
    assert plan.scoring is None
    simulation.submit(PROMPT[:3], max_tokens=3, logprobs=1)
    assert simulation.plan().scoring.drawn.tolist() == [False, True]
    simulation.finish()


def test_a_prompt_that_is_scored_takes_nothing_from_the_cache_and_leaves_it_all(
    new_simulation: Callable[..., Any],
) -> None:
    simulation = new_simulation(num_blocks=40, block_size=4, max_request_tokens=60)
    cached = []
    for prompt_logprobs in (None, 1, None):
        [request_id] = simulation.submit(PROMPT, max_tokens=1, prompt_logprobs=prompt_logprobs)
        simulation.finish()
        cached.append(simulation.done[request_id].cached)
    assert cached == [0, 0, 16]


def test_only_the_first_sample_scores_the_prompt(new_simulation: Callable[..., Any]) -> None:
    simulation = new_simulation(num_blocks=60, block_size=4, max_request_tokens=60)
    ids = simulation.submit(PROMPT, max_tokens=2, n=3, prompt_logprobs=1)
    simulation.finish()
    assert [len(simulation.done[request_id].prompt_scores) for request_id in ids] == [len(PROMPT) - 1, 0, 0]


@pytest.mark.parametrize("max_seqs", [1, 4, 64])
def test_max_tokens_0_computes_the_prompt_and_draws_nothing(new_simulation: Callable[..., Any], max_seqs: int) -> None:
    simulation = new_simulation(num_blocks=40, block_size=4, max_request_tokens=60, max_seqs_per_forward=max_seqs)
    for length in (1, 2, 5):
        simulation.submit(PROMPT[:length], max_tokens=0, n=2, prompt_logprobs=1)
    assert sum(drawn for drawn, _ in samples_of_plans(simulation)) == 0
    assert all(wanted.got == [] for wanted in simulation.done.values()) and len(simulation.done) == 6


def test_preempted_in_the_middle_of_its_prompt_it_goes_on_where_it_was(new_simulation: Callable[..., Any]) -> None:
    """Two long prompts, three places a step: an older request grows meanwhile and takes their blocks."""
    simulation = new_simulation(
        num_blocks=14, block_size=2, max_request_tokens=28, max_seqs_per_forward=3, admission="when_free", watermark=0.0
    )
    simulation.submit([1, 2], max_tokens=20, logprobs=0)
    simulation.step()
    for _ in range(2):
        simulation.submit(PROMPT[:12], max_tokens=3, prompt_logprobs=1, logprobs=1)
    simulation.finish()  # which compares everything said with what each request says alone
    assert simulation.scheduler.stats().preemptions_total > 0


def test_aborted_while_its_prompt_is_scored_it_says_no_more(new_simulation: Callable[..., Any]) -> None:
    simulation = new_simulation(num_blocks=40, block_size=4, max_request_tokens=60, max_seqs_per_forward=4)
    [request_id] = simulation.submit(PROMPT, max_tokens=2, prompt_logprobs=1)
    simulation.plan()
    simulation.abort(request_id)
    simulation.commit()  # a KeyError would be a score after the end
    simulation.finish()
