"""The scheduler as a whole, by example; every simulation also compares each output with the request run alone."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toka.errors import InvariantError, RequestError
from toka.messages import FinishReason, unpack_tokens
from toka.plan import StepResult
from toka.scheduler.admission import Load, Prospect
from toka.scheduler.submission import PATIENCE_S

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
ROOMY: dict[str, Any] = {"num_blocks": 64, "block_size": 4, "max_request_tokens": 60, "max_seqs_per_forward": 8}

NewSimulation = Callable[..., Any]


def test_one_request_runs_to_its_token_limit(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(**ROOMY)
    [request_id] = simulation.submit(PROMPT, max_tokens=5)
    simulation.finish()
    done = simulation.done[request_id]
    assert (len(done.got), done.finish, done.cached) == (5, FinishReason.LENGTH, 0)
    stats = simulation.scheduler.stats()
    assert (stats.num_steps_total, stats.prompt_tokens_total, stats.generation_tokens_total) == (5, 10, 5)


def test_decodes_come_first_and_prompt_chunks_fill_the_step(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(**ROOMY, max_tokens_per_forward=8)
    simulation.submit(PROMPT[:4], max_tokens=9)
    simulation.submit(PROMPT[::-1], max_tokens=9)
    first, second = simulation.plan(), simulation.plan()
    assert np.diff(first.query_start).tolist() == [4, 4] and first.samples.tolist() == [True, False]
    assert np.diff(second.query_start).tolist() == [1, 6] and second.samples.tolist() == [True, True]
    assert second.token_ids[0] == -1 - first.rows[0]  # its first token has not left the device yet
    assert second.token_ids[1:].tolist() == PROMPT[::-1][4:]
    assert second.seq_lens.tolist() == [5, 10]
    assert simulation.plan() is None  # two steps are in flight
    simulation.finish()


def test_without_a_token_in_flight_steps_still_alternate(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(**ROOMY, steps_in_flight=1)
    simulation.submit(PROMPT)
    assert simulation.plan() is not None
    assert simulation.plan() is None
    simulation.finish()


def test_stop_token_ends_a_request_and_its_late_result_is_dropped(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(**ROOMY, steps_in_flight=3)
    every_token = tuple(range(16))
    ids = [simulation.submit([token] * 3, max_tokens=20, stop_ids=every_token)[0] for token in range(6)]
    simulation.finish()
    stopped = [simulation.done[i] for i in ids if simulation.done[i].finish is FinishReason.STOP]
    assert len(stopped) == 6 and all(w.got[-1] in every_token for w in stopped)


def test_stop_token_as_the_last_allowed_one_is_a_stop(new_simulation: NewSimulation) -> None:
    probe = new_simulation(**ROOMY)
    [request_id] = probe.submit(PROMPT, max_tokens=3)
    probe.finish()
    last = probe.done[request_id].got[-1]
    assert last not in probe.done[request_id].got[:-1]
    simulation = new_simulation(**ROOMY)
    [request_id] = simulation.submit(PROMPT, max_tokens=3, stop_ids=(last,))
    simulation.finish()
    assert simulation.done[request_id].finish is FinishReason.STOP


def test_min_tokens_holds_stop_tokens_back_by_position(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(**ROOMY)
    stop_ids = tuple(range(16))
    [request_id] = simulation.submit(PROMPT, max_tokens=30, min_tokens=12, stop_ids=stop_ids)
    settings = simulation.plan().settings
    assert settings.held_back_until.tolist() == [len(PROMPT) + 12]
    assert settings.held_back_ids.tolist() == [list(stop_ids)]
    simulation.finish()
    assert len(simulation.done[request_id].got) > 12 or simulation.done[request_id].got[11] in stop_ids


def test_max_tokens_none_runs_until_the_context_is_full(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(**ROOMY)
    [request_id] = simulation.submit(PROMPT, max_tokens=None)
    simulation.finish()
    assert len(simulation.done[request_id].got) == ROOMY["max_request_tokens"] - len(PROMPT)


def test_samples_share_the_prompts_full_blocks_in_the_same_step(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(**ROOMY)
    ids = simulation.submit(PROMPT, max_tokens=4, n=3)
    plan = simulation.plan()
    assert np.diff(plan.query_start).tolist() == [10, 2, 2]  # two full blocks of four are shared, the rest is computed
    assert plan.settings.seed.tolist() == [1000, 1001, 1002]
    simulation.finish()
    assert [simulation.done[i].cached for i in ids] == [0, 8, 8]
    assert len({tuple(simulation.done[i].got) for i in ids}) == 3


def test_samples_share_a_prompt_that_takes_several_steps(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(**ROOMY, max_tokens_per_forward=4)
    ids = simulation.submit(PROMPT, max_tokens=2, n=3)
    simulation.finish()
    assert [simulation.done[i].cached for i in ids] == [0, 8, 8]


@pytest.mark.parametrize(("max_tokens", "cached"), [(6, 12), (7, 16), (9, 16)])
def test_past_requests_leave_their_prefix_prompt_and_output(
    new_simulation: NewSimulation, max_tokens: int, cached: int
) -> None:
    simulation = new_simulation(**ROOMY)
    [first] = simulation.submit(PROMPT, max_tokens=max_tokens)
    simulation.finish()
    # The last token's KV is never written; of those before it, full blocks of four can be found.
    [second] = simulation.submit(PROMPT + simulation.done[first].got + [3, 1, 4], max_tokens=2)
    simulation.finish()
    assert simulation.done[second].cached == cached
    assert simulation.scheduler.stats().cached_prompt_tokens_total == cached


def test_last_prompt_token_is_always_computed(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(**ROOMY)
    for cached in (0, 4):
        [request_id] = simulation.submit(PROMPT[:8], max_tokens=1)
        simulation.finish()
        assert simulation.done[request_id].cached == cached


def test_salts_share_nothing(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(**ROOMY)
    cached = []
    for salt in ("", "a", "b", "a", ""):
        [request_id] = simulation.submit(PROMPT, max_tokens=1, salt=salt)
        simulation.finish()
        cached.append(simulation.done[request_id].cached)
    assert cached == [0, 0, 0, 8, 8]


def test_prefix_cache_off_shares_nothing(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(**ROOMY, prefix_cache=False)
    ids = simulation.submit(PROMPT, max_tokens=12, n=2)
    simulation.finish()
    assert [simulation.done[i].cached for i in ids] == [0, 0]


def test_latest_of_the_lowest_priority_is_preempted_and_keeps_its_tokens(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(
        num_blocks=10, block_size=4, max_request_tokens=40, max_seqs_per_forward=4, watermark=0.0, admission="when_free"
    )
    [urgent] = simulation.submit([1, 2, 3], max_tokens=25, priority=-1)
    [early] = simulation.submit([4, 5, 6], max_tokens=25)
    [late] = simulation.submit([7, 8, 9], max_tokens=25)
    simulation.finish()
    assert simulation.scheduler.stats().preemptions_total >= 1
    assert list(simulation.done) == [urgent, early, late]
    assert simulation.scheduler.stats().generation_tokens_total == 75  # none drawn twice


def test_priority_then_arrival_decides_who_begins(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(**{**ROOMY, "max_seqs_per_forward": 1})
    order = [simulation.submit([i + 1], max_tokens=2, priority=p)[0] for i, p in enumerate((1, 0, 0, -5))]
    simulation.finish()
    assert list(simulation.done) == [order[3], order[1], order[2], order[0]]


def test_within_a_priority_the_earliest_deadline_goes_first(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(**{**ROOMY, "max_seqs_per_forward": 1})
    deadlines = (math.inf, 30.0, 20.0, math.inf)
    ids = [simulation.submit([i + 1], max_tokens=2, deadline_s=deadline)[0] for i, deadline in enumerate(deadlines)]
    simulation.finish()
    assert list(simulation.done) == [ids[2], ids[1], ids[0], ids[3]]


def test_a_deadline_overtakes_only_for_so_long(new_simulation: NewSimulation) -> None:
    """A request without a deadline that waits for more than the scheduler's patience goes before new ones that have one."""
    simulation = new_simulation(**{**ROOMY, "max_seqs_per_forward": 1})
    [patient] = simulation.submit([1], max_tokens=2)
    simulation.now_s = PATIENCE_S
    [urgent] = simulation.submit([2], max_tokens=2, deadline_s=1.0)
    simulation.finish()
    assert list(simulation.done) == [patient, urgent]


def test_who_has_not_begun_by_its_deadline_ends_and_who_has_goes_on(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(**{**ROOMY, "max_seqs_per_forward": 1})
    [running] = simulation.submit([1], max_tokens=9, deadline_s=1.0)
    simulation.step()
    ids = simulation.submit([2], max_tokens=2, n=2, deadline_s=2.0)
    [later] = simulation.submit([3], max_tokens=2, deadline_s=3.0)
    assert simulation.expire(2.0) == []  # not past it yet
    assert simulation.expire(0.5) == ids
    simulation.finish()
    assert [simulation.done[i].finish for i in (running, *ids, later)] == [
        FinishReason.LENGTH, FinishReason.EXPIRED, FinishReason.EXPIRED, FinishReason.LENGTH,
    ]  # fmt: skip


def test_a_preempted_request_does_not_expire(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(**{**ROOMY, "max_seqs_per_forward": 1})
    [first] = simulation.submit([1, 2, 3], max_tokens=9, deadline_s=1.0)
    simulation.step()
    [urgent] = simulation.submit([4, 5], max_tokens=30, priority=-1)
    for _ in range(6):
        simulation.step()
    assert simulation.scheduler.stats().preemptions_total == 1
    assert simulation.expire(10.0) == []
    simulation.finish()
    assert list(simulation.done) == [urgent, first]


@pytest.mark.parametrize(("admission", "num_preempted"), [("when_free", 0), ("forecast", 2), ("reserve_max", 2)])
def test_an_urgent_request_preempts_just_as_many_as_it_needs(
    new_simulation: NewSimulation, admission: str, num_preempted: int
) -> None:
    simulation = new_simulation(
        num_blocks=40, block_size=4, max_request_tokens=60, watermark=0.0, admission=admission, prefix_cache=False
    )
    ids = [simulation.submit([i] * 20, max_tokens=20)[0] for i in range(4)]  # ten blocks each at the end, all there are
    simulation.step()
    [urgent] = simulation.submit([9] * 48, max_tokens=12, priority=-1)  # twelve at once, fifteen at the end
    for _ in range(8):
        simulation.step()
    assert len(simulation.live[urgent].got) > 0, "it did not begin"
    assert simulation.scheduler.num_preemptions_by_priority == num_preempted
    simulation.finish()
    assert list(simulation.done) == [urgent, *ids]


def test_an_urgent_request_that_finds_the_batch_full_takes_the_place_of_the_last(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(**{**ROOMY, "max_seqs_per_forward": 2, "max_tokens_per_forward": 2})
    ids = [simulation.submit([i], max_tokens=9, priority=1)[0] for i in range(2)]
    for _ in range(3):
        simulation.step()
    [urgent] = simulation.submit([5], max_tokens=2, priority=0)
    simulation.finish()
    assert list(simulation.done) == [urgent, *ids]
    assert simulation.scheduler.num_preemptions_by_priority == 1


def test_nobody_is_preempted_for_an_equal_or_where_it_would_not_help(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(num_blocks=20, block_size=4, max_request_tokens=60, watermark=0.0)
    [best] = simulation.submit([1] * 40, max_tokens=20, priority=-2)  # fifteen blocks at the end
    [worse] = simulation.submit([2] * 8, max_tokens=8, priority=1)
    simulation.step()
    [equal] = simulation.submit([3] * 8, max_tokens=8, priority=1)
    [large] = simulation.submit([4] * 40, max_tokens=8, priority=-1)  # does not fit beside the best
    simulation.finish()
    assert simulation.scheduler.num_preemptions_by_priority == 0
    assert next(iter(simulation.done)) == worse and set(simulation.done) == {best, worse, equal, large}


def test_what_a_conversation_left_outlives_what_came_after_it(new_simulation: NewSimulation) -> None:
    """With a session id from the first turn on; without one from the turn on that found the output of the one before."""

    def cached_in_turn(session_id: str, num_turns: int, retention: str) -> int:
        simulation = new_simulation(num_blocks=24, block_size=4, max_request_tokens=80, retention=retention)
        tokens = list(PROMPT)
        for turn in range(num_turns):
            [request_id] = simulation.submit(tokens, max_tokens=4, session_id=session_id)
            simulation.finish()
            tokens += [*simulation.done[request_id].got, 1, 2]
            for other in range(4 if turn == num_turns - 2 else 0):  # they fill the pool nearly twice
                simulation.submit([11 + other] * 38, max_tokens=2)
                simulation.finish()
        return simulation.done[request_id].cached

    assert cached_in_turn("chat", 2, "worth") == 12
    assert cached_in_turn("", 2, "worth") == 0
    assert cached_in_turn("", 3, "worth") == 16
    assert cached_in_turn("chat", 3, "lru") == 0


def test_an_urgent_prompt_goes_before_the_rest_of_another(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(**ROOMY, max_tokens_per_forward=4)
    simulation.submit(PROMPT, max_tokens=1)
    first = simulation.plan()
    simulation.submit(PROMPT[::-1][:3], max_tokens=1, priority=-1)
    second = simulation.plan()
    assert second.token_ids.tolist() == [10, 9, 8, 5] and second.rows[1] == first.rows[0]
    simulation.finish()


def test_head_that_lacks_blocks_is_not_overtaken_and_begins_when_they_are_free(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(num_blocks=10, block_size=4, max_request_tokens=40, watermark=0.0, prefix_cache=False)
    [running] = simulation.submit([1] * 17, max_tokens=4)
    simulation.step()
    [big] = simulation.submit([2] * 30, max_tokens=1)
    [small] = simulation.submit([3], max_tokens=1)
    simulation.finish()
    assert list(simulation.done) == [running, big, small]


def test_blocked_head_begins_once_its_prefix_can_be_shared(new_simulation: NewSimulation) -> None:
    limits = {"num_blocks": 22, "block_size": 1, "max_request_tokens": 22, "watermark": 0.0}
    probe = new_simulation(**limits)
    [request_id] = probe.submit([1, 2], max_tokens=18)
    probe.finish()
    output = probe.done[request_id].got

    simulation = new_simulation(**limits)
    [writer] = simulation.submit([1, 2], max_tokens=18)
    simulation.step()
    [filler] = simulation.submit([9] * 6, max_tokens=6)
    simulation.step()
    # Needs 13 blocks of its own at first, fewer and fewer as the writer's output, which is its prompt, can be shared.
    [reader] = simulation.submit([1, 2, *output[:14], 3], max_tokens=1)
    simulation.finish()
    assert list(simulation.done) == [filler, reader, writer] and simulation.done[reader].cached > 6


def test_a_blocked_head_that_is_aborted_blocks_nobody(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(num_blocks=10, block_size=4, max_request_tokens=40, watermark=0.0)
    simulation.submit([1] * 17, max_tokens=15)
    simulation.step()
    [big] = simulation.submit([2] * 30, max_tokens=1)
    simulation.step()
    simulation.submit([3], max_tokens=1)
    simulation.abort(big)
    while simulation.in_flight:
        simulation.commit()
    assert simulation.plan().num_rows == 2
    simulation.finish()


def test_the_tail_of_a_past_prefix_is_evicted_before_its_head(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(num_blocks=4, block_size=4, max_request_tokens=17, watermark=0.0)
    for prompt, cached in (([1] * 16, 0), ([2] * 4, 0), ([1] * 16, 12)):
        [request_id] = simulation.submit(prompt, max_tokens=1)
        simulation.finish()
        assert simulation.done[request_id].cached == cached


def test_no_more_are_preempted_than_the_blocks_on_their_way_back_call_for(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(
        num_blocks=6, block_size=4, max_request_tokens=24, steps_in_flight=3, watermark=0.0, admission="when_free"
    )
    for token in range(3):
        simulation.submit([token] * 7, max_tokens=10)
    while not simulation.scheduler.stats().preemptions_total:
        simulation.step()
    assert simulation.scheduler.stats().preemptions_total == 1  # its two blocks serve the two that went on
    simulation.finish()


def test_a_policy_may_say_yes_too_often(new_simulation: NewSimulation) -> None:
    class Always:
        retry_steps = 1

        def admits(self, num_blocks_needed: int, load: Load, prospect: Prospect) -> bool:
            return True

    simulation = new_simulation(Always(), num_blocks=8, block_size=4, max_request_tokens=30)
    for token in range(5):
        simulation.submit([token] * 12, max_tokens=12)
    simulation.finish()


@pytest.mark.parametrize("num_steps_before", range(6))
def test_abort_at_any_moment_gives_everything_back(new_simulation: NewSimulation, num_steps_before: int) -> None:
    simulation = new_simulation(**ROOMY, max_tokens_per_forward=4)
    ids = simulation.submit(PROMPT, max_tokens=3, n=2)
    for _ in range(num_steps_before):
        simulation.step()
    simulation.plan()
    for request_id in [*ids, 999]:
        simulation.abort(request_id)
    if simulation.in_flight:
        assert simulation.scheduler.stats().num_free_blocks < 64, "blocks came back while a step was in flight"
    simulation.finish()


def test_an_aborted_id_can_be_used_again_at_once(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(**ROOMY)
    [request_id] = simulation.submit(PROMPT, max_tokens=9)
    simulation.plan()
    simulation.abort(request_id)
    simulation.next_id = request_id
    simulation.salt_of_seed.clear()
    simulation.submit(PROMPT, max_tokens=9)
    simulation.finish()
    assert len(simulation.done[request_id].got) == 9


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [23]}, "prompt"),
        ({"prompt": [1] * 60}, "prompt"),
        ({"prompt": [1] * 50, "max_tokens": 11}, "max_tokens"),
        ({"prompt": [1] * 58, "max_tokens": None, "min_tokens": 3}, "min_tokens"),
        ({"prompt": [1], "n": 0}, "n"),
        ({"prompt": [1], "priority": 2**63}, "priority"),
        ({"prompt": [1], "deadline_s": 0.0}, "deadline_s"),
        ({"prompt": [1], "deadline_s": math.nan}, "deadline_s"),
        ({"prompt": [1], "stop_ids": tuple(range(33))}, "stop_token_ids"),
        ({"prompt": [1], "stop_ids": tuple(range(17)), "min_tokens": 1}, "stop_token_ids"),
    ],
)
def test_what_could_never_run_is_refused_at_once(new_simulation: NewSimulation, arguments: Any, param: str) -> None:
    simulation = new_simulation(**ROOMY)
    with pytest.raises(RequestError) as refused:
        simulation.submit(**arguments)
    assert (refused.value.param, refused.value.status) == (param, 400)
    assert not simulation.scheduler.has_work


def test_an_id_in_use_is_refused(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(**ROOMY)
    simulation.submit(PROMPT, n=3)
    simulation.next_id = 3
    with pytest.raises(RequestError, match="3 is in use"):
        simulation.submit(PROMPT)


def test_a_request_that_fills_the_whole_pool_runs(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(num_blocks=3, block_size=4, max_request_tokens=1000)
    assert simulation.config.max_tokens_per_request == 13  # the last token drawn is never written
    simulation.submit([1] * 9, max_tokens=4)
    simulation.submit([2] * 12, max_tokens=1)
    simulation.finish()
    with pytest.raises(RequestError):
        simulation.submit([1] * 9, max_tokens=5)


def test_commit_refuses_a_result_out_of_order_or_of_another_size(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(**ROOMY)
    simulation.submit(PROMPT)
    first, second = simulation.plan(), simulation.plan()
    with pytest.raises(InvariantError, match="oldest"):
        simulation.scheduler.commit(StepResult(second.step, np.zeros(1, dtype=np.int32)))
    with pytest.raises(InvariantError, match="rows"):
        simulation.scheduler.commit(StepResult(first.step, np.zeros(2, dtype=np.int32)))


def test_outputs_pack_into_the_message(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(**ROOMY)
    ids = simulation.submit(PROMPT, n=2, max_tokens=1)
    outputs = simulation.scheduler.commit(simulation.device.run(simulation.scheduler.next_plan(), {}))
    message = outputs.pack(simulation.scheduler.stats())
    assert np.frombuffer(message.request_ids, dtype="<i8").tolist() == ids
    assert unpack_tokens(message.token_ids).tolist() == outputs.token_ids.tolist()
    assert list(message.finish) == [FinishReason.LENGTH] * 2
    assert np.frombuffer(message.cached, dtype="<i4").tolist() == [0, 8]


def test_an_all_decode_step_reuses_its_arrays(new_simulation: NewSimulation) -> None:
    """Nothing is built anew for rows that just go on."""
    simulation = new_simulation(**ROOMY)
    simulation.submit(PROMPT[:9], n=4, max_tokens=20)
    simulation.step()
    first = simulation.plan()
    simulation.commit()
    second = simulation.plan()
    for name in ("rows", "query_start", "token_ids", "samples", "table", "settings"):
        assert getattr(first, name) is getattr(second, name)
    assert (second.seq_lens - first.seq_lens).tolist() == [1] * 4


def test_the_same_trace_gives_the_same_plan_bytes_under_any_hash_seed() -> None:
    script = (
        "import hashlib, runpy; walk = runpy.run_path('conftest.py')['random_walk']; "
        "print(hashlib.sha256(b''.join(b''.join(walk(seed, 150).trace) for seed in range(6))).hexdigest())"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parent,
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    digests = {run.communicate(timeout=100)[0] for run in runs}
    assert len(digests) == 1 and len(digests.pop()) == 65


def test_forced_tokens_are_computed_in_one_step_and_those_in_flight_dropped(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(**ROOMY, steps_in_flight=2)
    [request_id] = simulation.submit(PROMPT, max_tokens=12, grammar=True)
    wanted = simulation.live[request_id]
    wanted.forced = [None, *[11, 12, 13, 14, 15, 16, 17], None, None, None, None]
    first, second = simulation.plan(), simulation.plan()
    assert first.masked.request_ids.tolist() == second.masked.request_ids.tolist() == [request_id]
    simulation.commit()
    assert wanted.got[1:] == [11, 12, 13, 14, 15, 16, 17] and simulation.num_extended == 7
    third = simulation.plan()
    assert third.token_ids.tolist() == wanted.got[1:]  # the second step computes the first drawn token
    assert third.seq_lens.tolist() == [len(PROMPT) + 8] and third.samples.tolist() == [True]
    simulation.finish()
    assert simulation.scheduler.stats().num_steps_total == 2 + 4


@pytest.mark.parametrize(
    ("fields", "forced", "num_taken"),
    [
        ({}, [5, 6, 7, 8], 4),
        ({"max_tokens": 4}, [5, 6, 7, 8], 2),  # the last one is drawn, since it ends the request
        ({"max_tokens": 3}, [5, 6], 0),
        ({}, [5], 0),  # the step in flight draws it
        ({"stop_ids": (7,)}, [5, 6, 7, 8], 2),
        ({"stop_ids": (6,)}, [5, 6, 7, 8], 0),
        ({"logprobs": 0}, [5, 6, 7, 8], 0),
    ],
)
def test_how_many_forced_tokens_need_not_be_drawn(
    new_simulation: NewSimulation, fields: Any, forced: list[int], num_taken: int
) -> None:
    simulation = new_simulation(**ROOMY)
    [request_id] = simulation.submit(PROMPT, **{"max_tokens": 20, "grammar": True, **fields})
    wanted = simulation.live[request_id]
    wanted.forced = [None, *forced, *[None] * 20][: wanted.max_tokens]
    simulation.step()
    assert simulation.num_extended == num_taken and wanted.got[1:] == forced[:num_taken]
    simulation.finish()


def test_forced_tokens_wait_for_no_blocks_and_are_lost_to_no_preemption(new_simulation: NewSimulation) -> None:
    """Too few blocks for all of them at once: they are drawn under masks then, and every output is what it would be alone."""
    simulation = new_simulation(num_blocks=8, block_size=4, max_request_tokens=30, admission="when_free", watermark=0.0)
    ids = [simulation.submit([i, 2, 3, 4], max_tokens=20, grammar=True)[0] for i in range(3)]
    simulation.finish()
    assert simulation.scheduler.stats().preemptions_total > 0 and simulation.num_extended > 0
    assert all(len(simulation.done[i].got) == 20 for i in ids)


def test_where_nobody_may_be_preempted_no_request_grows_faster_than_foreseen(new_simulation: NewSimulation) -> None:
    simulation = new_simulation(**ROOMY, track_early_stopping=False)
    simulation.submit(PROMPT, max_tokens=20, grammar=True)
    simulation.finish()
    assert simulation.num_extended == 0
