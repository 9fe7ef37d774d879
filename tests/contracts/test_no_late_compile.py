"""After ready nothing is compiled, whatever comes: every bucket's edges, steps that draw nothing, every sampling setting, samples,
logprobs of tokens and of prompts, mixed and pure batches, aborts. The counter that the tests look at is asked first whether it can count.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from toka.config import Config
from toka.engine.build import build_engine
from toka.engine.core import EngineCore
from toka.messages import FinishReason, Submit, pack_tokens
from toka.model_source import ModelSource
from toka.params import SamplingParams
from toka.runner.model_runner import ModelRunner
from toka.runner.step_buffers import Bucket

MAX_TOKENS, MAX_SEQS = 96, 12


class Driver:
    """An engine, fed and run until it is empty; keeps the buckets that its steps fell into."""

    def __init__(self, engine: EngineCore, runner: ModelRunner):
        self.engine, self.runner = engine, runner
        self.buckets: set[Bucket] = set()
        self._ids = itertools.count(1, 128)
        find = runner.bucket_for

        def bucket_for(num_tokens: int, num_samples: int) -> Bucket:
            found = find(num_tokens, num_samples)
            self.buckets.add(found)
            return found

        runner.bucket_for = bucket_for  # type: ignore[method-assign]

    def submit(self, num_prompt_tokens: int, **sampling: Any) -> int:
        """A request whose prompt is like no other's; returns its id."""
        request_id = next(self._ids)
        stop = sampling.pop("stop_token_ids", ())
        tokens = [2 + (request_id * 7 + i * i) % 300 for i in range(num_prompt_tokens)]
        self.engine.submit(
            Submit(
                request_id=request_id,
                prompt=pack_tokens(tokens),
                sampling=SamplingParams(**({"max_tokens": 2, "temperature": 0.0} | sampling)).check(),
                stop_token_ids=stop,
                seed=request_id,
                cache_salt=str(request_id),
            )
        )
        return request_id

    def finish(self) -> list[FinishReason]:
        """Run to the end; how the requests ended."""
        ends = []
        while self.engine.has_work:
            outputs = self.engine.step()
            if outputs is not None:
                ends += [FinishReason(each) for each in outputs.finish.tolist() if each]
        return ends


@pytest.fixture(scope="module")
def driver(random_checkpoint: Callable[[str], Path], cache_dir: Path) -> Iterator[Driver]:
    path = random_checkpoint("llama")
    config = Config(
        model=str(path),
        device="cpu",
        cache_dir=str(cache_dir),
        num_threads=2,
        max_tokens_per_forward=MAX_TOKENS,
        max_seqs_per_forward=MAX_SEQS,
        kv_cache_num_tokens=4096,
    )
    engine, _ = build_engine(config, ModelSource("hf_dir", path, path, path.name), quiet=True)
    yield Driver(engine, engine.executor._runner)  # type: ignore[attr-defined]
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    engine.shutdown()


@pytest.fixture(autouse=True)
def no_compile(driver: Driver) -> Iterator[None]:
    before = driver.engine.stats().compiles_after_ready_total
    yield
    assert driver.engine.stats().compiles_after_ready_total == before == 0


def edges(sizes: Sequence[int], limit: int) -> list[int]:
    """Each size, one less and one more."""
    return sorted({edge for size in sizes for edge in (size - 1, size, size + 1) if 1 <= edge <= limit})


def test_prompts_of_every_bucket_edge_and_longer_than_a_step(driver: Driver) -> None:
    lengths = [*edges(driver.runner.token_sizes, MAX_TOKENS + 1), 2 * MAX_TOKENS, 2 * MAX_TOKENS + 1]
    for length in lengths:
        driver.submit(length, max_tokens=1)
        assert driver.finish() == [FinishReason.LENGTH]
    assert {bucket.num_tokens for bucket in driver.buckets} == set(driver.runner.token_sizes)


def test_decode_batches_of_every_size(driver: Driver) -> None:
    for num_rows in range(1, MAX_SEQS + 1):
        for _ in range(num_rows):
            driver.submit(1, max_tokens=3)
        assert driver.finish() == [FinishReason.LENGTH] * num_rows
    assert {bucket.num_samples for bucket in driver.buckets} == set(driver.runner.sample_sizes)


@pytest.mark.parametrize("n", range(1, 9))
def test_samples_of_one_prompt(driver: Driver, n: int) -> None:
    driver.submit(20, n=n, temperature=1.0)
    assert len(driver.finish()) == n


SETTINGS = {
    "temperature": (0.0, 0.7, 100.0),
    "top_k": (0, 1, 40, 10_000),
    "top_p": (1.0, 0.5, 1e-6),
    "min_p": (0.0, 0.1, 1.0),
    "min_tokens": (0, 2),
}


def test_every_sampling_setting_with_every_other(driver: Driver) -> None:
    combinations = list(itertools.product(*SETTINGS.values()))
    for values in combinations:
        driver.submit(3, **dict(zip(SETTINGS, values, strict=True)), stop_token_ids=(5, 1))
    assert len(driver.finish()) == len(combinations)


def test_scored_prompts_of_every_length_up_to_more_than_a_step(driver: Driver) -> None:
    """Each step holds as many places of the prompt as it has samples, so these lengths meet every size, alone and beside decodes."""
    driver.buckets.clear()
    for length in edges(driver.runner.sample_sizes, 2 * MAX_SEQS + 1):
        for max_tokens in (0, 1, 3):
            driver.submit(length, max_tokens=max_tokens, prompt_logprobs=0, logprobs=20)
        assert driver.finish() == [FinishReason.LENGTH] * 3
        driver.submit(length, max_tokens=0, prompt_logprobs=20)
        assert driver.finish() == [FinishReason.LENGTH]
    assert {bucket.num_samples for bucket in driver.buckets} == set(driver.runner.sample_sizes)


@pytest.mark.parametrize("num_rows", range(1, MAX_SEQS + 1))
def test_logprobs_of_some_rows_or_all(driver: Driver, num_rows: int) -> None:
    for row in range(num_rows):
        driver.submit(1, max_tokens=3, logprobs=(None, 0, 20)[row % 3], temperature=float(row % 2))
        driver.submit(1, max_tokens=3, logprobs=5, n=2)
    assert len(driver.finish()) == 3 * num_rows


def test_prompts_among_decodes_and_aborts_at_any_point(driver: Driver) -> None:
    for length in edges(driver.runner.token_sizes[::3], MAX_TOKENS):
        running = [driver.submit(2, max_tokens=20, temperature=1.0) for _ in range(5)]
        for _ in range(3):
            driver.engine.step()
        running.append(driver.submit(length, max_tokens=4))
        driver.engine.step()
        driver.engine.abort(running[1:])
        driver.engine.step()
        driver.engine.abort(running)  # also those that are gone
        driver.finish()


def test_the_counter_counts(driver: Driver) -> None:
    """Last, since it spoils the counter: a compile anywhere in the process is seen."""
    counted = driver.engine.compiled.compiles_after_freeze
    torch.compile(lambda x: x + 1)(torch.ones(3))
    assert driver.engine.compiled.compiles_after_freeze > counted
    driver.engine.compiled.compiles_after_freeze = counted
