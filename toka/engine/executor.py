"""Where steps run: behind one small protocol, so that the loop does not know (floor 7)."""

from __future__ import annotations

import queue
import threading
from typing import Protocol

from toka.plan import BatchPlan, StepResult
from toka.runner.model_runner import ModelRunner


class Executor(Protocol):
    """Takes plans in order and gives their results back in the same order."""

    def launch(self, plan: BatchPlan) -> None:
        """Begin this step once the steps before it are done; returns at once."""
        ...

    def wait(self) -> StepResult:
        """The result of the oldest step launched and not yet waited for; raises what the step raised."""
        ...

    @property
    def num_in_flight(self) -> int:
        """Steps launched and not yet waited for."""
        ...

    def shutdown(self) -> None:
        """Let the step that runs end, drop the others, give the thread back."""
        ...


class LocalExecutor:
    """Runs steps on a thread of this process, so that the next step is planned while one runs."""

    def __init__(self, runner: ModelRunner):
        self._runner = runner
        self._plans: queue.SimpleQueue[BatchPlan | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[StepResult | BaseException] = queue.SimpleQueue()
        self._num_in_flight = 0
        self._thread = threading.Thread(target=self._work, name="step", daemon=True)
        self._thread.start()

    @property
    def num_in_flight(self) -> int:
        return self._num_in_flight

    def launch(self, plan: BatchPlan) -> None:
        self._num_in_flight += 1
        self._plans.put(plan)

    def wait(self) -> StepResult:
        result = self._results.get()
        self._num_in_flight -= 1
        if isinstance(result, BaseException):
            raise result
        return result

    def shutdown(self) -> None:
        self._plans.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (plan := self._plans.get()) is not None:
            try:
                self._results.put(self._runner.run(plan))
            except BaseException as error:  # goes to the loop, which ends the engine
                self._results.put(error)
                return
