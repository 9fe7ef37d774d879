"""The engine's loop (floor 7).

plan N+1 ──► launch ─┐            One step is always running while the next is planned; what comes back is committed, and the
commit N ◄── wait  ◄─┘            outputs go up. Nothing else happens here.
"""

from __future__ import annotations

import dataclasses
import time

import msgspec

from toka.compile.compiled_model import CompiledModel
from toka.engine.executor import Executor
from toka.messages import EngineStats, Submit
from toka.scheduler.outputs import TokenOutputs
from toka.scheduler.scheduler import Scheduler


@dataclasses.dataclass
class EngineCore:
    """A scheduler and the executor of its plans."""

    scheduler: Scheduler
    executor: Executor
    compiled: CompiledModel

    def submit(self, submit: Submit) -> None:
        """Queue a request; RequestError if it is refused."""
        self.scheduler.submit(submit)

    def abort(self, request_ids: list[int]) -> None:
        for request_id in request_ids:
            self.scheduler.abort(request_id)

    def expire(self, now_s: float) -> TokenOutputs:
        """End the requests whose deadline passed before they could begin; now_s: time.perf_counter()."""
        return self.scheduler.expire(now_s)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self.executor.num_in_flight > 0

    def step(self) -> TokenOutputs | None:
        """Launch what can be planned, wait for the oldest step and return its tokens; None if there was nothing to wait for."""
        begun: list[tuple[int, float]] = []
        while (plan := self.scheduler.next_plan()) is not None:
            if self.scheduler.begun:
                now = time.perf_counter()
                begun += [(request_id, now) for request_id in self.scheduler.begun]
            self.executor.launch(plan)
        if not self.executor.num_in_flight:
            return None
        outputs = self.scheduler.commit(self.executor.wait())
        return dataclasses.replace(outputs, begun=tuple(begun)) if begun else outputs

    def stats(self) -> EngineStats:
        return msgspec.structs.replace(
            self.scheduler.stats(), compiles_after_ready_total=self.compiled.compiles_after_freeze
        )

    def shutdown(self) -> None:
        self.executor.shutdown()
