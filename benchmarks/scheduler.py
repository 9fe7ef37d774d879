"""How much CPU time does a step of the scheduler cost? The real scheduler, a fake executor, no torch.

    python benchmarks/scheduler.py [--rows 64,1024] [--quick] [--json FILE]

core = next_plan + commit, total = with stats and the packed message; µs per step, all-decode steps after one full prefill, one step
planned ahead. `rows` counts on a pool of blank blocks, `rows_cached_pool` on one full of cached blocks, where each new block evicts one.
The rows move in step, the worst case: all of them begin a block in the same step, every block_size steps. Results as JSON, last line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

from toka.messages import Submit, encode, pack_tokens
from toka.params import SamplingParams
from toka.plan import BatchPlan, StepResult
from toka.scheduler.config import SchedulerConfig
from toka.scheduler.scheduler import Scheduler

BLOCK_SIZE, PROMPT_TOKENS, OUTPUT_TOKENS = 16, 512, 128
ROWS = (1, 64, 256, 1024, 4096, 8192)
CONTEXTS, CONTEXT_ROWS = (512, 4096, 16384), 256
VOCAB_SIZE, END_TOKEN = 32000, 2


class Bench:
    """A scheduler with room for `rows` requests of prompt + output tokens, and no more than that many blocks."""

    def __init__(self, rows: int, prompt_tokens: int, output_tokens: int):
        self.rows, self.prompt_tokens, self.output_tokens = rows, prompt_tokens, output_tokens
        self.rng = np.random.default_rng(0)
        blocks_per_row = -(-(prompt_tokens + output_tokens) // BLOCK_SIZE)
        self.scheduler = Scheduler(
            SchedulerConfig(
                num_blocks=rows * blocks_per_row,
                block_size=BLOCK_SIZE,
                max_request_tokens=prompt_tokens + output_tokens,
                max_tokens_per_forward=rows * prompt_tokens,
                max_seqs_per_forward=rows,
                steps_in_flight=2,
                watermark=0.0,
            )
        )
        self.next_id = 0

    def run(self) -> tuple[list[float], list[float]]:
        """Serve `rows` new requests to their end; µs of core and total for each all-decode step of all rows."""
        for _ in range(self.rows):
            prompt = pack_tokens(self.rng.integers(END_TOKEN + 1, VOCAB_SIZE, self.prompt_tokens))
            sampling = SamplingParams(max_tokens=self.output_tokens)
            self.scheduler.submit(
                Submit(request_id=self.next_id, prompt=prompt, sampling=sampling, stop_token_ids=(END_TOKEN,), seed=0)
            )
            self.next_id += 1
        core_us: list[float] = []
        total_us: list[float] = []
        running = self.scheduler.next_plan()
        while running is not None:
            result = self.execute(running)
            start = time.perf_counter_ns()
            planned = self.scheduler.next_plan()
            outputs = self.scheduler.commit(result)
            core_end = time.perf_counter_ns()
            encode(outputs.pack(self.scheduler.stats()))
            total_end = time.perf_counter_ns()
            if planned is not None and running.num_tokens == running.num_rows == planned.num_tokens == self.rows:
                core_us.append((core_end - start) / 1000)
                total_us.append((total_end - start) / 1000)
            running = planned
        if self.scheduler.has_work:
            raise RuntimeError("the scheduler stopped before all requests were over")
        return core_us, total_us

    def execute(self, plan: BatchPlan) -> StepResult:
        sampled = self.rng.integers(END_TOKEN + 1, VOCAB_SIZE, plan.num_rows, dtype=np.int32)
        return StepResult(plan.step, sampled)


def summary(times_us: list[float]) -> dict[str, float]:
    """Median, mean and 95th percentile, and the least as a bound that other load on the machine disturbs least."""
    array = np.array(times_us)
    figures = {"median": np.median(array), "mean": array.mean(), "p95": np.percentile(array, 95), "min": array.min()}
    return {name: round(float(value), 1) for name, value in figures.items()}


def measure(rows: int, prompt_tokens: int, *, repeats: int) -> tuple[dict[str, object], dict[str, object]]:
    """Figures on a blank pool and on one full of cached blocks, over at least `repeats` rounds of requests each."""
    figures: list[dict[str, object]] = []
    for num_rounds_before in (0, 1):
        core_us: list[float] = []
        total_us: list[float] = []
        for _ in range(repeats):
            bench = Bench(rows, prompt_tokens, OUTPUT_TOKENS)
            for _ in range(num_rounds_before):
                bench.run()
            core, total = bench.run()
            core_us += core
            total_us += total
        figures.append({"core_us": summary(core_us), "total_us": summary(total_us)})
    return figures[0], figures[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="running requests, comma separated")
    parser.add_argument("--quick", action="store_true", help="one round each, contexts left out")
    parser.add_argument("--json", type=Path, help="write the result there too")
    arguments = parser.parse_args()
    repeats = 1 if arguments.quick else 3
    report: dict[str, dict[str, object]] = {"rows": {}, "rows_cached_pool": {}, "context": {}}
    measure(8, PROMPT_TOKENS, repeats=1)  # warm caches and the allocator
    for rows in map(int, arguments.rows.split(",")):
        blank, cached = measure(rows, PROMPT_TOKENS, repeats=repeats if rows <= 1024 else 1)
        report["rows"][str(rows)], report["rows_cached_pool"][str(rows)] = blank, cached
        print(f"{rows:>5} rows: core µs {blank['core_us']}, pool of cached blocks {cached['core_us']}", file=sys.stderr)
    for context in () if arguments.quick else CONTEXTS:
        blank, _ = measure(CONTEXT_ROWS, context, repeats=1)
        report["context"][str(context)] = blank
        print(f"{CONTEXT_ROWS:>5} rows, context {context}: core µs {blank['core_us']}", file=sys.stderr)
    text = json.dumps(report)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
