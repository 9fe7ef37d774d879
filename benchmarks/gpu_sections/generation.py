"""The engine from submit to last token: batches of equal requests, and many samples of a few prompts (the Monkeys workload)."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gpu_sections.built_engine import BuiltEngine
from gpu_sections.measure import Deadline
from gpu_sections.shapes import Shape
from toka.engine.core import EngineCore
from toka.messages import Submit, pack_tokens
from toka.params import SamplingParams

SAMPLES_PER_SUBMIT = 8
TEMPERATURE = 0.6  # of "Large Language Monkeys"

_request_ids = itertools.count(1, 1000)


class Timed:
    """Passes everything on to an object and adds up the seconds that some of its methods take."""

    def __init__(self, inner: Any, *methods: str):
        self._inner = inner
        self.seconds = dict.fromkeys(methods, 0.0)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return self._timed(name, found) if name in self.seconds else found

    def _timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*arguments)
            finally:
                self.seconds[name] += time.perf_counter() - began

        return call


def measure(built: BuiltEngine, shape: Shape, deadline: Deadline) -> Iterator[tuple[str, Any]]:
    """Yields, for each batch, what `transformers_peer` measures too, and the host's time per step."""
    random = np.random.default_rng(0)
    for batch, prompt_len, num_tokens in shape.generate:
        best: dict[str, float] = {}
        for _ in range(3):
            prompts = random.integers(2, built.ready.vocab_size, (batch, prompt_len), dtype=np.int32)
            run = run_batch(built.core, prompts, num_tokens)
            if run["tokens_per_s"] > best.get("tokens_per_s", 0.0):
                best = run
            if deadline.is_over:
                break
        yield f"batch_{batch}", best


def run_batch(core: EngineCore, prompts: np.ndarray, num_tokens: int) -> dict[str, float]:
    """Generate num_tokens greedily from each of the prompts [B, P]."""
    scheduler, executor = Timed(core.scheduler, "next_plan", "commit"), Timed(core.executor, "launch", "wait")
    timed = dataclasses.replace(core, scheduler=scheduler, executor=executor)  # type: ignore[arg-type]
    before = core.stats()
    began, cpu_began = time.perf_counter(), time.process_time()
    for prompt in prompts:
        submit(timed, prompt, num_tokens, num_samples=1, temperature=0.0)
    first_token_s, num_generated = 0.0, 0
    while timed.has_work:
        outputs = timed.step()
        num_generated += 0 if outputs is None else int((outputs.token_ids >= 0).sum())
        if not first_token_s and num_generated:
            first_token_s = time.perf_counter() - began
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    if num_generated != len(prompts) * num_tokens:
        raise AssertionError(f"{num_generated} tokens came of {len(prompts)} requests for {num_tokens}")
    num_steps = core.stats().num_steps_total - before.num_steps_total
    return {
        "tokens_per_s": num_generated / seconds,
        "seconds": seconds,
        "first_token_s": first_token_s,
        "steps": num_steps,
        "step_ms": seconds / num_steps * 1e3,
        "cpu_ms_per_step": cpu_seconds / num_steps * 1e3,  # of all threads; waiting in a spin counts
        **{
            f"{name}_us_per_step": total / num_steps * 1e6
            for name, total in (scheduler.seconds | executor.seconds).items()
        },
    }


def measure_monkeys(built: BuiltEngine, shape: Shape, deadline: Deadline) -> Iterator[tuple[str, Any]]:
    """Many samples of each of a few problems, after examples that all share; yields tokens per second and what was shared.

    Random weights never stop, so each group of samples gets a length of its own.
    """
    problems, num_samples, shared_len, question_len, shortest, longest = shape.monkeys
    random = np.random.default_rng(1)
    core = built.core
    shared = random.integers(2, built.ready.vocab_size, shared_len, dtype=np.int32)
    per_submit = min(SAMPLES_PER_SUBMIT, num_samples)
    before = core.stats()
    began = time.perf_counter()
    request_ids: list[int] = []
    for _ in range(problems):
        question = random.integers(2, built.ready.vocab_size, question_len, dtype=np.int32)
        for _ in range(num_samples // per_submit):
            num_tokens = int(random.integers(shortest, longest + 1))
            request_ids += submit(core, np.concatenate([shared, question]), num_tokens, per_submit, TEMPERATURE)
    num_generated = 0
    while core.has_work and not deadline.is_over:
        outputs = core.step()
        num_generated += 0 if outputs is None else int((outputs.token_ids >= 0).sum())
    seconds = time.perf_counter() - began
    was_cut = core.has_work
    after = core.stats()
    core.abort(request_ids)  # those that are over are passed by
    while core.has_work:
        core.step()
    prompt_tokens = after.prompt_tokens_total - before.prompt_tokens_total
    cached_tokens = after.cached_prompt_tokens_total - before.cached_prompt_tokens_total
    num_steps = after.num_steps_total - before.num_steps_total
    yield (
        "run",
        {
            "tokens_per_s": num_generated / seconds,
            "seconds": seconds,
            "problems": problems,
            "samples": len(request_ids),
            "generated_tokens": num_generated,
            "steps": num_steps,
            "step_ms": seconds / num_steps * 1e3,
            "tokens_per_step": num_generated / num_steps,
            "cached_share_of_prompts": cached_tokens / max(prompt_tokens, 1),
            "preemptions": after.preemptions_total - before.preemptions_total,
            "was_cut": was_cut,
        },
    )


def submit(core: EngineCore, prompt: np.ndarray, num_tokens: int, num_samples: int, temperature: float) -> list[int]:
    """Ask for samples of exactly num_tokens tokens; returns their ids."""
    first_id = next(_request_ids)
    sampling = SamplingParams(n=num_samples, max_tokens=num_tokens, temperature=temperature, ignore_eos=True)
    core.submit(
        Submit(request_id=first_id, prompt=pack_tokens(prompt), sampling=sampling, stop_token_ids=(), seed=first_id)
    )
    return list(range(first_id, first_id + num_samples))
