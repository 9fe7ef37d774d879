"""The engine's loop (floor 7).

plan N+1 ──► launch ─┐            One step is always running while the next is planned; what comes back is committed, and the
commit N ◄── wait  ◄─┘            outputs go up. Nothing else happens here.

Where grammars limit what is drawn, the masks of step N+1 follow its launch as soon as step N is committed.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from concurrent.futures import Future
from concurrent.futures import wait as wait_for

import msgspec

from toka.compile.compiled_model import CompiledModel
from toka.engine.constraints import Constraints
from toka.engine.executor import Executor
from toka.errors import RequestError
from toka.messages import EngineStats, Submit
from toka.plan import BatchPlan
from toka.scheduler.outputs import TokenOutputs
from toka.scheduler.scheduler import Scheduler
from toka.text.grammar import GrammarState

_COMPILE_POLL_S = 0.005


@dataclasses.dataclass
class _Compiling:
    """A request that waits for its grammar. aborted: those of its samples that nobody waits for any more."""

    submit: Submit
    grammar: Future[GrammarState]
    aborted: set[int] = dataclasses.field(default_factory=set)


@dataclasses.dataclass
class EngineCore:
    """A scheduler and the executor of its plans. constraints: None = no request can have a grammar."""

    scheduler: Scheduler
    executor: Executor
    compiled: CompiledModel
    constraints: Constraints | None = None

    def __post_init__(self) -> None:
        self._compiling: deque[_Compiling] = deque()
        self._committed_step = 0
        self._awaiting_masks: deque[BatchPlan] = deque()

    def submit(self, submit: Submit, *, waits: bool = False) -> None:
        """Queue a request; RequestError if it is refused. One whose grammar is still to be compiled is queued when it is, and refused by
        `submit_compiled`; waits: wait for it here."""
        structured = submit.sampling.structured
        if structured is None:
            self.scheduler.submit(submit)
        elif self.constraints is None:
            raise RequestError("This engine has no grammars.", "structured")
        else:
            entry = _Compiling(submit, self.constraints.compile(structured))
            if waits or entry.grammar.done():
                self._submit_constrained(entry, self.constraints)
            else:
                self._compiling.append(entry)

    def submit_compiled(self) -> list[tuple[Submit, RequestError]]:
        """Queue the requests whose grammars were compiled since; returns those that are refused, and why."""
        refused: list[tuple[Submit, RequestError]] = []
        ready = [entry for entry in self._compiling if entry.grammar.done()]
        for entry in ready:
            assert self.constraints is not None
            self._compiling.remove(entry)
            try:
                self._submit_constrained(entry, self.constraints)
            except RequestError as error:
                refused.append((entry.submit, error))
        return refused

    def _submit_constrained(self, entry: _Compiling, constraints: Constraints) -> None:
        grammar = entry.grammar.result()
        submit = msgspec.structs.replace(entry.submit, stop_token_ids=constraints.stop_token_ids(entry.submit))
        self.scheduler.submit(submit)
        constraints.begin(submit, grammar)
        self.abort(list(entry.aborted))

    def abort(self, request_ids: list[int]) -> None:
        for request_id in request_ids:
            self.scheduler.abort(request_id)
        if self.constraints is not None:
            self.constraints.drop(request_ids)
        for entry in self._compiling:
            first = entry.submit.request_id
            entry.aborted.update(set(request_ids).intersection(range(first, first + entry.submit.sampling.n)))

    def expire(self, now_s: float) -> TokenOutputs:
        """End the requests whose deadline passed before they could begin; now_s: time.perf_counter()."""
        outputs = self.scheduler.expire(now_s)
        if self.constraints is not None and outputs:
            self.constraints.drop(outputs.request_ids.tolist())
        return outputs

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self.executor.num_in_flight > 0 or bool(self._compiling)

    def step(self) -> TokenOutputs | None:
        """Launch what can be planned, wait for the oldest step and return its tokens; None if there was nothing to wait for."""
        while (plan := self.scheduler.next_plan()) is not None:
            self.executor.launch(plan)
            if plan.masked is not None:
                self._awaiting_masks.append(plan)
        if not self.executor.num_in_flight:
            if self._compiling:
                wait_for([self._compiling[0].grammar], _COMPILE_POLL_S)
            return None
        self._deliver_masks()
        result = self.executor.wait()
        outputs = self.scheduler.commit(result)
        self._committed_step = result.step
        if self.constraints is not None:
            outputs = self.constraints.follow(outputs, self.scheduler)
            self._deliver_masks()
        return outputs

    def _deliver_masks(self) -> None:
        """Hand on the masks of the step that runs now, if it waits for them: all that they depend on is committed."""
        if not self._awaiting_masks or self._awaiting_masks[0].step != self._committed_step + 1:
            return
        masked = self._awaiting_masks[0].masked
        assert masked is not None and self.constraints is not None
        self.executor.deliver(self.constraints.masks(masked))
        self._awaiting_masks.popleft()

    def stats(self) -> EngineStats:
        return msgspec.structs.replace(
            self.scheduler.stats(), compiles_after_ready_total=self.compiled.compiles_after_freeze
        )

    def shutdown(self) -> None:
        if self.constraints is not None:
            self.constraints.shutdown()
        self.executor.shutdown()
