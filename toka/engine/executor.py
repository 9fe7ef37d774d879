"""Where steps run: behind one small protocol, so that the loop does not know (floor 7)."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from toka.plan import BatchPlan, StepResult
from toka.runner.model_runner import ModelRunner, PendingStep


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
        """Let the step that runs end; the others may be dropped."""
        ...


class StreamExecutor:
    """Runs steps on a device that works by itself (CUDA): launched from the engine's thread, one behind the other."""

    def __init__(self, runner: ModelRunner):
        self._runner = runner
        self._steps: deque[PendingStep] = deque()

    @property
    def num_in_flight(self) -> int:
        return len(self._steps)

    def launch(self, plan: BatchPlan) -> None:
        self._steps.append(self._runner.launch(plan))

    def wait(self) -> StepResult:
        result = self._steps[0].result()
        self._steps.popleft()
        return result

    def shutdown(self) -> None:
        while self._steps:
            self.wait()


class LocalExecutor:
    """Runs steps on one thread of this process, so that the next step is planned while one runs.

    thread: a pool of one worker, the one that ran the warmup: OpenMP keeps a team of threads and the kernels their working memory for
    each thread that calls them.
    """

    def __init__(self, runner: ModelRunner, thread: ThreadPoolExecutor):
        self._runner, self._thread = runner, thread
        self._steps: deque[Future[StepResult]] = deque()

    @property
    def num_in_flight(self) -> int:
        return len(self._steps)

    def launch(self, plan: BatchPlan) -> None:
        self._steps.append(self._thread.submit(self._runner.run, plan))

    def wait(self) -> StepResult:
        result = self._steps[0].result()  # an interrupt or error here leaves the step in flight
        self._steps.popleft()
        return result

    def shutdown(self) -> None:
        self._thread.shutdown(cancel_futures=True)
