"""The lifecycle of a request as types: Waiting -> Running -> Draining -> Finished, or from Draining back to Waiting
(preempted).

A transition consumes its object: using it again raises, and a transition that makes no sense has no method, so the type
checker refuses it. Take the object out of its container with the transition, or `del` its name after it, and the type
checker refuses a use after the move as well (tests/scheduler/test_typestate.py). Only `Draining.settle` gives blocks back,
and only once no step in flight touches them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from toka.errors import InvariantError
from toka.messages import FinishReason
from toka.params import SamplingParams
from toka.plan import I32
from toka.scheduler.block_pool import BlockPool
from toka.scheduler.prefix_index import KeyChain
from toka.scheduler.request_table import RequestTable
from toka.scheduler.retention import worth_of
from toka.scheduler.stop_predictor import class_of


class Rank(NamedTuple):
    """Who comes first: the lower priority number, then whoever has to begin earlier, then the earlier arrival.

    due_s: when it should have begun at the latest, on the clock of Submit.arrival_s. arrival: a number of its own.
    """

    priority: int
    due_s: float
    arrival: int


@dataclass(slots=True, eq=False)
class Request:
    """What stays with a request through all its states.

    rank: lower runs first. deadline_s: it ends if it has not begun by then, on the clock of Submit.arrival_s; infinity: never.
    comes_back: it is a turn of a conversation, so that its blocks will be wanted again.
    max_total_tokens: prompt + max_tokens. chain: keys of its full blocks.
    num_cached_tokens: prompt tokens found in the prefix cache at its first admission, -1 before.
    num_lost_tokens: tokens whose KV it gave up when it was preempted; whatever of them is not found again is recomputed.
    scores_prompt: whether the logprobs of its prompt are wanted. num_scored_tokens: places of its prompt, from the start, that plans
    made so far score; the token at place i + 1 is scored at place i.
    """

    request_id: int
    rank: Rank
    sampling: SamplingParams
    stop_token_ids: tuple[int, ...]
    seed: int
    num_prompt_tokens: int
    max_total_tokens: int
    chain: KeyChain
    deadline_s: float = math.inf
    comes_back: bool = False
    num_cached_tokens: int = -1
    num_lost_tokens: int = 0
    scores_prompt: bool = False
    num_scored_tokens: int = 0

    @property
    def num_unscored(self) -> int:
        """Places of its prompt that are to be scored and that no plan has scored yet."""
        return max(self.num_prompt_tokens - 1 - self.num_scored_tokens, 0) if self.scores_prompt else 0

    @property
    def has_begun(self) -> bool:
        """Whether it was admitted before, even if it was preempted since."""
        return self.num_cached_tokens >= 0

    @property
    def stop_class(self) -> int:
        """Its class for the prediction of output lengths."""
        return class_of(self.num_prompt_tokens, self.max_total_tokens - self.num_prompt_tokens)


class _State:
    """A state that still owns its request, until a transition takes it away."""

    __slots__ = ("_request",)

    def __init__(self, request: Request):
        self._request: Request | None = request

    @property
    def request(self) -> Request:
        if self._request is None:
            raise InvariantError(f"{type(self).__name__} was used after its transition")
        return self._request

    @property
    def is_consumed(self) -> bool:
        return self._request is None

    def _consume(self) -> Request:
        request = self.request
        self._request = None
        return request


class Waiting(_State):
    """Holds no row and no block. tokens: int32, its prompt and whatever it generated before it was preempted."""

    __slots__ = ("tokens",)

    def __init__(self, request: Request, tokens: I32):
        super().__init__(request)
        self.tokens = tokens

    def admit(self, row: int) -> Running:
        """It now owns this row and the blocks in it."""
        return Running(self._consume(), row)

    def abort(self) -> Finished:
        return Finished(self._consume().request_id, FinishReason.ABORT)

    def expire(self) -> Finished:
        """Its deadline has passed."""
        return Finished(self._consume().request_id, FinishReason.EXPIRED)


class Running(_State):
    """Owns a row and its blocks; may be in any plan."""

    __slots__ = ("row",)

    def __init__(self, request: Request, row: int):
        super().__init__(request)
        self.row = row

    def finish(self, reason: FinishReason, last_step: int) -> Draining:
        """It ends; last_step: the newest plan, the last that may touch its blocks."""
        return Draining(self._consume(), self.row, reason, last_step)

    def preempt(self, last_step: int) -> Draining:
        """It gives way and goes back to the queue once it settled."""
        return Draining(self._consume(), self.row, FinishReason.NONE, last_step)


class Draining(_State):
    """In no further plan, but steps up to last_step may still write to its blocks. reason NONE: it was preempted."""

    __slots__ = ("last_step", "reason", "row")

    def __init__(self, request: Request, row: int, reason: FinishReason, last_step: int):
        super().__init__(request)
        self.row, self.reason, self.last_step = row, reason, last_step

    def finish(self, reason: FinishReason) -> Draining:
        """It ends for this reason, whatever it drained for: a result under way brought a stop token, or it was aborted."""
        return Draining(self._consume(), self.row, reason, self.last_step)

    def settle(self, settled_step: int, table: RequestTable, pool: BlockPool) -> Finished | Waiting:
        """Give row and blocks back; settled_step: the newest step of which the result is in."""
        if settled_step < self.last_step:
            raise InvariantError(
                f"row {self.row} settles at step {settled_step} while step {self.last_step} is in flight"
            )
        request, preempted = self._consume(), self.reason is FinishReason.NONE
        tokens = table.tokens_of(self.row).copy() if preempted else None
        request.num_lost_tokens = int(table.num_computed_tokens[self.row])
        worth = worth_of(comes_back=request.comes_back or preempted, num_tokens=request.num_lost_tokens)
        pool.release(table.blocks_of(self.row)[::-1], worth)
        table.give_up_row(self.row)
        if tokens is None:
            return Finished(request.request_id, self.reason)
        return Waiting(request, tokens)


@dataclass(frozen=True, slots=True)
class Finished:
    """Over: nothing left to give back."""

    request_id: int
    reason: FinishReason


Live: TypeAlias = Waiting | Running | Draining
