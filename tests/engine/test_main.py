"""The engine's loop between its sockets, with a scheduler and no model."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import zmq

from toka.engine.core import EngineCore
from toka.engine.main import _serve
from toka.messages import (
    FinishReason,
    FromEngine,
    Rejected,
    Shutdown,
    StepOutputs,
    Submit,
    ToEngine,
    decode_from_engine,
    encode,
    pack_tokens,
)
from toka.params import SamplingParams
from toka.plan import BatchPlan, StepResult
from toka.scheduler.config import SchedulerConfig
from toka.scheduler.scheduler import Scheduler


class AlwaysFive:
    """An executor whose model draws nothing but token 5."""

    def __init__(self) -> None:
        self._in_flight: deque[BatchPlan] = deque()

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def launch(self, plan: BatchPlan) -> None:
        self._in_flight.append(plan)

    def wait(self) -> StepResult:
        plan = self._in_flight.popleft()
        return StepResult(plan.step, np.full(plan.num_rows, 5, dtype=np.int32))

    def shutdown(self) -> None:
        pass


def submit(request_id: int, **fields: Any) -> Submit:
    sampling = SamplingParams(max_tokens=3)
    prompt = pack_tokens([1, 2, 3])
    return Submit(request_id=request_id, prompt=prompt, sampling=sampling, stop_token_ids=(), seed=0, **fields)


def new_engine() -> EngineCore:
    scheduler = Scheduler(SchedulerConfig(num_blocks=8, max_request_tokens=64))
    return EngineCore(scheduler, AlwaysFive(), cast("Any", SimpleNamespace(compiles_after_freeze=0)))


def answers(messages: list[ToEngine], is_enough: Callable[[list[FromEngine]], bool]) -> list[FromEngine]:
    """What a running engine answers to these messages until that is enough."""
    engine = new_engine()
    with zmq.Context() as context, context.socket(zmq.PAIR) as ours, context.socket(zmq.PAIR) as its:
        ours.bind("inproc://engine")
        its.connect("inproc://engine")
        for message in messages:
            ours.send(encode(message))
        thread = threading.Thread(target=_serve, args=(engine, its, lambda message: its.send(encode(message))))
        thread.start()
        received: list[FromEngine] = []
        while not is_enough(received):
            assert ours.poll(10_000), received
            received.append(decode_from_engine(ours.recv()))
        ours.send(encode(Shutdown()))
        thread.join(10)
        assert not thread.is_alive()
    return received


def ends(received: list[FromEngine]) -> dict[int, FinishReason]:
    found: dict[int, FinishReason] = {}
    for step in received:
        if isinstance(step, StepOutputs):
            ids = np.frombuffer(step.request_ids, "<i8").tolist()
            found |= {i: FinishReason(reason) for i, reason in zip(ids, step.finish, strict=True) if reason}
    return found


def test_a_deadline_that_passed_before_the_request_came_to_the_engine_ends_it() -> None:
    now = time.perf_counter()
    late, in_time = submit(1, arrival_s=now - 10, deadline_s=1.0), submit(2, arrival_s=now, deadline_s=3600.0)
    received = answers([late, in_time], lambda received: len(ends(received)) == 2)
    assert ends(received) == {1: FinishReason.EXPIRED, 2: FinishReason.LENGTH}
    steps = [step for step in received if isinstance(step, StepOutputs)]
    assert np.frombuffer(steps[0].token_ids, "<i4").tolist() == [-1]


@pytest.mark.parametrize("deadline_s", [-1.0, 0.0])
def test_a_wrong_deadline_is_rejected_by_name(deadline_s: float) -> None:
    [rejected] = answers([submit(1, deadline_s=deadline_s)], bool)
    assert isinstance(rejected, Rejected) and rejected.param == "deadline_s" and rejected.status == 400


def test_each_request_is_said_once_to_have_begun_and_when() -> None:
    start = time.perf_counter()
    received = answers([submit(1), submit(2)], lambda received: len(ends(received)) == 2)
    steps = [step for step in received if isinstance(step, StepOutputs)]
    begun = [i for step in steps for i in np.frombuffer(step.begun, "<i8").tolist()]
    times = [at_s for step in steps for at_s in np.frombuffer(step.begun_s, "<f8").tolist()]
    assert sorted(begun) == [1, 2]
    assert len(times) == 2
    assert all(start <= at_s <= time.perf_counter() for at_s in times)


def test_the_blocks_of_an_aborted_request_are_free_within_two_steps() -> None:
    engine = new_engine()
    sampling = SamplingParams(max_tokens=60)
    engine.submit(Submit(request_id=1, prompt=pack_tokens([1, 2]), sampling=sampling, stop_token_ids=(), seed=0))
    for _ in range(20):
        assert engine.step()
    assert engine.stats().num_free_blocks < 8
    engine.abort([1])
    for _ in range(2):
        engine.step()
    assert engine.stats().num_free_blocks == 8
    assert not engine.has_work
