"""A fake device and client around the real scheduler, which find every wrong block.

The fake model keeps one number per KV slot: a hash of the whole prefix up to its token, chained from the cache salt, as
a real model's KV depends on all tokens before. The next token depends on the numbers of all positions, read through the
device's own block table. So a stale, shared or misplaced block, a wrong position or a lost token changes the output,
and each request's output is compared with what the same model says of the request alone. So are its logprobs, which
are numbers made of the same sums. A grammar here says of some places of the output, before anything is drawn, which
token stands there.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from toka.messages import FinishReason, Submit, pack_tokens
from toka.params import MAX_LOGPROBS, SamplingParams, StructuredOutput
from toka.plan import MAX_SHARED_LEVELS, BatchPlan, SharedPrefixPlan, StepLogprobs, StepResult
from toka.scheduler.admission import AdmissionPolicy
from toka.scheduler.config import SchedulerConfig
from toka.scheduler.outputs import TokenOutputs
from toka.scheduler.scheduler import Scheduler

VOCAB = 23
STEP = 2  # tokens; requests here are shorter than the real SHARED_PREFIX_STEP
MASK = (1 << 64) - 1


def mix(a: int, b: int) -> int:
    """A 64-bit hash of two numbers (the finaliser of splitmix64)."""
    z = (a * 0x9E3779B97F4A7C15 + b + 0x632BE59BD9B4E019) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def draw(total: int, seed: int, position: int, held_back: tuple[int, ...]) -> int:
    """The token at `position`; total: sum of the KV numbers before it."""
    token = mix(mix(total & MASK, seed & MASK), position) % VOCAB
    while token in held_back:
        token = (token + 1) % VOCAB
    return token


def likelihood(total: int, token: int) -> float:
    """What stands for the logprob of a token behind positions of this sum; exact in 32 bits."""
    return -(mix(total & MASK, token) % 2**20) / 2**8


def forced_tokens(seed: int, length: int) -> list[int | None]:
    """A grammar: the token at each place of the output, None where any may be drawn; runs of either kind."""
    places: list[int | None] = []
    while len(places) < length:
        number = mix(seed, len(places))
        run = 1 + number // 2 % 6
        places += [(number // 16 + i) % VOCAB for i in range(run)] if number % 2 else [None] * (run // 2 + 1)
    return places[:length]


@dataclass
class Wanted:
    """One request as the client sees it. num_logprobs, num_prompt_logprobs: as asked for; -1 = none.

    forced: see forced_tokens. scores, prompt_scores: (token, logprob) of generated tokens and of the prompt's, as they came.
    """

    prompt: list[int]
    seed: int
    salt: int
    stop_ids: tuple[int, ...]
    max_tokens: int
    min_tokens: int
    deadline_s: float = math.inf
    got: list[int] = field(default_factory=list)
    finish: FinishReason = FinishReason.NONE
    cached: int = -1
    num_logprobs: int = -1
    num_prompt_logprobs: int = -1
    forced: list[int | None] = field(default_factory=list)
    scores: list[tuple[int, float]] = field(default_factory=list)
    prompt_scores: list[tuple[int, float]] = field(default_factory=list)

    def next_forced(self) -> list[int]:
        """The tokens that must come next, up to the first place with a choice."""
        known = self.forced[len(self.got) :]
        return [token for token in itertools.takewhile(lambda token: token is not None, known) if token is not None]

    def alone_scores(self) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
        """What should be known of its prompt and of its tokens."""
        kv, total, scores = self.salt, 0, []
        tokens = self.prompt + self.got
        for token, successor in itertools.pairwise(tokens):
            kv = mix(kv, token)
            total += kv
            scores.append((successor, likelihood(total, successor)))
        num_of_prompt = len(self.prompt) - 1
        return (
            scores[:num_of_prompt] if self.num_prompt_logprobs >= 0 else [],
            scores[num_of_prompt:] if self.num_logprobs >= 0 else [],
        )

    def alone(self) -> tuple[list[int], FinishReason]:
        """What the model says of this request by itself."""
        kv, total = self.salt, 0
        for token in self.prompt:
            kv = mix(kv, token)
            total += kv
        out: list[int] = []
        if self.max_tokens == 0:
            return out, FinishReason.LENGTH
        while True:
            held_back = self.stop_ids if len(out) < self.min_tokens else ()
            forced = self.forced[len(out)] if self.forced else None
            token = draw(total, self.seed, len(self.prompt) + len(out), held_back) if forced is None else forced
            out.append(token)
            if token in self.stop_ids:
                return out, FinishReason.STOP
            if len(out) == self.max_tokens:
                return out, FinishReason.LENGTH
            kv = mix(kv, token)
            total += kv


class FakeDevice:
    """Block table, KV slots and last tokens, changed only by plans, in order."""

    def __init__(self, config: SchedulerConfig, salt_of_seed: dict[int, int]):
        self.block_size = config.block_size
        self.table = np.full((config.max_rows, config.max_blocks_per_row), -1, dtype=np.int64)
        self.kv = [0] * (config.num_blocks * config.block_size)
        self.last = [-1] * config.max_rows
        self.seed = [0] * config.max_rows
        self.held_back: list[tuple[tuple[int, ...], int]] = [((), 0)] * config.max_rows
        self.salt_of_seed = salt_of_seed

    def run(self, plan: BatchPlan, forced: dict[int, int]) -> StepResult:
        """forced: what the masks of some rows leave to draw."""
        self.table[plan.table.rows, plan.table.columns] = plan.table.blocks
        settings = plan.settings
        for i, row in enumerate(settings.rows.tolist()):
            self.seed[row] = int(settings.seed[i])
            ids = tuple(t for t in settings.held_back_ids[i].tolist() if t >= 0)
            self.held_back[row] = (ids, int(settings.held_back_until[i]))
        positions, rows = plan.positions().tolist(), plan.token_rows().tolist()
        for row, position, token in zip(rows, positions, plan.token_ids.tolist(), strict=True):
            actual = token if token >= 0 else self.last[-1 - token]
            before = self.kv[self.slot(row, position - 1)] if position else self.salt_of_seed[self.seed[row]]
            self.kv[self.slot(row, position)] = mix(before, actual)
        sampled = np.full(plan.num_rows, -7, dtype=np.int32)
        for i, row in enumerate(plan.rows.tolist()):
            if plan.samples[i]:
                length = int(plan.seq_lens[i])
                total = sum(self.kv[self.slot(row, position)] for position in range(length))
                ids, until = self.held_back[row]
                drawn = draw(total, self.seed[row], length, ids if length < until else ())
                sampled[i] = self.last[row] = forced.get(row, drawn)
        return StepResult(plan.step, sampled, self._logprobs(plan, sampled))

    def _logprobs(self, plan: BatchPlan, sampled: np.ndarray) -> StepLogprobs | None:
        """Of drawn tokens that ask and of places of prompts; NaN for the others. Rank and likeliest tokens follow from the token."""
        if plan.scoring is None:
            return None
        rows, positions = plan.token_rows().tolist(), plan.positions().tolist()
        drawn = [int(place) for place in (plan.query_start[1:] - 1)[plan.samples]]
        places = drawn + plan.scoring.places.tolist()
        tokens = sampled[plan.samples].tolist() + plan.scoring.targets.tolist()
        asks = plan.scoring.drawn.tolist() + [True] * len(plan.scoring.places)
        values = [
            likelihood(sum(self.kv[self.slot(rows[place], p)] for p in range(positions[place] + 1)), token)
            if wanted
            else np.nan
            for place, token, wanted in zip(places, tokens, asks, strict=True)
        ]
        top_ids = np.array(tokens, dtype=np.int32)[:, None] + np.arange(MAX_LOGPROBS, dtype=np.int32)
        ranks = np.array(tokens, dtype=np.int32)
        return StepLogprobs(np.array(values, dtype=np.float32), ranks, top_ids, -top_ids.astype(np.float32))

    def slot(self, row: int, position: int) -> int:
        block = int(self.table[row, position // self.block_size])
        assert block >= 0, "a token has no block"
        return block * self.block_size + position % self.block_size


class Simulation:
    """Client, scheduler and device; check() after every event, finish() at the end."""

    def __init__(self, policy: AdmissionPolicy | None = None, **config: Any):
        self.config = SchedulerConfig(vocab_size=VOCAB, **config)
        self.scheduler = Scheduler(self.config, secret=b"of these tests only", admission=policy)
        self.salt_of_seed: dict[int, int] = {}
        self.device = FakeDevice(self.config, self.salt_of_seed)
        self.in_flight: deque[BatchPlan] = deque()
        self.live: dict[int, Wanted] = {}
        self.done: dict[int, Wanted] = {}
        self.written: set[int] = set()  # slots written since their block was last leased
        self.now_s = 0.0
        self.next_id = 1
        self.num_events = 0
        self.num_planned_tokens = 0
        self.num_drawn = 0
        self.num_extended = 0  # tokens that were not drawn
        self.trace: list[bytes] = []  # the plans' bytes

    def submit(
        self,
        prompt: list[int],
        *,
        max_tokens: int | None = 8,
        min_tokens: int = 0,
        n: int = 1,
        stop_ids: tuple[int, ...] = (),
        salt: str = "",
        priority: int = 0,
        session_id: str = "",
        deadline_s: float = math.inf,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        grammar: bool = False,
    ) -> list[int]:
        """Submit now; returns the samples' ids. RequestError goes through, with nothing queued."""
        first = self.next_id
        sampling = SamplingParams(
            n=n,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            structured=StructuredOutput("regex", ".*") if grammar else None,
        )
        self.scheduler.submit(
            Submit(
                request_id=first,
                prompt=pack_tokens(prompt),
                sampling=sampling,
                stop_token_ids=stop_ids,
                seed=first * 1000,
                cache_salt=salt,
                priority=priority,
                session_id=session_id,
                arrival_s=self.now_s,
                deadline_s=deadline_s,
            )
        )
        self.next_id += n
        limit = self.config.max_tokens_per_request - len(prompt) if max_tokens is None else max_tokens
        ids = list(range(first, first + n))
        for i, request_id in enumerate(ids):
            seed = first * 1000 + i
            salt_number = self.salt_of_seed[seed] = mix(7, int.from_bytes(salt.encode(), "little"))
            self.live[request_id] = Wanted(
                prompt,
                seed,
                salt_number,
                stop_ids,
                limit,
                min_tokens,
                self.now_s + deadline_s,
                num_logprobs=-1 if logprobs is None else logprobs,
                num_prompt_logprobs=-1 if prompt_logprobs is None or i else prompt_logprobs,  # once for all samples
                forced=forced_tokens(seed, limit) if grammar else [],
            )
        self.check()
        return ids

    def abort(self, request_id: int) -> None:
        self.scheduler.abort(request_id)
        wanted = self.live.pop(request_id, None)
        if wanted is not None:
            wanted.finish = FinishReason.ABORT
            self.done[request_id] = wanted
        self.check()

    def expire(self, seconds: float) -> list[int]:
        """Let so much time pass; returns who ended by it."""
        self.now_s += seconds
        late = {i for i, w in self.live.items() if w.deadline_s < self.now_s and not self.has_begun(i)}
        outputs = self.scheduler.expire(self.now_s)
        expired: list[int] = outputs.request_ids.tolist()
        assert set(expired) == late and len(expired) == len(late)
        assert set(outputs.finish.tolist()) <= {FinishReason.EXPIRED} and set(outputs.token_ids.tolist()) <= {-1}
        for request_id in expired:
            self.done[request_id] = self.live.pop(request_id)
            self.done[request_id].finish = FinishReason.EXPIRED
        self.check()
        return expired

    def has_begun(self, request_id: int) -> bool:
        return self.scheduler._states[request_id].request.has_begun

    def plan(self) -> BatchPlan | None:
        plan = self.scheduler.next_plan()
        if plan is not None:
            self._check_plan(plan)
            self.in_flight.append(plan)
            self.num_planned_tokens += plan.num_tokens
            self.num_drawn += int(np.count_nonzero(plan.samples))
            self.trace.append(plan_bytes(plan))
        self.check()
        return plan

    def commit(self) -> None:
        """Run the oldest plan in flight (as late as may be) and commit it."""
        plan = self.in_flight.popleft()
        outputs = self.scheduler.commit(self.device.run(plan, self._forced_draws(plan)))
        columns = (outputs.request_ids, outputs.token_ids, outputs.finish, outputs.cached)
        assert [c.dtype for c in columns] == [np.int64, np.int32, np.uint8, np.int32]
        self._take_scores(outputs)
        for request_id, token, finish, cached in zip(*(c.tolist() for c in columns), strict=True):
            wanted = self.live[request_id]  # a KeyError is an output after the end
            if token >= 0:
                wanted.got.append(token)
            if len(wanted.got) <= 1:
                wanted.cached = cached
                assert wanted.prompt_scores == wanted.alone_scores()[0], (
                    "the prompt is scored before the first token comes"
                )
            if finish:
                wanted.finish = FinishReason(finish)
                self.done[request_id] = self.live.pop(request_id)
                assert (wanted.got, wanted.finish) == wanted.alone()
                assert (wanted.prompt_scores, wanted.scores) == wanted.alone_scores()
            elif forced := wanted.next_forced():
                self._extend(request_id, wanted, forced)
        self.check()

    def _forced_draws(self, plan: BatchPlan) -> dict[int, int]:
        """Row → what its mask leaves to draw. All steps before this one are committed."""
        if plan.masked is None:
            return {}
        rows = plan.rows[plan.samples][plan.masked.drawn].tolist()
        found = zip(rows, map(self.live.get, plan.masked.request_ids.tolist()), strict=True)
        return {row: forced[0] for row, wanted in found if wanted is not None and (forced := wanted.next_forced())}

    def _extend(self, request_id: int, wanted: Wanted, forced: list[int]) -> None:
        taken = self.scheduler.extend(request_id, forced)
        assert taken != 1 and taken <= len(forced)
        if not taken:
            return
        self.num_extended += taken
        wanted.got += forced[:taken]
        assert len(wanted.got) < wanted.max_tokens and not set(forced[:taken]) & set(wanted.stop_ids)
        table, size = self.scheduler._table, self.config.block_size
        row = self.scheduler._states[request_id].row  # type: ignore[union-attr]
        for position in range(int(table.num_computed_tokens[row]), int(table.token_room[row])):
            # What steps in flight write there is written over, in order, by the step that computes the tokens.
            self.written.discard(int(table.blocks[row, position // size]) * size + position % size)

    def _take_scores(self, outputs: TokenOutputs) -> None:
        for scored, of_prompt in ((outputs.prompt_scores, True), (outputs.scores, False)):
            for request_id, entry in scored.pack().entries() if scored is not None else ():
                wanted = self.live[request_id]
                (wanted.prompt_scores if of_prompt else wanted.scores).append((entry.token_id, entry.logprob))
                assert entry.rank == entry.token_id and len(entry.top) >= (
                    wanted.num_prompt_logprobs if of_prompt else wanted.num_logprobs
                )
                assert [token for token, _ in entry.top] == [entry.token_id + i for i in range(len(entry.top))]

    def step(self) -> None:
        """Plan as far ahead as allowed, then commit one."""
        while self.plan() is not None:
            pass
        if self.in_flight:
            self.commit()

    def finish(self) -> None:
        """Run until nothing is left; fails if the scheduler stands still or keeps anything."""
        still_to_draw = sum(len(w.prompt) + w.max_tokens for w in self.live.values())
        for _ in range(20 * (still_to_draw + 10)):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work and not self.live, f"starved: {list(self.live)}"
        stats = self.scheduler.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, self.config.num_blocks)

    def check(self) -> None:
        """The laws that hold after every event."""
        self.num_events += 1
        scheduler = self.scheduler
        scheduler.check_invariants()
        stats = scheduler.stats()
        assert stats.num_waiting >= 0 and stats.num_running >= 0
        # Aborted requests may still drain; every other one is either running or waiting.
        assert stats.num_running + stats.num_waiting >= len(self.live)
        table = scheduler._table
        for plan in self.in_flight:  # blocks of live rows are held: check_invariants has seen to it
            assert np.all(table.request_id[plan.rows] >= 0), "a row in flight was given up"
            assert np.all(table.token_room[plan.rows] >= plan.seq_lens), "a row in flight lost a block"

    def _check_plan(self, plan: BatchPlan) -> None:
        config, table, size = self.config, self.scheduler._table, self.config.block_size
        lens = np.diff(plan.query_start)
        assert 0 < plan.num_rows <= config.max_seqs_per_forward and plan.num_tokens <= config.max_tokens_per_forward
        assert plan.num_samples <= min(config.max_running, plan.num_tokens)
        assert np.all(lens > 0) and plan.query_start[0] == 0 and plan.query_start[-1] == plan.num_tokens
        assert len(set(plan.rows.tolist())) == plan.num_rows
        assert plan.rows.dtype == plan.token_ids.dtype == plan.seq_lens.dtype == plan.query_start.dtype == np.int32
        first = dict(zip(plan.rows.tolist(), (plan.seq_lens - lens).tolist(), strict=True))
        changes = plan.table
        for row, column, block in zip(
            changes.rows.tolist(), changes.columns.tolist(), changes.blocks.tolist(), strict=True
        ):
            if column * size >= first.get(
                row, 0
            ):  # a block to write to, not a shared one (of an extended row, which may wait)
                self.written -= set(range(block * size, (block + 1) * size))
        assert all(np.all(table.blocks[row, :1] >= 0) for row in first)
        for row, position in zip(plan.token_rows().tolist(), plan.positions().tolist(), strict=True):
            slot = int(table.blocks[row, position // size]) * size + position % size
            assert slot not in self.written, "a slot is written twice while its block is leased"
            self.written.add(slot)
        drawn_rows = plan.rows[plan.samples]
        masked = table.has_grammar[drawn_rows]
        assert (plan.masked is None) == (not masked.any())
        if plan.masked is not None:
            assert np.array_equal(plan.masked.drawn, masked)
            assert np.array_equal(plan.masked.request_ids, table.request_id[drawn_rows[masked]])
        if plan.shared is not None:
            self._check_groups(plan, plan.shared)

    def _check_groups(self, plan: BatchPlan, shared: SharedPrefixPlan) -> None:
        """Members hold the same blocks, and each row's groups tile its first positions, level by level."""
        config, table, size = self.config, self.scheduler._table, self.config.block_size
        assert config.use_hydragen and 0 < len(shared.groups) <= config.max_shared_groups
        covered, levels = np.zeros(len(shared.lens), dtype=np.int32), np.zeros(len(shared.lens), dtype=np.int32)
        end_of_members = 0
        for level, start, stop, begin, end in shared.groups.tolist():
            members = shared.members[start:stop]
            assert start == end_of_members and stop - start >= config.hydragen_min_group_size
            assert np.all(np.diff(plan.query_start)[members] == 1) and np.all(end < plan.seq_lens[members])
            assert np.all(covered[members] == begin) and np.all(levels[members] == level) and begin < end
            assert begin % STEP == end % STEP == begin % size == end % size == 0
            blocks = table.blocks[plan.rows[members], begin // size : end // size]
            assert np.all(blocks == blocks[0]), "a group's rows hold different blocks"
            covered[members], levels[members], end_of_members = end, level + 1, stop
        assert np.array_equal(covered, shared.lens) and end_of_members == len(shared.members)
        assert levels.max() <= MAX_SHARED_LEVELS and shared.lens[levels > 0].min() >= config.hydragen_min_prefix_len


def plan_bytes(plan: BatchPlan) -> bytes:
    """Everything in a plan, as bytes."""
    arrays = [plan.rows, plan.query_start, plan.token_ids, plan.seq_lens, plan.samples]
    arrays += [plan.table.rows, plan.table.columns, plan.table.blocks]
    settings = plan.settings
    arrays += [settings.rows, settings.temperature, settings.top_k, settings.top_p, settings.min_p, settings.seed]
    arrays += [settings.held_back_ids, settings.held_back_until]
    if plan.shared is not None:
        arrays += [plan.shared.groups, plan.shared.members, plan.shared.lens]
    if plan.scoring is not None:
        arrays += [plan.scoring.drawn, plan.scoring.places, plan.scoring.targets]
    if plan.masked is not None:
        arrays += [plan.masked.drawn, plan.masked.request_ids]
    return plan.step.to_bytes(8, "little") + b"".join(a.tobytes() for a in arrays)


def random_walk(seed: int, num_events: int) -> Simulation:
    """A day of traffic: submits, aborts, plans and commits in random order on a small pool, then the end of the day."""
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 4, 5, 16])
    simulation = Simulation(
        num_blocks=rng.randrange(40, 200) // block_size + 1,
        block_size=block_size,
        max_request_tokens=rng.choice([20, 40, 100]),
        max_tokens_per_forward=rng.choice([1, 3, 8, 64]),
        max_seqs_per_forward=rng.choice([1, 2, 5, 16]),
        prefix_cache=rng.random() < 0.8,
        steps_in_flight=rng.randrange(1, 5),
        watermark=rng.choice([0.0, 0.01, 0.2]),
        admission=rng.choice(["forecast", "forecast", "when_free", "when_free", "reserve_max"]),
        track_early_stopping=rng.random() < 0.5,
        use_hydragen=rng.random() < 0.5,
        hydragen_min_group_size=rng.choice([2, 2, 3]),
        hydragen_min_prefix_len=rng.choice([1, 8]),
        retention=rng.choice(["worth", "worth", "lru"]),
    )
    config, limit = simulation.config, simulation.config.max_tokens_per_request
    common = [rng.randrange(VOCAB) for _ in range(limit)]
    while simulation.num_events < num_events:
        event = rng.random()
        if event < 0.15 and len(simulation.live) < 30:
            length = rng.randrange(1, limit)
            shared = rng.randrange(length + 1)
            prompt = common[:shared] + [rng.randrange(VOCAB) for _ in range(length - shared)]
            max_tokens = rng.choice([None, rng.randrange(limit - length + 1)])
            simulation.submit(
                prompt,
                max_tokens=max_tokens,
                min_tokens=rng.randrange(min(3, limit - length + 1 if max_tokens is None else max_tokens + 1)),
                n=rng.choice([1, 1, 1, 2, 4]),
                stop_ids=rng.choice([(), (3,), (1, 5, 9)]),
                salt=rng.choice(["", "", "a", "b"]),
                priority=rng.choice([0, 0, 0, 1, -1]),
                session_id=rng.choice(["", "", "chat"]),
                deadline_s=rng.choice([math.inf, math.inf, 3.0, 50.0]),
                logprobs=rng.choice([None, None, 0, 3, MAX_LOGPROBS]),
                prompt_logprobs=rng.choice([None, None, None, 0, 5]),
                grammar=rng.random() < 0.3,
            )
        elif event < 0.16:
            simulation.expire(rng.random())
        elif event < 0.19 and simulation.live:
            simulation.abort(rng.choice(list(simulation.live)))
        elif event < 0.6:
            simulation.plan()
        elif simulation.in_flight:
            simulation.commit()
    simulation.finish()
    if config.admission == "reserve_max" or (config.admission == "forecast" and not config.track_early_stopping):
        scheduler = simulation.scheduler
        by_priority = scheduler.num_preemptions_by_priority
        assert scheduler.stats().preemptions_total == by_priority, "a block was missing that had been foreseen"
    return simulation


@pytest.fixture(autouse=True)
def short_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toka.scheduler.hydragen.SHARED_PREFIX_STEP", STEP)


@pytest.fixture
def new_simulation() -> Callable[..., Simulation]:
    return Simulation


@pytest.fixture
def walk() -> Callable[[int, int], Simulation]:
    return random_walk
