"""Whom to let in, and what it costs to be wrong: admission by forecast against two simple rules, in simulation.

    python benchmarks/admission.py [--requests 4096] [--json FILE]

The real scheduler, a fake executor, no torch. All requests are there from the start, with lengths like those of ShareGPT
chats (lognormal, seeded): prompts of 220 tokens on average, outputs of 250, max_tokens 1,024; the KV cache holds 256 of them
at full length (prompt + max_tokens). In `shift`, outputs are four times as long from the middle of the trace on, up to
max_tokens. Reported for each policy: mean batch size (rows a step), finished requests per 1,000 steps, preemptions per
request, share of computed tokens that were computed before, the scheduler's own time, and as `over_reserve_max` the finished requests
per step in terms of those of reserve_max. JSON on the last line.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from report import publish

from toka.messages import Submit, pack_tokens
from toka.params import SamplingParams
from toka.plan import I32, I64, BatchPlan, StepResult
from toka.scheduler.config import SchedulerConfig
from toka.scheduler.scheduler import Scheduler

MAX_TOKENS, MAX_PROMPT_TOKENS, BLOCK_SIZE = 1024, 1024, 16
KV_REQUESTS = 256
END_TOKEN, SOME_TOKEN = 2, 3
POLICIES: dict[str, dict[str, object]] = {
    "reserve_max": {"admission": "reserve_max"},
    "when_free": {"admission": "when_free"},
    "forecast": {"admission": "forecast", "track_early_stopping": False},
    "forecast_and_predictor": {"admission": "forecast", "track_early_stopping": True},
}


@dataclass(frozen=True)
class Trace:
    """Lengths of the requests, int64 [N] each."""

    prompt: I64
    output: I64


def sharegpt_like(num_requests: int, *, shift: bool) -> Trace:
    """Lognormal lengths; shift: outputs of the second half are four times as long."""
    rng = np.random.default_rng(0)
    prompt = np.clip(rng.lognormal(4.9, 1.0, num_requests), 4, MAX_PROMPT_TOKENS).astype(np.int64)
    output = rng.lognormal(5.1, 0.95, num_requests)
    if shift:
        output[: num_requests // 2] /= 2
        output[num_requests // 2 :] *= 2
    return Trace(prompt, np.clip(output, 1, MAX_TOKENS).astype(np.int64))


class FakeExecutor:
    """Draws the end token when a request has its length; knows a row's request by its seed."""

    def __init__(self, trace: Trace, max_rows: int):
        self._ends: I64 = trace.prompt + trace.output - 1  # seq_len of the step that draws the last token
        self._end_of_row = np.zeros(max_rows, dtype=np.int64)

    def run(self, plan: BatchPlan) -> StepResult:
        self._end_of_row[plan.settings.rows] = self._ends[plan.settings.seed]
        ends = plan.seq_lens == self._end_of_row[plan.rows]
        sampled: I32 = np.where(ends, END_TOKEN, SOME_TOKEN).astype(np.int32)
        return StepResult(plan.step, sampled)


def simulate(trace: Trace, policy: dict[str, object], *, margin: float, steps_in_flight: int) -> dict[str, float]:
    """Serve the whole trace."""
    kv_tokens = int((trace.prompt + MAX_TOKENS).mean() * KV_REQUESTS)
    config = SchedulerConfig(
        num_blocks=kv_tokens // BLOCK_SIZE,
        block_size=BLOCK_SIZE,
        max_request_tokens=MAX_PROMPT_TOKENS + MAX_TOKENS,
        max_tokens_per_forward=8192,
        max_seqs_per_forward=2048,
        steps_in_flight=steps_in_flight,
        early_stopping_margin=margin,
        **policy,  # type: ignore[arg-type]
    )
    scheduler, executor = Scheduler(config, secret=b"of this benchmark"), FakeExecutor(trace, config.max_rows)
    rng = np.random.default_rng(1)
    for request_id, num_prompt_tokens in enumerate(trace.prompt.tolist()):
        scheduler.submit(
            Submit(
                request_id=request_id,
                prompt=pack_tokens(rng.integers(SOME_TOKEN, 32000, num_prompt_tokens)),
                sampling=SamplingParams(max_tokens=MAX_TOKENS),
                stop_token_ids=(END_TOKEN,),
                seed=request_id,
            )
        )
    in_flight: deque[BatchPlan] = deque()
    num_steps = num_rows = num_tokens = 0
    busy_s = 0.0
    while scheduler.has_work:
        start = time.perf_counter()
        while (plan := scheduler.next_plan()) is not None:
            in_flight.append(plan)
        busy_s += time.perf_counter() - start
        plan = in_flight.popleft()
        num_steps, num_rows, num_tokens = num_steps + 1, num_rows + plan.num_rows, num_tokens + plan.num_tokens
        result = executor.run(plan)
        start = time.perf_counter()
        scheduler.commit(result)
        busy_s += time.perf_counter() - start
    num_requests = len(trace.prompt)
    return {
        "mean_batch": round(num_rows / num_steps, 1),
        "finished_per_1000_steps": round(1000 * num_requests / num_steps, 1),
        "preemptions_per_request": round(scheduler.stats().preemptions_total / num_requests, 4),
        "recomputed_share": round(scheduler.num_recomputed_tokens / num_tokens, 4),
        "core_us_per_step": round(1e6 * busy_s / num_steps, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=4096)
    parser.add_argument("--margin", type=float, default=0.25, help="standard deviations")
    parser.add_argument("--steps-in-flight", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the result there too")
    arguments = parser.parse_args()
    report: dict[str, dict[str, object]] = {}
    for name, shift in (("sharegpt_like", False), ("shift", True)):
        trace = sharegpt_like(arguments.requests, shift=shift)
        results: dict[str, dict[str, float]] = {}
        for policy, settings in POLICIES.items():
            result = simulate(trace, settings, margin=arguments.margin, steps_in_flight=arguments.steps_in_flight)
            results[policy] = result
            per_step = result["finished_per_1000_steps"] / results["reserve_max"]["finished_per_1000_steps"]
            result["over_reserve_max"] = round(per_step, 3)
            print(f"{name}, {policy}: {result}", file=sys.stderr)
        report[name] = {
            "mean_prompt_tokens": round(float(trace.prompt.mean()), 1),
            "mean_output_tokens": round(float(trace.output.mean()), 1),
            **results,
        }
    publish(report, arguments.json)


if __name__ == "__main__":
    main()
