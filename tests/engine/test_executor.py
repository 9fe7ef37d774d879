from __future__ import annotations

import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from toka.engine.executor import LocalExecutor, StreamExecutor
from toka.errors import InvariantError
from toka.plan import StepResult


class FakeRunner:
    """Answers each plan with its step number once `go` is set."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def run(self, plan, masks) -> StepResult:
        self.go.wait(10)
        if masks is not None:
            return StepResult(plan.step, masks()[0])
        if plan.step < 0:
            raise RuntimeError("the device is on fire")
        return StepResult(plan.step, np.array([plan.step], dtype=np.int32))


def plan(step: int, masked: bool = False):
    return SimpleNamespace(step=step, masked=True if masked else None)


def masks_of(step: int) -> np.ndarray:
    return np.array([[10 * step]], dtype=np.int32)


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


def test_masks_reach_the_steps_that_wait_for_them_in_order() -> None:
    runner = FakeRunner()
    runner.go.set()
    executor = LocalExecutor(runner, ThreadPoolExecutor(1))  # type: ignore[arg-type]
    for step in range(4):
        executor.launch(plan(step, masked=step in (1, 2)))
    executor.deliver(masks_of(1))
    executor.deliver(masks_of(2))
    assert [executor.wait().sampled.tolist() for _ in range(4)] == [[0], [10], [20], [3]]
    executor.shutdown()


def test_a_step_that_waits_for_masks_does_not_keep_the_thread_from_ending() -> None:
    runner = FakeRunner()
    runner.go.set()
    thread = ThreadPoolExecutor(1)
    executor = LocalExecutor(runner, thread)  # type: ignore[arg-type]
    executor.launch(plan(0, masked=True))
    executor.launch(plan(1, masked=True))
    executor.shutdown()  # waits for the step that runs
    with pytest.raises(CancelledError):
        executor.wait()


class FakeStep:
    """A step on a device that says when its result was asked for."""

    def __init__(self, step: int, asked: list[int]) -> None:
        self._step, self._asked = step, asked

    def result(self) -> StepResult:
        self._asked.append(self._step)
        if self._step < 0:
            raise RuntimeError("the device is on fire")
        return StepResult(self._step, np.array([self._step], dtype=np.int32))


class FakeDeviceRunner:
    """Notes the order in which steps are begun and finished."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.order: list[str] = []

    def begin(self, plan):
        self.order.append(f"begin {plan.step}")
        return SimpleNamespace(plan=plan)

    def finish(self, begun, masks=None) -> FakeStep:
        assert (masks is None) == (begun.plan.masked is None)
        self.order.append(f"finish {begun.plan.step}" + ("" if masks is None else f" under {masks.item()}"))
        return FakeStep(begun.plan.step, self.asked)


def test_a_device_gets_steps_before_earlier_ones_are_read() -> None:
    runner = FakeDeviceRunner()
    executor = StreamExecutor(runner)  # type: ignore[arg-type]
    for step in (0, 1, 2):
        executor.launch(plan(step))
    assert (executor.num_in_flight, runner.asked) == (3, [])
    assert executor.wait().step == 0 and runner.asked == [0]
    executor.shutdown()
    assert (executor.num_in_flight, runner.asked) == (0, [0, 1, 2])


def test_a_device_gets_no_step_before_the_masks_of_the_one_before_it() -> None:
    """But all of the masked step that needs none; a step would otherwise begin before its tokens are drawn."""
    runner = FakeDeviceRunner()
    executor = StreamExecutor(runner)  # type: ignore[arg-type]
    for step in range(4):
        executor.launch(plan(step, masked=step in (1, 2)))
    assert runner.order == ["begin 0", "finish 0", "begin 1"] and executor.num_in_flight == 4
    executor.deliver(masks_of(1))
    assert runner.order[3:] == ["finish 1 under 10", "begin 2"]
    executor.deliver(masks_of(2))
    assert runner.order[5:] == ["finish 2 under 20", "begin 3", "finish 3"]
    assert [executor.wait().step for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(InvariantError, match="no step waits"):
        executor.deliver(masks_of(4))


def test_steps_that_wait_for_masks_are_dropped_at_the_end() -> None:
    runner = FakeDeviceRunner()
    executor = StreamExecutor(runner)  # type: ignore[arg-type]
    for step in range(3):
        executor.launch(plan(step, masked=step > 0))
    executor.shutdown()
    assert executor.num_in_flight == 0 and runner.asked == [0]


def test_a_step_that_failed_on_the_device_stays_in_flight() -> None:
    executor = StreamExecutor(FakeDeviceRunner())  # type: ignore[arg-type]
    executor.launch(plan(-1))
    with pytest.raises(RuntimeError, match="on fire"):
        executor.wait()
    assert executor.num_in_flight == 1
