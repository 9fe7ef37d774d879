"""Where steps run: behind one small protocol, so that the loop does not know (floor 7)."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from toka.errors import InvariantError
from toka.plan import BatchPlan, StepResult, TokenMasks
from toka.runner.model_runner import BegunStep, ModelRunner, PendingStep


class Executor(Protocol):
    """Takes plans in order and gives their results back in the same order."""

    def launch(self, plan: BatchPlan) -> None:
        """Begin this step once the steps before it are done; returns at once."""
        ...

    def deliver(self, masks: TokenMasks) -> None:
        """The masks of the oldest launched step that still waits for its own."""
        ...

    def wait(self) -> StepResult:
        """The result of the oldest step launched and not yet waited for; raises what the step raised. Its masks must be delivered."""
        ...

    @property
    def num_in_flight(self) -> int:
        """Steps launched and not yet waited for."""
        ...

    def shutdown(self) -> None:
        """Let the step that runs end; the others may be dropped."""
        ...


class StreamExecutor:
    """Runs steps on a device that works by itself (CUDA): launched from the engine's thread, one behind the other.

    A step with masked draws is launched up to them; the next one begins once its masks are delivered and it is launched whole.
    """

    def __init__(self, runner: ModelRunner):
        self._runner = runner
        self._steps: deque[PendingStep] = deque()
        self._awaiting_masks: BegunStep | None = None
        self._queued: deque[BatchPlan] = deque()

    @property
    def num_in_flight(self) -> int:
        return len(self._steps) + (self._awaiting_masks is not None) + len(self._queued)

    def launch(self, plan: BatchPlan) -> None:
        self._queued.append(plan)
        self._launch_queued()

    def deliver(self, masks: TokenMasks) -> None:
        if self._awaiting_masks is None:
            raise InvariantError("masks were delivered and no step waits for any")
        self._steps.append(self._runner.finish(self._awaiting_masks, masks))
        self._awaiting_masks = None
        self._launch_queued()

    def _launch_queued(self) -> None:
        while self._queued and self._awaiting_masks is None:
            begun = self._runner.begin(self._queued.popleft())
            if begun.plan.masked is None:
                self._steps.append(self._runner.finish(begun))
            else:
                self._awaiting_masks = begun

    def wait(self) -> StepResult:
        result = self._steps[0].result()
        self._steps.popleft()
        return result

    def shutdown(self) -> None:
        self._queued.clear()
        self._awaiting_masks = None
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
        self._masks: deque[Future[TokenMasks]] = deque()  # of the steps that wait for theirs

    @property
    def num_in_flight(self) -> int:
        return len(self._steps)

    def launch(self, plan: BatchPlan) -> None:
        masks = None
        if plan.masked is not None:
            self._masks.append(Future())
            masks = self._masks[-1].result
        self._steps.append(self._thread.submit(self._runner.run, plan, masks))

    def deliver(self, masks: TokenMasks) -> None:
        self._masks.popleft().set_result(masks)

    def wait(self) -> StepResult:
        result = self._steps[0].result()  # an interrupt or error here leaves the step in flight
        self._steps.popleft()
        return result

    def shutdown(self) -> None:
        while self._masks:
            self._masks.popleft().cancel()  # or the thread would wait for them forever
        self._thread.shutdown(cancel_futures=True)
