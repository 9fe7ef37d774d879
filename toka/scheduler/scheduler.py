"""The scheduler: which tokens of which requests the next step computes. Submit, abort, plan, commit, extend; nothing else
is public.

    submit ─► WaitingQueue ─admit─► RequestTable row ─┬─► next_plan: decode rows, then prompt chunks ─► BatchPlan
                                                      └◄─ commit: append tokens, stop, settle ◄─ StepResult

Plans run ahead: next_plan may be called steps_in_flight times before the first commit. What a plan needs is known by
then except the ids of the newest tokens, which stay on the device. A request that ends by its token limit leaves when
its last step is planned; one that ends by a stop token is known only at commit, and what later steps drew for it is
dropped. Either way its row and blocks are given back only once no step in flight touches them (request.py).

Every decision depends on the calls made so far and nothing else: no clock, no hash order, no randomness.
"""

from __future__ import annotations

import os
from bisect import insort
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from toka.errors import InvariantError, RequestError
from toka.messages import EngineStats, FinishReason, Submit
from toka.plan import I32, I64, BatchPlan, BlockTableChanges, StepResult
from toka.scheduler.admission import AdmissionPolicy, Load, fewest_to_preempt, policy_of
from toka.scheduler.batching import NONE_FILLED, Chunk, DecodeSet, EndsWithoutToken, Filled, StepInFlight
from toka.scheduler.block_pool import BlockPool
from toka.scheduler.config import SchedulerConfig
from toka.scheduler.hydragen import GroupFinder
from toka.scheduler.outlook import Forecaster, HeadProspect, Newcomer, Outlook, RunningRows
from toka.scheduler.outputs import NOBODY_ENDS, ScoredTokens, TokenOutputs, ends_without_token
from toka.scheduler.plan_builder import (
    build_decode_plan,
    build_mixed_plan,
    build_pooling_plan,
    merge_table_changes,
)
from toka.scheduler.prefix_index import PrefixIndex
from toka.scheduler.prefix_registrar import PrefixRegistrar
from toka.scheduler.request import Draining, Finished, Live, Rank, Request, Running, Waiting
from toka.scheduler.request_table import RequestTable, Rows
from toka.scheduler.shared_prefix import SharedPrefixes
from toka.scheduler.stop_predictor import StopPredictor
from toka.scheduler.submission import samples_of
from toka.scheduler.waiting_queue import WaitingQueue


@dataclass(frozen=True, slots=True)
class _Blocked:
    """Why the head of the queue could not begin: it needed num_fresh blocks at least, and still does until the index knows
    missing_key, the first of its blocks that was not shared (None: all that may be shared were). The policy is not asked
    again before step retry_at."""

    head: Waiting
    num_fresh: int
    missing_key: bytes | None
    retry_at: int


class _DecodeStep(NamedTuple):
    """The decode rows of the step being planned, their seq_lens int32 [R], and the blocks that they fill."""

    decodes: DecodeSet
    seq_lens: I32
    filled: Filled


class Scheduler:
    """Continuous batching with chunked prefill over paged KV blocks; see the module's docstring.

    secret: keys the hashes of the prefix cache, 16..64 bytes; drawn at random if None. It influences no decision.
    admission: the policy that lets requests begin; by default the one that the configuration names.
    """

    def __init__(
        self, config: SchedulerConfig, *, secret: bytes | None = None, admission: AdmissionPolicy | None = None
    ):
        self.config = config
        self._secret = os.urandom(32) if secret is None else secret
        self._admission = admission or policy_of(config)
        self._table = RequestTable(config)
        self._index = PrefixIndex(config.num_blocks)
        self._registrar = PrefixRegistrar(self._table, self._index, enabled=config.prefix_cache)
        self._pool = BlockPool(config.num_blocks, self._index, by_worth=config.retention == "worth")
        self._shared = SharedPrefixes(config.num_blocks, config.max_rows)
        self._groups = GroupFinder(config, self._shared) if config.use_hydragen else None
        tracks = config.admission == "forecast" and config.track_early_stopping
        self._predictor = StopPredictor(config.early_stopping_margin) if tracks else None
        self._foresees_all = config.admission == "forecast" and not config.track_early_stopping
        self._forecaster = Forecaster(config, self._table, self._shared, self._predictor)
        self._outlook: Outlook | None = None  # of the step being planned, made when first asked for
        self._states: dict[int, Live] = {}  # by request id; what is over is not in it
        self._waiting = WaitingQueue()
        self._prefilling: list[tuple[Rank, int]] = []  # (rank, row), in rank order
        self._decodes = DecodeSet(np.empty(0, dtype=np.intp), self._table)
        self._draining: deque[int] = deque()  # rows in the order of the last steps that touch them
        self._owners: list[Running | Draining | None] = [None] * config.max_rows
        self._in_flight: deque[StepInFlight] = deque()
        self._new_blocks: list[BlockTableChanges] = []  # that extended rows took, for the next plan; one entry a row
        self._blocked: _Blocked | None = None
        self._way_made: tuple[Waiting, int] | None = None  # for whom, and before which step not again
        self._planned_step = 0  # the newest plan
        self._settled_step = 0  # the newest plan of which the result is in
        self._num_arrivals = 0
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0
        self._num_generated_tokens = 0
        self._num_preemptions = 0
        self._num_preemptions_by_priority = 0
        self._num_recomputed_tokens = 0
        self._begun: list[int] = []

    # ---------------------------------------------------------------------------------------------------- submit, abort

    def submit(self, submit: Submit) -> None:
        """Queue the samples of one prompt. Raises RequestError if it is malformed or could never fit; then none is queued."""
        num_samples = submit.sampling.check().n
        for request_id in range(submit.request_id, submit.request_id + num_samples):
            if request_id in self._states:
                raise RequestError(f"The request id {request_id} is in use.", "request_id")
        for waiting in samples_of(submit, self.config, self._secret, self._num_arrivals):
            self._states[waiting.request.request_id] = waiting
            self._waiting.push(waiting)
            self._num_arrivals += 1

    def abort(self, request_id: int) -> None:
        """End this request now, without further output; an id that is unknown or over is ignored."""
        state = self._states.pop(request_id, None)
        if isinstance(state, Waiting):
            state.abort()
        elif isinstance(state, Running):
            self._table.drop_late_results(state.row)
            self._leave([state.row])
            self._drain(state.finish(FinishReason.ABORT, self._planned_step))
            self._settle()
        elif isinstance(state, Draining):
            self._table.drop_late_results(state.row)
            self._owners[state.row] = state.finish(FinishReason.ABORT)

    def expire(self, now_s: float) -> TokenOutputs:
        """End those that should have begun before now_s, on the clock of Submit.arrival_s; one entry each, without a token."""
        late = self._waiting.take_expired(now_s)
        if not late:
            return NOBODY_ENDS
        expired = [waiting.expire().request_id for waiting in late]
        for request_id in expired:
            del self._states[request_id]
        return ends_without_token(expired, FinishReason.EXPIRED)

    # ------------------------------------------------------------------------------------------------------------- plan

    def next_plan(self) -> BatchPlan | None:
        """The next step, or None: steps_in_flight plans wait for their results, or there is nothing to compute before the next
        commit or submit."""
        if len(self._in_flight) >= self.config.steps_in_flight:
            return None
        self._begun = []
        self._make_way()
        changes: list[BlockTableChanges] = []
        decodes, seq_lens, filled = self._plan_decodes(changes)
        chunks, admitted = self._plan_chunks(len(decodes), changes)
        if not len(decodes) and not chunks:
            return None
        self._planned_step += 1
        step, merged, table = self._planned_step, merge_table_changes([*self._new_blocks, *changes]), self._table
        self._new_blocks = []
        shared = None if self._groups is None else self._groups.groups(decodes)
        if self.config.pools:
            plan, in_flight = build_pooling_plan(step, chunks, merged, table)
        elif chunks:
            plan, in_flight = build_mixed_plan(step, decodes, seq_lens, chunks, merged, admitted, filled, shared, table)
        else:
            plan, in_flight = build_decode_plan(step, decodes, seq_lens, merged, filled, shared, table.epoch)
        self._in_flight.append(in_flight)
        self._end_or_decode(decodes, seq_lens, chunks)
        return plan

    @property
    def begun(self) -> list[int]:
        """Ids of the requests whose first step is the newest plan."""
        return self._begun

    def _plan_decodes(self, changes: list[BlockTableChanges]) -> _DecodeStep:
        """One token for every row that decodes, each with a block to go to; where blocks run out, preempt."""
        decodes = self._decodes
        seq_lens, needy = self._next_seq_lens(decodes)
        num_needy = int(np.count_nonzero(needy))
        self._pool.keep_blank(len(decodes), 1 + len(decodes) // self.config.block_size)
        if num_needy > self._pool.num_free:
            self._preempt_for(decodes.rows[needy])
            decodes = self._decodes_with_blocks()
            seq_lens, needy = self._next_seq_lens(decodes)
            num_needy = int(np.count_nonzero(needy))
        filled = NONE_FILLED
        if num_needy:
            rows, blocks = decodes.rows[needy], self._pool.take(num_needy)
            columns = self._table.append_blocks(rows, blocks)
            self._shared.take(rows, blocks)
            filled = Filled(rows, columns - np.int32(1), decodes.generations[needy])
            changes.append(BlockTableChanges(rows=decodes.rows_i32[needy], columns=columns, blocks=blocks))
        self._table.num_computed_tokens[decodes.rows] = seq_lens
        return _DecodeStep(decodes, seq_lens, filled)

    def _next_seq_lens(self, decodes: DecodeSet) -> tuple[I32, npt.NDArray[np.bool_]]:
        """The rows' seq_lens after one more token, int32 [R], and whether that token needs a new block, bool [R]."""
        seq_lens: I32 = self._table.num_computed_tokens.take(decodes.rows)
        seq_lens += np.int32(1)
        return seq_lens, seq_lens > self._table.token_room.take(decodes.rows)

    def _decodes_with_blocks(self) -> DecodeSet:
        """The decode rows without the last in rank order for which no block is free yet; these sit the step out."""
        decodes = self._decodes
        places = np.flatnonzero(self._next_seq_lens(decodes)[1])
        short = places[self._table.by_rank(decodes.rows[places])][self._pool.num_free :]
        runs = np.ones(len(decodes), dtype=np.bool_)
        runs[short] = False
        return decodes.keep(runs, self._table)

    def _preempt_for(self, needy: Rows) -> None:
        """Preempt from the end of the rank order until every needy row that still runs has a block free or soon to be free."""
        running = self._running_rows()
        waiting_for_block = dict.fromkeys(needy.tolist())
        for row in running[self._table.by_rank(running)][::-1].tolist():
            if len(waiting_for_block) <= self._pool.num_free + self._num_blocks_to_come():
                return
            waiting_for_block.pop(row, None)
            if self._predictor is not None:
                self._predictor.widen()
            self._preempt(row)

    def _preempt(self, row: int) -> None:
        self._num_preemptions += 1
        self._leave([row])
        self._drain(self._running(row).preempt(self._planned_step))
        self._settle()

    def _running_rows(self) -> Rows:
        return np.concatenate((self._decodes.rows, np.array([row for _, row in self._prefilling], dtype=np.intp)))

    def _num_blocks_to_come(self) -> int:
        """Blocks that will be free once all draining rows have settled."""
        return len(self._blocks_held_only_by(list(self._draining)))

    def _blocks_held_only_by(self, rows: list[int]) -> I32:
        if not rows:
            return np.empty(0, dtype=np.int32)
        blocks, counts = np.unique(np.concatenate([self._table.blocks_of(row) for row in rows]), return_counts=True)
        only: I32 = blocks[self._pool.ref_counts(blocks) == counts]
        return only

    def _make_way(self) -> None:
        """If the head of the queue cannot begin, preempt the fewest rows of a worse priority, from the end of the rank order, that
        let it begin once they have settled; nobody if not even all of them would."""
        head = self._waiting.head()
        is_full = len(self._decodes) + len(self._prefilling) >= self.config.max_running
        if head is None or not (is_full or (self._blocked is not None and self._blocked.head is head)):
            return
        if self._way_made is not None and self._way_made[0] is head and self._planned_step < self._way_made[1]:
            return
        self._way_made = head, self._planned_step + max(self._admission.retry_steps, self.config.steps_in_flight)
        running = self._running_rows()
        worse = running[self._table.priority[running] > head.request.rank.priority]
        if not len(worse):
            return
        worse = worse[self._table.by_rank(worse)][::-1]
        newcomer, _ = self._newcomer(head)
        num_preempted = fewest_to_preempt(
            len(worse), lambda count: self._could_begin_without(worse[:count], running, newcomer)
        )
        for row in worse[:num_preempted].tolist() if num_preempted else ():
            self._num_preemptions_by_priority += 1
            self._preempt(row)

    def _could_begin_without(self, preempted: Rows, running: Rows, newcomer: Newcomer) -> bool:
        """Whether this newcomer could begin if these rows and those that drain had settled."""
        gone = np.concatenate((np.array(self._draining, dtype=np.intp), preempted))
        freed = self._blocks_held_only_by(gone.tolist())
        num_needed = newcomer.num_needed + int(np.count_nonzero(np.isin(newcomer.held, freed)))
        load = Load(len(running) - len(preempted), self._pool.num_free + len(freed))
        if load.num_running >= self.config.max_running or num_needed > load.num_free_blocks:
            return False
        prefilling = [row for _, row in self._prefilling]
        rest = RunningRows(
            decodes=self._decodes.rows[~np.isin(self._decodes.rows, preempted)],
            prefilling=np.array(prefilling, dtype=np.intp)[~np.isin(prefilling, preempted)],
            draining=gone,
            drained_since=np.zeros(len(gone), dtype=np.int64),
            num_free_blocks=self._pool.num_free,
        )
        look = self._forecaster.look
        prospect = HeadProspect(lambda: look(rest, prefill_first=newcomer, settled=True), newcomer)
        return self._admission.admits(num_needed, load, prospect)

    def _plan_chunks(
        self, num_decodes: int, changes: list[BlockTableChanges]
    ) -> tuple[list[Chunk], list[tuple[int, Request]]]:
        """Fill the step's tokens after the decode rows with prompt chunks: by priority, running requests before new ones.

        budget: tokens that the step can still compute; room: of how many it can still compute logits. Only prompts that are scored can use
        it up, since no more rows run than it holds.
        """
        budget, room = self.config.max_tokens_per_forward - num_decodes, self.config.max_running - num_decodes
        chunks: list[Chunk] = []
        admitted: list[tuple[int, Request]] = []
        running = deque(self._prefilling)
        may_admit = True
        self._outlook = None
        while budget > 0 and room > 0:
            head = self._waiting.head() if may_admit else None
            if head is not None and self.config.whole_prompts and head.request.num_prompt_tokens > budget:
                break
            if running and (head is None or running[0][0].priority <= head.request.rank.priority):
                row = running.popleft()[1]
            elif head is not None:
                request = head.request
                admission = self._admit(head)
                if admission is None:
                    may_admit = False
                    continue
                row, change = admission
                admitted.append((row, request))
                changes.append(change)
            else:
                break
            chunk = self._next_chunk(row, budget, room)
            budget -= chunk.stop - chunk.start
            room -= chunk.num_samples
            chunks.append(chunk)
        return chunks, admitted

    def _next_chunk(self, row: int, budget: int, room: int) -> Chunk:
        """As many of the row's tokens as there are, within budget and room (at least 1 each)."""
        table, request = self._table, self._running(row).request
        start, num_tokens = int(table.num_computed_tokens[row]), int(table.num_tokens[row])
        stop = min(num_tokens, start + budget)
        score_start = score_stop = request.num_scored_tokens
        if request.num_unscored:
            # From score_start on, which is not before start, the logits of every token are wanted.
            stop = min(stop, score_start + room)
            score_stop = max(min(stop, request.num_prompt_tokens - 1), score_start)
            request.num_scored_tokens = score_stop
            table.num_unscored[row] = request.num_unscored
        table.num_computed_tokens[row] = stop
        self._registrar.offer(row)
        last = stop == num_tokens
        draws = last and num_tokens < int(table.max_total_tokens[row])
        return Chunk(row, start, stop, last, draws, score_start, score_stop)

    def _admit(self, head: Waiting) -> tuple[int, BlockTableChanges] | None:
        """Give the head of the queue a row and the blocks for all its tokens so far; None if it has to wait."""
        table, pool = self._table, self._pool
        load = Load(len(self._decodes) + len(self._prefilling), pool.num_free)
        if load.num_running >= self.config.max_running or not table.num_free_rows or self._is_still_blocked(head, load):
            return None
        request, tokens = head.request, head.tokens
        newcomer, shared = self._newcomer(head)
        num_blocks = -(-len(tokens) // self.config.block_size)
        num_fresh = num_blocks - len(shared)
        prospect = HeadProspect(lambda: self._look(request, newcomer), newcomer)
        if newcomer.num_needed > load.num_free_blocks or not self._admission.admits(
            newcomer.num_needed, load, prospect
        ):
            missing = request.chain.keys_of(len(shared), self._max_shared(request, len(tokens)))[:1]
            retry_at = self._planned_step + self._admission.retry_steps
            self._blocked = _Blocked(head, num_fresh, missing[0] if missing else None, retry_at)
            return None
        held = pool.ref_counts(shared) > 0
        pool.share(shared)
        fresh = pool.take(num_fresh)
        blocks = np.concatenate((shared, fresh))
        row = table.take_row()
        self._fill_row(row, request, tokens, blocks, num_shared=len(shared))
        self._shared.join(row, shared, held)
        self._shared.take(row, fresh)
        if self._outlook is not None:
            self._outlook.add(newcomer, row)
        owner = self._waiting.pop().admit(row)
        self._owners[row] = owner
        self._states[request.request_id] = owner
        insort(self._prefilling, (request.rank, row))
        columns = np.arange(num_blocks, dtype=np.int32)
        return row, BlockTableChanges(np.full(num_blocks, row, dtype=np.int32), columns, blocks)

    def _newcomer(self, head: Waiting) -> tuple[Newcomer, I32]:
        """What the head of the queue would begin with, and the cached blocks of its prefix, int32."""
        request, tokens, block_size = head.request, head.tokens, self.config.block_size
        if self.config.prefix_cache:
            request.chain.extend(tokens, len(tokens) // block_size)
        shared = self._index.longest_prefix(request.chain, self._max_shared(request, len(tokens)))
        held = shared[self._pool.ref_counts(shared) > 0]
        newcomer = Newcomer(
            num_tokens=len(tokens),
            num_cached=len(shared) * block_size,
            num_needed=-(-len(tokens) // block_size) - len(held),
            held=held,
            stop_class=request.stop_class,
            arrival=request.rank.arrival,
            num_prompt_tokens=request.num_prompt_tokens,
            max_total_tokens=request.max_total_tokens,
            num_unscored=request.num_unscored,
        )
        return newcomer, shared

    def _max_shared(self, request: Request, num_tokens: int) -> int:
        """Blocks that a request of so many tokens may share: at least one token is left to compute, and what is to be scored."""
        num_shared = num_tokens - 1
        if request.num_unscored:
            num_shared = min(num_shared, request.num_scored_tokens)
        return num_shared // self.config.block_size

    def _look(self, request: Request, newcomer: Newcomer) -> Outlook:
        """The outlook that this request meets in the step being planned."""
        prefilling = self._prefilling
        overtakes = bool(prefilling) and request.rank.priority < prefilling[-1][0].priority
        if self._outlook is not None and not overtakes:
            return self._outlook
        draining = np.array(self._draining, dtype=np.intp)
        last_steps = [
            owner.last_step for owner in map(self._owners.__getitem__, self._draining) if isinstance(owner, Draining)
        ]
        running = RunningRows(
            decodes=self._decodes.rows,
            prefilling=np.array([row for _, row in prefilling], dtype=np.intp),
            draining=draining,
            drained_since=self._planned_step + 1 - np.array(last_steps, dtype=np.int64),
            num_free_blocks=self._pool.num_free,
        )
        if overtakes:  # it delays rows that prefill, which an outlook for everybody cannot know
            self._outlook = None
            return self._forecaster.look(running, prefill_first=newcomer)
        self._outlook = self._forecaster.look(running)
        return self._outlook

    def _is_still_blocked(self, head: Waiting, load: Load) -> bool:
        """Whether the head that could not begin last time cannot now either, seen without walking its whole prefix again."""
        blocked = self._blocked
        if blocked is None or blocked.head is not head:
            return False
        if blocked.missing_key is not None and blocked.missing_key in self._index:
            return False
        return blocked.num_fresh > load.num_free_blocks or (
            load.num_running > 0 and self._planned_step < blocked.retry_at
        )

    def _fill_row(self, row: int, request: Request, tokens: I32, blocks: I32, num_shared: int) -> None:
        table, num_computed = self._table, num_shared * self.config.block_size
        if not request.has_begun:
            self._begun.append(request.request_id)
            request.comes_back |= self._index.hold_output(blocks[:num_shared])
            request.num_cached_tokens = num_computed
            self._num_prompt_tokens += request.num_prompt_tokens
            self._num_cached_tokens += num_computed
        self._num_recomputed_tokens += max(request.num_lost_tokens - num_computed, 0)
        table.num_prompt_tokens[row] = request.num_prompt_tokens
        table.stop_class[row] = request.stop_class
        table.request_id[row] = request.request_id
        table.priority[row], table.due_s[row], table.arrival[row] = request.rank
        table.num_cached_tokens[row] = request.num_cached_tokens
        table.num_logprobs[row] = _or_none(request.sampling.logprobs)
        table.num_prompt_logprobs[row] = _or_none(request.sampling.prompt_logprobs)
        table.num_unscored[row] = request.num_unscored
        table.has_grammar[row] = request.sampling.structured is not None
        table.is_adjusted[row] = request.sampling.adjusts_logits
        table.max_total_tokens[row] = request.max_total_tokens
        table.num_tokens[row] = len(tokens)
        table.num_computed_tokens[row] = num_computed
        table.token_room[row] = len(blocks) * self.config.block_size
        table.tokens[row, : len(tokens)] = tokens
        table.blocks[row, : len(blocks)] = blocks
        table.set_stop_ids(row, request.stop_token_ids)
        self._registrar.take_row(row, request.chain, num_shared)
        if self._predictor is not None:
            table.predicted_tokens[row] = self._predictor.predict_one(
                request.stop_class,
                request.rank.arrival,
                len(tokens) - request.num_prompt_tokens,
                request.max_total_tokens - request.num_prompt_tokens,
            )

    def _end_or_decode(self, decodes: DecodeSet, seq_lens: I32, chunks: list[Chunk]) -> None:
        """After a plan is made: rows that draw their last token in it drain (or that draw none), rows whose prompt ends in it decode from
        now on."""
        table = self._table
        final = seq_lens == decodes.final_seq_lens
        ending: list[int] = decodes.rows[final].tolist() if np.count_nonzero(final) else []
        begun = {chunk.row: None for chunk in chunks if chunk.last}
        if begun:
            self._prefilling = [entry for entry in self._prefilling if entry[1] not in begun]
            self._decodes = self._decodes.plus(list(begun), table)
            ending += [row for row in begun if table.num_tokens[row] + 1 >= table.max_total_tokens[row]]
        if ending:
            self._decodes = self._decodes.without(ending, table)
        for row in ending:
            self._drain(self._running(row).finish(FinishReason.LENGTH, self._planned_step))

    # ----------------------------------------------------------------------------------------------------------- commit

    def commit(self, result: StepResult) -> TokenOutputs:
        """Take in what the oldest step in flight drew; returns its tokens of requests that are still wanted."""
        if not self._in_flight or self._in_flight[0].step != result.step:
            raise InvariantError(f"the result of step {result.step} is not that of the oldest step in flight")
        step = self._in_flight.popleft()
        if len(result.sampled) != step.num_rows:
            raise InvariantError(f"step {step.step} has {step.num_rows} rows, its result {len(result.sampled)}")
        table = self._table
        rows, request_ids, cached = step.rows, step.request_ids, step.num_cached_tokens
        sampled = result.sampled if step.drawn is None else result.sampled[step.drawn]
        wanted = None
        if step.epoch != table.epoch:
            wanted = table.generation.take(rows) == step.generations
            wanted = None if wanted.all() else wanted
        scores, prompt_scores = self._scores_of(step, result, sampled, wanted)
        if wanted is not None:
            rows, request_ids, cached, sampled = rows[wanted], request_ids[wanted], cached[wanted], sampled[wanted]
        num_tokens = table.append_tokens(rows, sampled)
        self._settled_step = step.step
        self._num_steps += 1
        self._num_generated_tokens += len(rows)
        ends = num_tokens == table.max_total_tokens.take(rows)
        stops = table.is_stop(rows, sampled)
        finish = ends.view(np.uint8) * np.uint8(FinishReason.LENGTH)
        if np.count_nonzero(stops):
            finish[stops] = FinishReason.STOP
            self._stop(rows[stops].tolist())
        vectors = None
        if step.ends is not None:
            kept = table.generation.take(step.ends.rows) == step.ends.generations
            vectors = None if result.vectors is None else result.vectors[kept]
            request_ids, sampled, finish, cached = _with_ends(step.ends, kept, request_ids, sampled, finish, cached)
        self._registrar.offer_filled(step.filled, step.num_rows)
        self._settle()
        return TokenOutputs(request_ids, sampled, finish, cached, scores, prompt_scores, vectors=vectors)

    def _scores_of(
        self, step: StepInFlight, result: StepResult, sampled: I32, wanted: npt.NDArray[np.bool_] | None
    ) -> tuple[ScoredTokens | None, ScoredTokens | None]:
        """Logprobs of the drawn tokens, and of tokens of prompts, of requests that are still wanted."""
        if step.scoring is None:
            return None, None
        if result.logprobs is None:
            raise InvariantError(f"step {step.step} was to give logprobs and gave none")
        scores = step.scoring.of_drawn(result.logprobs, step.request_ids, sampled, wanted)
        return scores, step.scoring.of_prompts(result.logprobs, len(sampled), self._table)

    def _stop(self, rows: list[int]) -> None:
        """End these rows by a stop token: results of steps already planned for them are dropped."""
        self._leave(rows)
        for row in rows:
            owner = self._owners[row]
            self._table.drop_late_results(row)
            if isinstance(owner, Running):
                self._drain(owner.finish(FinishReason.STOP, self._planned_step))
            elif isinstance(owner, Draining):
                owner = owner.finish(FinishReason.STOP)
                self._owners[row] = owner
                self._states[owner.request.request_id] = owner

    def extend(self, request_id: int, token_ids: list[int]) -> int:
        """These tokens, which nothing needs to draw, follow all that was committed of a request: they are computed as a prompt's are,
        several in a step, and what steps in flight draw for it is dropped.

        Returns how many of them are taken, from the first on, and generated thereby: 0 where that would save no step, where logprobs of
        them are wanted, where blocks are missing, or where requests must not grow faster than was foreseen, since nobody may be
        preempted. The request's last token is never taken, nor one that ends it.
        """
        owner, table = self._states.get(request_id), self._table
        if not isinstance(owner, Running) or owner.request.sampling.logprobs is not None or self._foresees_all:
            return 0
        row, num_known = owner.row, int(table.num_tokens[owner.row])
        count = max(min(len(token_ids), int(table.max_total_tokens[row]) - num_known - 1), 0)
        count = next((i for i, token in enumerate(token_ids[:count]) if token in owner.request.stop_token_ids), count)
        num_blocks = -(-(num_known + count) // self.config.block_size) - table.num_blocks(row)
        if count < 2 or num_blocks > self._pool.num_free:
            return 0
        self._leave([row])
        table.drop_late_results(row)
        table.tokens[row, num_known : num_known + count] = token_ids[:count]
        table.num_tokens[row] = num_known + count
        # Steps in flight may compute tokens that they draw in vain; from there on the next one writes over what these wrote.
        table.num_computed_tokens[row] = min(int(table.num_computed_tokens[row]), num_known)
        if num_blocks > 0:
            self._new_blocks.append(self._append_blocks(row, num_blocks))
        insort(self._prefilling, (owner.request.rank, row))
        self._num_generated_tokens += count
        return count

    def _append_blocks(self, row: int, num_blocks: int) -> BlockTableChanges:
        blocks, rows = self._pool.take(num_blocks), np.array([row], dtype=np.intp)
        columns = np.concatenate([self._table.append_blocks(rows, block) for block in blocks[:, None]])
        self._shared.take(row, blocks)
        return BlockTableChanges(np.full(num_blocks, row, dtype=np.int32), columns, blocks)

    # ------------------------------------------------------------------------------------------------ rows come and go

    def _running(self, row: int) -> Running:
        """The owner of a row that is to be in plans."""
        owner = self._owners[row]
        if not isinstance(owner, Running):
            raise InvariantError(f"row {row} is scheduled but does not run")
        return owner

    def _leave(self, rows: list[int]) -> None:
        """These rows are in no further plan."""
        self._decodes = self._decodes.without(rows, self._table)
        if self._prefilling:
            self._prefilling = [entry for entry in self._prefilling if entry[1] not in rows]

    def _drain(self, draining: Draining) -> None:
        self._owners[draining.row] = draining
        request_id = draining.request.request_id
        if request_id in self._states:
            self._states[request_id] = draining
        self._draining.append(draining.row)
        self._new_blocks = [changes for changes in self._new_blocks if changes.rows[0] != draining.row]

    def _settle(self) -> None:
        """Give back what draining rows hold that no step in flight touches any more."""
        while self._draining:
            row = self._draining[0]
            owner = self._owners[row]
            if not isinstance(owner, Draining):
                raise InvariantError(f"row {row} is to settle but does not drain")
            if owner.last_step > self._settled_step:
                return
            self._draining.popleft()
            self._registrar.give_up_row(row)
            self._shared.leave(row)
            if self._predictor is not None and owner.reason is not FinishReason.NONE:
                self._learn_from(row)
            self._index.mark_output(
                self._table.blocks_of(row)[owner.request.num_prompt_tokens // self.config.block_size :]
            )
            request_id = owner.request.request_id
            after = owner.settle(self._settled_step, self._table, self._pool)
            self._owners[row] = None
            if isinstance(after, Waiting):
                self._states[request_id] = after
                self._waiting.push(after)
            elif isinstance(after, Finished) and after.reason is not FinishReason.ABORT:
                del self._states[request_id]

    def _learn_from(self, row: int) -> None:
        """The request in this row is over; one that was aborted counts too, since its stop string may have come."""
        table = self._table
        num_prompt_tokens = int(table.num_prompt_tokens[row])
        num_generated = int(table.num_tokens[row]) - num_prompt_tokens
        if self._predictor is not None and num_generated:
            max_tokens = int(table.max_total_tokens[row]) - num_prompt_tokens
            predicted = int(table.predicted_tokens[row])
            self._predictor.observe(int(table.stop_class[row]), num_generated, max_tokens, predicted)

    # ---------------------------------------------------------------------------------------------------------- outside

    @property
    def has_work(self) -> bool:
        """Whether any request or step is not over yet."""
        return bool(self._states or self._draining or self._in_flight)

    @property
    def num_recomputed_tokens(self) -> int:
        """Tokens computed once more since their request was preempted, all in all."""
        return self._num_recomputed_tokens

    @property
    def num_preemptions_by_priority(self) -> int:
        """Preemptions, among all, that made way for a request of better priority."""
        return self._num_preemptions_by_priority

    def stats(self) -> EngineStats:
        """Gauges and counters, as they stand between calls."""
        num_running = len(self._decodes) + len(self._prefilling) + len(self._draining)
        owners = [self._owners[row] for row in self._draining]
        num_aborted = sum(isinstance(owner, Draining) and owner.reason is FinishReason.ABORT for owner in owners)
        return EngineStats(
            num_running=num_running,
            num_waiting=len(self._states) - (num_running - num_aborted),
            num_free_blocks=self._pool.num_free,
            num_blocks=self._pool.num_blocks,
            num_steps_total=self._num_steps,
            prompt_tokens_total=self._num_prompt_tokens,
            cached_prompt_tokens_total=self._num_cached_tokens,
            generation_tokens_total=self._num_generated_tokens,
            preemptions_total=self._num_preemptions,
        )

    def check_invariants(self) -> None:
        """Raise InvariantError unless every row, block and index entry is accounted for; slow, for tests."""
        table = self._table
        rows = table.live_rows()
        held = [table.blocks_of(row) for row in rows.tolist()]
        self._pool.check_invariants(np.concatenate(held) if held else np.empty(0, dtype=np.int32))
        self._shared.check_invariants(rows.tolist(), held)
        self._index.check_invariants()
        table.check_invariants()
        owned = [row for row, owner in enumerate(self._owners) if owner is not None]
        scheduled = self._decodes.rows.tolist() + [row for _, row in self._prefilling] + list(self._draining)
        if owned != rows.tolist() or sorted(scheduled) != owned:
            raise InvariantError("rows, owners and the lists of what runs and drains disagree")


def _or_none(num_logprobs: int | None) -> int:
    """As the table's column says it."""
    return -1 if num_logprobs is None else num_logprobs


def _with_ends(
    ends: EndsWithoutToken,
    kept: npt.NDArray[np.bool_],
    request_ids: I64,
    sampled: I32,
    finish: npt.NDArray[np.uint8],
    cached: I32,
) -> tuple[I64, I32, npt.NDArray[np.uint8], I32]:
    """The columns of a step's outputs with the requests that end without a token behind the others; kept: which of them are wanted."""
    num_kept = np.count_nonzero(kept)
    return (
        np.concatenate((request_ids, ends.request_ids[kept])),
        np.concatenate((sampled, np.full(num_kept, -1, dtype=np.int32))),
        np.concatenate((finish, np.full(num_kept, FinishReason.LENGTH, dtype=np.uint8))),
        np.concatenate((cached, ends.num_cached_tokens[kept])),
    )
