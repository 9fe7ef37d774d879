"""How much CPU time does a step of the scheduler cost? The real scheduler, a fake executor, no torch.

    python benchmarks/scheduler.py [--rows 64,1024] [--quick] [--json FILE]

core = next_plan + commit, total = with stats and the packed message; µs per step, over the all-decode steps after one full
prefill, one step planned ahead. `rows` and `context` count on a pool of blank blocks, `rows_cached_pool` on one full of cached blocks,
where each new block evicts one. The rows move in step, the worst case: all of them begin a block in the same step, every block_size steps.

forecast_us: the free blocks of every future step until all running requests end, their lengths predicted, sixteen blocks of each
shared by 128 or 256 rows, and what one newcomer changes in it; median. shared_prefix_us: with 1,024 rows in groups of 128 and 256 at two
levels, 8 of which end and 8 begin in every step (so that each draws 128 tokens), what it costs a step to keep up who shares what and to
find the groups for Hydragen; median. Results as JSON, last line.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
from report import publish

from toka.messages import Submit, encode, pack_tokens
from toka.params import SamplingParams
from toka.plan import I32, BatchPlan, StepResult
from toka.scheduler.batching import DecodeSet
from toka.scheduler.config import SchedulerConfig
from toka.scheduler.hydragen import GroupFinder
from toka.scheduler.outlook import Forecaster, HeadProspect, Newcomer, RunningRows
from toka.scheduler.request_table import RequestTable
from toka.scheduler.scheduler import Scheduler
from toka.scheduler.shared_prefix import SharedPrefixes
from toka.scheduler.stop_predictor import StopPredictor, class_of

BLOCK_SIZE, PROMPT_TOKENS, OUTPUT_TOKENS = 16, 512, 128
ROWS = (1, 64, 256, 1024, 4096, 8192)
CONTEXTS, CONTEXT_ROWS = (512, 4096, 16384), 256
FORECAST_ROWS, SHARED_PREFIX_ROWS, ROWS_PER_GROUP = (1024, 8192), 1024, 128
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


class Crowd:
    """The scheduler's tables as `rows` running requests leave them, half way through their outputs, made directly.

    Rows come in groups of ROWS_PER_GROUP that share their first 16 of 40 blocks, the first 8 with the group beside them.
    """

    COMMON, PAIR, OWN = 8, 8, 24  # blocks: of two groups, of one group, of one row

    def __init__(self, rows: int):
        self.rows = rows
        per_row = self.COMMON + self.PAIR + self.OWN
        self.config = SchedulerConfig(
            num_blocks=rows * (self.OWN + 1) + rows,
            block_size=BLOCK_SIZE,
            max_request_tokens=2 * per_row * BLOCK_SIZE,
            max_seqs_per_forward=rows,
            use_hydragen=True,
            hydragen_min_group_size=ROWS_PER_GROUP // 2,
            hydragen_min_prefix_len=64,
        )
        self.table, self.shared = RequestTable(self.config), SharedPrefixes(self.config.num_blocks, 2 * rows)
        self.numbers = np.arange(rows)
        self.rng = np.random.default_rng(0)
        for row in range(rows):
            group, is_first = row // ROWS_PER_GROUP, row % ROWS_PER_GROUP == 0
            held = np.repeat([not is_first or group % 2 == 1, not is_first], [self.COMMON, self.PAIR])
            self.begin(row, self.prefix_of(row), held, self.own_of(row))
        table, all_rows = self.table, slice(0, rows)
        table.num_prompt_tokens[all_rows] = PROMPT_TOKENS
        table.num_tokens[all_rows] = table.num_computed_tokens[all_rows] = PROMPT_TOKENS + self.rng.integers(
            1, OUTPUT_TOKENS, rows
        )
        table.max_total_tokens[all_rows] = PROMPT_TOKENS + OUTPUT_TOKENS
        table.token_room[all_rows] = per_row * BLOCK_SIZE
        table.arrival[all_rows] = self.numbers
        table.stop_class[all_rows] = class_of(PROMPT_TOKENS, OUTPUT_TOKENS)
        table.request_id[all_rows] = self.numbers

    def prefix_of(self, row: int) -> I32:
        """The blocks that the row shares."""
        group, start = row // ROWS_PER_GROUP, self.rows * self.OWN
        common = np.arange(self.COMMON) + start + group // 2 * self.COMMON
        pair = np.arange(self.PAIR) + start + self.rows // ROWS_PER_GROUP * self.COMMON + group * self.PAIR
        return np.concatenate((common, pair)).astype(np.int32)

    def own_of(self, row: int) -> I32:
        return np.arange(row * self.OWN, (row + 1) * self.OWN, dtype=np.int32)

    def begin(self, row: int, prefix: I32, held: npt.NDArray[np.bool_], own: I32) -> None:
        """The row leases these blocks; held: which of its prefix others hold."""
        self.shared.join(row, prefix, held)
        self.shared.take(row, own)


def forecast_us(rows: int, repeats: int) -> float:
    """Median µs of a forecast and one newcomer in it."""
    crowd = Crowd(rows)
    predictor = StopPredictor(margin=0.25)
    stop_class = class_of(PROMPT_TOKENS, OUTPUT_TOKENS)
    for length in crowd.rng.integers(1, OUTPUT_TOKENS + 1, 2048).tolist():
        predictor.observe(stop_class, length, OUTPUT_TOKENS, OUTPUT_TOKENS)
    forecaster = Forecaster(crowd.config, crowd.table, crowd.shared, predictor)
    nobody = np.empty(0, dtype=np.intp)
    running = RunningRows(crowd.numbers, nobody, nobody, nobody.astype(np.int64), num_free_blocks=rows)
    newcomer = Newcomer(
        num_tokens=PROMPT_TOKENS,
        num_cached=0,
        num_needed=PROMPT_TOKENS // BLOCK_SIZE,
        held=np.empty(0, dtype=np.int32),
        stop_class=stop_class,
        arrival=rows,
        num_prompt_tokens=PROMPT_TOKENS,
        max_total_tokens=PROMPT_TOKENS + OUTPUT_TOKENS,
    )
    times_us: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        HeadProspect(lambda: forecaster.look(running), newcomer).least_free()
        times_us.append((time.perf_counter_ns() - start) / 1000)
    return round(float(np.median(times_us)), 1)


def shared_prefix_us(rows: int, num_steps: int) -> float:
    """Median µs per step for the shared prefixes of `rows` rows, of which some end and others begin in each step."""
    crowd = Crowd(rows)
    finder = GroupFinder(crowd.config, crowd.shared)
    churn = rows // OUTPUT_TOKENS
    all_held = np.ones(crowd.COMMON + crowd.PAIR, dtype=np.bool_)
    times_us: list[float] = []
    for step in range(num_steps):
        changed = [(step * churn + i) % rows for i in range(churn)]
        decodes = DecodeSet(crowd.numbers, crowd.table)  # as after any change of rows; not part of the cost
        leases = [(row, crowd.prefix_of(row), crowd.own_of(row)) for row in changed]
        start = time.perf_counter_ns()
        for row in changed:
            crowd.shared.leave(row)
        for row, prefix, own in leases:
            crowd.begin(row, prefix, all_held, own)
        found = finder.groups(decodes)
        times_us.append((time.perf_counter_ns() - start) / 1000)
        if found is None or len(found.groups) != 3 * rows // (2 * ROWS_PER_GROUP):
            raise RuntimeError("the groups were not found")
    return round(float(np.median(times_us)), 1)


def summary(times_us: list[float]) -> dict[str, float]:
    """Median, mean and 95th percentile."""
    array = np.array(times_us)
    figures = {"median": np.median(array), "mean": array.mean(), "p95": np.percentile(array, 95)}
    return {name: round(float(value), 1) for name, value in figures.items()}


def measure(rows: int, prompt_tokens: int, *, repeats: int, cached_pool: bool) -> dict[str, dict[str, float]]:
    """Figures over at least `repeats` rounds of requests; cached_pool: after a round that fills the pool with cached blocks."""
    core_us: list[float] = []
    total_us: list[float] = []
    for _ in range(repeats):
        bench = Bench(rows, prompt_tokens, OUTPUT_TOKENS)
        if cached_pool:
            bench.run()
        core, total = bench.run()
        core_us += core
        total_us += total
    return {"core_us": summary(core_us), "total_us": summary(total_us)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="running requests, comma separated")
    parser.add_argument("--quick", action="store_true", help="one round each")
    parser.add_argument("--json", type=Path, help="write the result there too")
    arguments = parser.parse_args()
    repeats = 1 if arguments.quick else 3
    report: dict[str, dict[str, object]] = {"rows": {}, "rows_cached_pool": {}, "context": {}}
    measure(8, PROMPT_TOKENS, repeats=1, cached_pool=False)  # warm caches and the allocator
    for rows in map(int, arguments.rows.split(",")):
        for name, cached_pool in (("rows", False), ("rows_cached_pool", True)):
            rounds = repeats if rows <= 1024 else 1
            figures = measure(rows, PROMPT_TOKENS, repeats=rounds, cached_pool=cached_pool)
            report[name][str(rows)] = figures
            print(f"{rows:>5} {name}: core µs {figures['core_us']}", file=sys.stderr)
    for context in CONTEXTS:
        figures = measure(CONTEXT_ROWS, context, repeats=repeats, cached_pool=False)
        report["context"][str(context)] = figures
        print(f"{CONTEXT_ROWS:>5} rows, context {context}: core µs {figures['core_us']}", file=sys.stderr)
    report["forecast_us"] = {str(rows): forecast_us(rows, 20 * repeats) for rows in FORECAST_ROWS}
    report["shared_prefix_us"] = {str(SHARED_PREFIX_ROWS): shared_prefix_us(SHARED_PREFIX_ROWS, 100 * repeats)}
    print(f"forecast µs {report['forecast_us']}, shared prefixes µs {report['shared_prefix_us']}", file=sys.stderr)
    publish(report, arguments.json)


if __name__ == "__main__":
    main()
