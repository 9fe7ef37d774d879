"""Engines that pool: every prompt's vector reaches its request once, in chunks or whole, whatever else is aborted or preempted."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import numpy as np
import pytest

from toka.errors import ConfigError, RequestError
from toka.messages import FinishReason, StepOutputs, Submit, decode_from_engine, encode, pack_tokens
from toka.params import SamplingParams
from toka.plan import BatchPlan, StepResult
from toka.scheduler.config import SchedulerConfig
from toka.scheduler.outputs import TokenOutputs
from toka.scheduler.scheduler import Scheduler

CONTEXT = 24


def vector_of(prompt: list[int]) -> list[float]:
    """What stands for the vector of a prompt; exact in 32 bits, and no two prompts of a test share it."""
    value = 7
    for token in prompt:
        value = (value * 31 + token) % 2**22
    return [float(len(prompt)), float(value)]


class Pools:
    """A scheduler and a device that keeps each row's tokens; a row that begins at position 0 begins anew."""

    def __init__(self, **config: Any):
        settings = {"num_blocks": 40, "block_size": 4, "max_tokens_per_forward": 30, "max_seqs_per_forward": 6}
        self.config = SchedulerConfig(
            **settings
            | {"max_request_tokens": CONTEXT + 1, "prefix_cache": False, "admission": "when_free", "pools": True}
            | config
        )
        self.scheduler = Scheduler(self.config, secret=bytes(32))
        self.wanted: dict[int, list[int]] = {}
        self.plans: list[BatchPlan] = []
        self._rows: dict[int, list[int]] = {}
        self._in_flight: deque[BatchPlan] = deque()

    def submit(self, prompt: list[int], priority: int = 0) -> int:
        request_id = len(self.wanted) + 1
        sampling = SamplingParams(max_tokens=0)
        self.scheduler.submit(
            Submit(
                request_id=request_id,
                prompt=pack_tokens(prompt),
                sampling=sampling,
                stop_token_ids=(),
                seed=0,
                priority=priority,
            )
        )
        self.wanted[request_id] = prompt
        return request_id

    def abort(self, request_id: int) -> None:
        self.scheduler.abort(request_id)
        self.wanted[request_id] = []

    def plan(self) -> BatchPlan | None:
        plan = self.scheduler.next_plan()
        if plan is not None:
            assert plan.num_tokens <= self.config.max_tokens_per_forward
            assert plan.num_rows <= self.config.max_seqs_per_forward
            self.plans.append(plan)
            self._in_flight.append(plan)
        return plan

    def commit(self) -> TokenOutputs:
        plan = self._in_flight.popleft()
        vectors = []
        for i, row in enumerate(plan.rows.tolist()):
            begin, end = plan.query_start[i : i + 2].tolist()
            tokens = [] if plan.seq_lens[i] == end - begin else self._rows[row]
            self._rows[row] = tokens + plan.token_ids[begin:end].tolist()
            assert len(self._rows[row]) == plan.seq_lens[i]
            if plan.samples[i]:
                vectors.append(vector_of(self._rows[row]))
        found = np.array(vectors, dtype=np.float32).reshape(-1, 2)
        outputs = self.scheduler.commit(StepResult(plan.step, np.zeros(plan.num_rows, dtype=np.int32), vectors=found))
        self.scheduler.check_invariants()
        return outputs

    def finish(self) -> dict[int, list[float]]:
        """Run to the end; the vectors by request."""
        got: dict[int, list[float]] = {}
        while self.scheduler.has_work:
            while self.plan() is not None:
                pass
            self.take(self.commit(), got)
        return got

    @staticmethod
    def take(outputs: TokenOutputs, got: dict[int, list[float]]) -> None:
        vectors = [] if outputs.vectors is None else outputs.vectors.tolist()
        columns = (outputs.request_ids.tolist(), outputs.token_ids, outputs.finish, vectors)
        for request_id, token, reason, vector in zip(*columns, strict=True):
            assert request_id not in got and token == -1 and reason == FinishReason.LENGTH
            got[request_id] = vector


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(1000) for _ in range(draw.randint(1, CONTEXT))] for _ in range(count)]


@pytest.mark.parametrize("whole_prompts", [False, True])
def test_every_prompt_has_its_vector(whole_prompts: bool) -> None:
    pools = Pools(whole_prompts=whole_prompts)
    for prompt in prompts(50):
        pools.submit(prompt)
    assert pools.finish() == {request_id: vector_of(prompt) for request_id, prompt in pools.wanted.items()}
    is_cut = any(plan.seq_lens[i] > np.diff(plan.query_start)[i] for plan in pools.plans for i in range(plan.num_rows))
    assert is_cut is not whole_prompts


def test_a_whole_prompt_waits_for_a_step_with_room() -> None:
    pools = Pools(whole_prompts=True)
    for length in (20, 11, 10, 24):
        pools.submit([length] * length)
    sizes = []
    while pools.scheduler.has_work:
        while (plan := pools.plan()) is not None:
            sizes.append(np.diff(plan.query_start).tolist())
        pools.commit()
    assert sizes == [[20], [11, 10], [24]]


@pytest.mark.parametrize("whole_prompts", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_aborts_priorities_and_few_blocks(whole_prompts: bool, seed: int) -> None:
    """Few blocks, so that later requests of better priority preempt what is being computed."""
    draw = random.Random(seed)
    pools = Pools(whole_prompts=whole_prompts, num_blocks=12, max_tokens_per_forward=CONTEXT, steps_in_flight=2)
    got: dict[int, list[float]] = {}
    for prompt in prompts(80, seed):
        pools.submit(prompt, priority=draw.randint(-2, 2))
        if draw.random() < 0.2:
            pools.abort(draw.randint(1, len(pools.wanted)))
        if draw.random() < 0.5:
            pools.plan()
        if draw.random() < 0.4 and pools._in_flight:
            pools.take(pools.commit(), got)
    got |= pools.finish()
    alive = {request_id: prompt for request_id, prompt in pools.wanted.items() if prompt}
    assert {request_id: got[request_id] for request_id in alive} == {
        request_id: vector_of(prompt) for request_id, prompt in alive.items()
    }


def test_the_longest_prompt_fits_and_no_longer_one() -> None:
    pools = Pools(whole_prompts=True)
    pools.submit([1] * CONTEXT)
    with pytest.raises(RequestError, match=f"at most {CONTEXT + 1} tokens"):
        pools.submit([1] * (CONTEXT + 1))
    assert len(pools.finish()) == 1


def test_a_step_must_hold_the_longest_whole_prompt() -> None:
    with pytest.raises(ConfigError, match="max_tokens_per_forward=23 must hold a prompt of 24 tokens"):
        Pools(whole_prompts=True, max_tokens_per_forward=23)


def test_vectors_travel_with_their_entries() -> None:
    pools = Pools()
    pools.submit([5, 6])
    pools.submit([7])
    pools.plan()
    outputs = pools.commit()
    message = decode_from_engine(encode(outputs.pack(pools.scheduler.stats())))
    assert isinstance(message, StepOutputs)
    vectors = np.frombuffer(message.vectors, "<f4").reshape(2, -1)
    assert vectors.tolist() == [vector_of([5, 6]), vector_of([7])]
