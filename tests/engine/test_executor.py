from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from toka.engine.executor import LocalExecutor
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
