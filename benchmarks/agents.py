"""Agents that call tools: is a conversation's prefix still there when its next turn comes? Three ways to keep cached blocks.

    python benchmarks/agents.py [--sessions 16] [--turns 8] [--json FILE]            # simulated, no torch, under a minute
    python benchmarks/agents.py --engine [--model default] [--json FILE]             # the real engine and model, half an hour on two cores

Each session has so many turns. The first has 1,000 tokens; the model answers with 40..160; a tool runs for 2..20 s, in which nothing
of the session runs; then all that was said so far comes again with 50..400 tokens of the tool's result behind it. Beside them comes a
stream of requests of 512 tokens in, 128 out, each unlike all others, which never come back but leave cached blocks. The KV cache holds
all sessions at their full length once, and half as much again, so that the stream overwrites what the sessions will need unless
something keeps it.

Policies: `worth` (toka's: what comes back is kept longer, retention.py), clients giving a session_id; `worth_no_session_id`, known by the
prefix alone; `lru` (least recently used goes first); `no_cache`. The same arrivals for all. Reported: TTFT of each turn (median over
sessions, ms); tokens reused of those reusable, which are all that the turn before had in prompt and output; output tokens per
second of a session while it waits for the model, mean over sessions; the stream's TTFT; preemptions.

The simulated model takes 10 ms a step, 0.1 ms a token and 85 ns a token of context (an 8B model on one A100, by count of bytes and
operations). Results as JSON on the last line.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import itertools
import statistics
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from report import publish

from toka.messages import FinishReason, Submit, pack_tokens
from toka.params import SamplingParams
from toka.plan import I32, BatchPlan, StepResult
from toka.scheduler.config import SchedulerConfig
from toka.scheduler.outputs import TokenOutputs
from toka.scheduler.scheduler import Scheduler

if TYPE_CHECKING:
    from toka.engine.core import EngineCore

BLOCK_SIZE, FIRST_TURN_TOKENS = 16, 1000
TOOL_TOKENS, OUTPUT_TOKENS, PAUSE_S = (50, 400), (40, 160), (2.0, 20.0)
STREAM_PROMPT_TOKENS, STREAM_OUTPUT_TOKENS = 512, 128
START_S = 5.0  # sessions begin within so many seconds
SPARE_KV = 1.5  # KV cache: all sessions at full length, times this
VOCAB_SIZE = 32000
STEP_S, TOKEN_S, CONTEXT_TOKEN_S = 10e-3, 100e-6, 85e-9
POLICIES: dict[str, dict[str, object]] = {
    "worth": {"retention": "worth"},
    "worth_no_session_id": {"retention": "worth"},
    "lru": {"retention": "lru"},
    "no_cache": {"prefix_cache": False},
}


@dataclass(frozen=True)
class Load:
    """How much there is to do. stream_per_s: requests of the stream per second. pause: factor on the tools' times."""

    num_sessions: int
    num_turns: int
    stream_per_s: float
    pause: float = 1.0

    @property
    def kv_tokens(self) -> int:
        """Size of the KV cache."""
        return int(SPARE_KV * self.num_sessions * self.mean_session_tokens)

    @property
    def mean_session_tokens(self) -> float:
        turns = self.num_turns
        return FIRST_TURN_TOKENS + (turns - 1) * sum(TOOL_TOKENS) / 2 + turns * sum(OUTPUT_TOKENS) / 2

    @property
    def max_session_tokens(self) -> int:
        return FIRST_TURN_TOKENS + (self.num_turns - 1) * TOOL_TOKENS[1] + self.num_turns * OUTPUT_TOKENS[1]


@dataclass
class Session:
    """One conversation. tokens: all said so far. The lists have one entry a turn."""

    number: int
    rng: np.random.Generator
    tokens: list[int]
    num_reusable: int = 0  # tokens of the turn before, prompt and output
    num_drawn: int = 0  # in this turn
    asked_s: float = 0.0
    ttft_s: list[float] = field(default_factory=list)
    answer_s: list[float] = field(default_factory=list)  # from the question to the last token
    reused: list[int] = field(default_factory=list)
    reusable: list[int] = field(default_factory=list)
    num_output_tokens: int = 0

    def draw(self, low: float, high: float) -> int:
        return int(self.rng.integers(low, high + 1))


class Machine(Protocol):
    """Something that runs a scheduler's steps and has a clock."""

    scheduler: Scheduler

    def now_s(self) -> float: ...

    def wait_until(self, at_s: float) -> None:
        """Nothing to do before then."""
        ...

    def step(self) -> TokenOutputs | None:
        """Run the next step, and be later by what it takes."""
        ...


class SimulatedMachine:
    """A model that draws tokens at random and takes time by the module's constants."""

    def __init__(self, config: SchedulerConfig):
        self.scheduler = Scheduler(config, secret=b"of this benchmark")
        self._in_flight: deque[BatchPlan] = deque()
        self._now_s = 0.0
        self._rng = np.random.default_rng(3)

    def now_s(self) -> float:
        return self._now_s

    def wait_until(self, at_s: float) -> None:
        self._now_s = max(self._now_s, at_s)

    def step(self) -> TokenOutputs | None:
        while (plan := self.scheduler.next_plan()) is not None:
            self._in_flight.append(plan)
        if not self._in_flight:
            return None
        plan = self._in_flight.popleft()
        self._now_s += STEP_S + TOKEN_S * plan.num_tokens + CONTEXT_TOKEN_S * int(plan.seq_lens.sum())
        sampled: I32 = self._rng.integers(0, VOCAB_SIZE, plan.num_rows, dtype=np.int32)
        return self.scheduler.commit(StepResult(plan.step, sampled))


class EngineMachine:
    """The real engine with a new scheduler; time is real."""

    def __init__(self, engine: EngineCore, config: SchedulerConfig):
        self.scheduler = Scheduler(config, secret=b"of this benchmark")
        self._engine = dataclasses.replace(engine, scheduler=self.scheduler)
        self._start_s = time.perf_counter()

    def now_s(self) -> float:
        return time.perf_counter() - self._start_s

    def wait_until(self, at_s: float) -> None:
        time.sleep(max(0.0, at_s - self.now_s()))

    def step(self) -> TokenOutputs | None:
        return self._engine.step()


class Run:
    """All sessions and the stream beside them, on one machine, from the first request to the last turn's end."""

    def __init__(self, machine: Machine, load: Load, *, with_session_id: bool):
        self._machine, self._load, self._with_session_id = machine, load, with_session_id
        rng = np.random.default_rng(1)
        self._stream_rng = np.random.default_rng(2)
        self.sessions = [
            Session(i, np.random.default_rng([0, i]), rng.integers(0, VOCAB_SIZE, FIRST_TURN_TOKENS).tolist())
            for i in range(load.num_sessions)
        ]
        # What comes when: (time, its number, session or None for the stream); numbers break ties.
        self._numbers = itertools.count()
        self._to_come: list[tuple[float, int, Session | None]] = []
        for session in self.sessions:
            self._come(START_S * session.rng.random(), session)
        if load.stream_per_s:
            self._come(0.0, None)
        self._session_of: dict[int, Session] = {}
        self._asked_s: dict[int, float] = {}  # of the stream, by request
        self._stream_ttft_s: list[float] = []
        self._num_over = 0

    def to_the_end(self) -> None:
        while self._num_over < len(self.sessions):
            now = self._machine.now_s()
            while self._to_come and self._to_come[0][0] <= now:
                at_s, _, session = heapq.heappop(self._to_come)
                self._ask_stream(at_s) if session is None else self._ask(session, at_s)
            outputs = self._machine.step()
            if outputs is not None:
                self._take(outputs)
            elif self._to_come and not self._machine.scheduler.has_work:
                self._machine.wait_until(self._to_come[0][0])
        for request_id in (*self._asked_s, *self._session_of):
            self._machine.scheduler.abort(request_id)
        while self._machine.scheduler.has_work:
            self._machine.step()

    def _come(self, at_s: float, session: Session | None) -> None:
        heapq.heappush(self._to_come, (at_s, next(self._numbers), session))

    def _submit(self, prompt: list[int], num_output_tokens: int, session_id: str) -> int:
        request_id = next(self._numbers)
        self._machine.scheduler.submit(
            Submit(
                request_id=request_id,
                prompt=pack_tokens(prompt),
                sampling=SamplingParams(max_tokens=num_output_tokens),
                stop_token_ids=(),
                seed=request_id,
                session_id=session_id,
            )
        )
        return request_id

    def _ask(self, session: Session, at_s: float) -> None:
        session.asked_s, session.num_drawn = at_s, 0
        session_id = f"session {session.number}" if self._with_session_id else ""
        request_id = self._submit(session.tokens, session.draw(*OUTPUT_TOKENS), session_id)
        self._session_of[request_id] = session

    def _ask_stream(self, at_s: float) -> None:
        prompt = self._stream_rng.integers(0, VOCAB_SIZE, STREAM_PROMPT_TOKENS).tolist()
        self._asked_s[self._submit(prompt, STREAM_OUTPUT_TOKENS, "")] = at_s
        self._come(at_s + self._stream_rng.exponential(1 / self._load.stream_per_s), None)

    def _take(self, outputs: TokenOutputs) -> None:
        now = self._machine.now_s()
        columns = (outputs.request_ids, outputs.token_ids, outputs.finish, outputs.cached)
        for request_id, token, finish, cached in zip(*(column.tolist() for column in columns), strict=True):
            session = self._session_of.get(request_id)
            if session is not None:
                self._take_token(session, token, cached, now)
                if finish:
                    assert finish == FinishReason.LENGTH
                    del self._session_of[request_id]
                    self._end_turn(session, now)
            elif request_id in self._asked_s:  # the stream's first token
                self._stream_ttft_s.append(now - self._asked_s.pop(request_id))

    def _take_token(self, session: Session, token: int, cached: int, now: float) -> None:
        if session.num_drawn == 0:
            session.ttft_s.append(now - session.asked_s)
            if session.num_reusable:
                session.reused.append(cached)
                session.reusable.append(session.num_reusable)
        session.num_drawn += 1
        session.num_output_tokens += 1
        session.tokens.append(token)

    def _end_turn(self, session: Session, now: float) -> None:
        session.answer_s.append(now - session.asked_s)
        if len(session.answer_s) == self._load.num_turns:
            self._num_over += 1
            return
        session.num_reusable = len(session.tokens)
        session.tokens += session.rng.integers(0, VOCAB_SIZE, session.draw(*TOOL_TOKENS)).tolist()
        self._come(now + self._load.pause * session.rng.uniform(*PAUSE_S), session)

    def figures(self) -> dict[str, object]:
        sessions, turns = self.sessions, range(self._load.num_turns)
        reused = sum(sum(session.reused) for session in sessions)
        reusable = sum(sum(session.reusable) for session in sessions)
        return {
            "ttft_ms_by_turn": [round(1000 * statistics.median(s.ttft_s[t] for s in sessions), 1) for t in turns],
            "ttft_ms_later_turns_p95": round(
                1000 * float(np.percentile([t for s in sessions for t in s.ttft_s[1:]], 95)), 1
            ),
            "reused_share": round(reused / reusable, 4),
            "tokens_per_s_per_user": round(statistics.mean(s.num_output_tokens / sum(s.answer_s) for s in sessions), 2),
            "stream_ttft_ms_median": round(1000 * statistics.median(self._stream_ttft_s), 1)
            if self._stream_ttft_s
            else None,
            "stream_requests": len(self._stream_ttft_s),
            "preemptions": self._machine.scheduler.stats().preemptions_total,
            "seconds": round(self._machine.now_s(), 1),
        }


def simulated_config(load: Load) -> SchedulerConfig:
    return SchedulerConfig(
        num_blocks=load.kv_tokens // BLOCK_SIZE,
        block_size=BLOCK_SIZE,
        max_request_tokens=load.max_session_tokens,
        max_tokens_per_forward=2048,
        max_seqs_per_forward=256,
        steps_in_flight=2,
        vocab_size=VOCAB_SIZE,
    )


def build(model: str, load: Load) -> EngineCore:
    """The real engine, warm, with a KV cache for this load."""
    from toka.config import Config, hub_offline, num_available_cores, set_engine_environment
    from toka.model_source import locate

    config = Config(
        model=model, kv_cache_num_tokens=load.kv_tokens, max_num_tokens_per_request=load.max_session_tokens
    ).check()
    cache = config.cache_path()
    set_engine_environment(config.num_threads or num_available_cores(), cache)
    from toka.engine.build import build_engine  # imports torch, which reads the environment set above

    source = locate(config.model, config.tokenizer, cache, offline=hub_offline())
    return build_engine(config, source)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=16)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--stream", type=float, help="requests of the stream per second; default 8, with --engine 0.2")
    parser.add_argument("--pause", type=float, default=1.0, help="factor on the tools' times")
    parser.add_argument("--policies", default=",".join(POLICIES), help="comma separated")
    parser.add_argument("--engine", action="store_true", help="the real engine instead of a simulated one")
    parser.add_argument("--model", default="default", help="with --engine")
    parser.add_argument("--json", type=Path, help="write the result there too")
    arguments = parser.parse_args()
    stream_per_s = arguments.stream if arguments.stream is not None else 0.2 if arguments.engine else 8.0
    load = Load(arguments.sessions, arguments.turns, stream_per_s, arguments.pause)
    engine = build(arguments.model, load) if arguments.engine else None
    config = simulated_config(load) if engine is None else engine.scheduler.config
    report: dict[str, object] = {
        "load": {**dataclasses.asdict(load), "kv_tokens": load.kv_tokens, "engine": arguments.engine},
    }
    for policy in arguments.policies.split(","):
        settings = dataclasses.replace(config, **POLICIES[policy])  # type: ignore[arg-type]
        machine = SimulatedMachine(settings) if engine is None else EngineMachine(engine, settings)
        run = Run(machine, load, with_session_id=policy != "worth_no_session_id")
        run.to_the_end()
        report[policy] = run.figures()
        print(f"{policy}: {report[policy]}", file=sys.stderr)
    if engine is not None:
        engine.shutdown()
    publish(report, arguments.json)


if __name__ == "__main__":
    main()
