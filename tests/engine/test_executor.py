from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from toka.engine.executor import LocalExecutor, StreamExecutor
from toka.plan import StepResult


class FakeRunner:
    """Answers each plan with its step number once `go` is set."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def run(self, plan) -> StepResult:
        self.go.wait(10)
        if plan.step < 0:
            raise RuntimeError("the device is on fire")
        return StepResult(plan.step, np.array([plan.step], dtype=np.int32))


def plan(step: int):
    return SimpleNamespace(step=step)


def test_results_come_in_order_and_launch_never_waits() -> None:
    runner = FakeRunner()
    executor = LocalExecutor(runner, ThreadPoolExecutor(1))  # type: ignore[arg-type]
    for step in range(3):
        executor.launch(plan(step))
    assert executor.num_in_flight == 3
    runner.go.set()
    assert [executor.wait().step for _ in range(3)] == [0, 1, 2]
    assert executor.num_in_flight == 0
    executor.shutdown()


def test_a_failing_step_raises_where_it_is_waited_for() -> None:
    runner = FakeRunner()
    runner.go.set()
    executor = LocalExecutor(runner, ThreadPoolExecutor(1))  # type: ignore[arg-type]
    executor.launch(plan(-1))
    with pytest.raises(RuntimeError, match="on fire"):
        executor.wait()
    assert executor.num_in_flight == 1  # nothing is lost: whoever catches it can still see what was under way
    executor.shutdown()


class FakeStep:
    """A step on a device that says when its result was asked for."""

    def __init__(self, step: int, asked: list[int]) -> None:
        self._step, self._asked = step, asked

    def result(self) -> StepResult:
        self._asked.append(self._step)
        if self._step < 0:
            raise RuntimeError("the device is on fire")
        return StepResult(self._step, np.array([self._step], dtype=np.int32))


def test_a_device_gets_steps_before_earlier_ones_are_read() -> None:
    asked: list[int] = []
    runner = SimpleNamespace(launch=lambda plan: FakeStep(plan.step, asked))
    executor = StreamExecutor(runner)  # type: ignore[arg-type]
    for step in (0, 1, 2):
        executor.launch(plan(step))
    assert (executor.num_in_flight, asked) == (3, [])
    assert executor.wait().step == 0 and asked == [0]
    executor.shutdown()
    assert (executor.num_in_flight, asked) == (0, [0, 1, 2])


def test_a_step_that_failed_on_the_device_stays_in_flight() -> None:
    executor = StreamExecutor(SimpleNamespace(launch=lambda plan: FakeStep(plan.step, [])))  # type: ignore[arg-type]
    executor.launch(plan(-1))
    with pytest.raises(RuntimeError, match="on fire"):
        executor.wait()
    assert executor.num_in_flight == 1
