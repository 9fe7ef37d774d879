"""Greedy text equals that of Hugging Face transformers on the same weights, however the requests are batched, cut and cached."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from toka import LLM, SamplingParams
from toka.model_source import ModelSource
from toka.scheduler.scheduler import Scheduler

GREEDY = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
NUM_PROMPTS = 16


@pytest.fixture(scope="module")
def prompts(smollm2_llm: LLM, questions: list[str]) -> list[list[int]]:
    return [smollm2_llm.tokenizer.encode(f"Question: {question}\nAnswer:") for question in questions[:NUM_PROMPTS]]


def assert_all_greedy(reference, prompts, outputs, what) -> None:
    for prompt, output in zip(prompts, outputs, strict=True):
        assert len(output.completions[0].token_ids) == GREEDY.max_tokens
        reference.assert_greedy(prompt, output.completions[0].token_ids, what)


def test_alone_together_and_from_the_cache(
    smollm2_llm: LLM, smollm2_reference, prompts: list[list[int]], questions: list[str]
) -> None:
    alone = [smollm2_llm.generate(prompt, GREEDY, use_tqdm=False)[0] for prompt in prompts]
    assert all(output.num_cached_tokens == 0 for output in alone)
    assert_all_greedy(smollm2_reference, prompts, alone, "alone")
    fresh = [
        smollm2_llm.tokenizer.encode(f"Problem {i}: {question}\nSolution:")
        for i, question in enumerate(questions[:NUM_PROMPTS])
    ]
    together = smollm2_llm.generate(fresh, GREEDY, use_tqdm=False)
    assert all(output.num_cached_tokens == 0 for output in together)
    assert_all_greedy(smollm2_reference, fresh, together, "together")
    again = smollm2_llm.generate(prompts, GREEDY, use_tqdm=False)
    assert all(output.num_cached_tokens == (len(output.prompt_token_ids) - 1) // 16 * 16 for output in again)
    assert_all_greedy(smollm2_reference, prompts, again, "from the prefix cache")


def test_chunked_prefill_and_preemption(smollm2: ModelSource, smollm2_reference, prompts: list[list[int]]) -> None:
    flags = {
        "kv_cache_num_tokens": 1024,
        "max_tokens_per_forward": 48,
        "max_seqs_per_forward": 16,
        "quantize": "none",
        "quiet": True,
    }
    with LLM(str(smollm2.path), **flags) as llm:
        # The forecast knows better than to let all of them begin; without it they run out of blocks.
        unforeseen = dataclasses.replace(llm._engine.scheduler.config, admission="when_free")
        llm._engine.scheduler = Scheduler(unforeseen)
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert llm.stats().preemptions_total > 0
        assert llm.stats().num_free_blocks == llm.stats().num_blocks == 64
        assert llm.stats().compiles_after_ready_total == 0
    assert_all_greedy(smollm2_reference, prompts, outputs, "preempted")


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen2", "qwen3"])
def test_tiny_checkpoints(tiny_checkpoint: Callable[[str], tuple[Path, object]], family: str) -> None:
    directory, reference = tiny_checkpoint(family)
    prompts = [[(7 * i + 3 * j) % 250 + 2 for j in range(5 + 13 * i)] for i in range(6)]
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    with LLM(
        str(directory), kv_cache_num_tokens=512, max_tokens_per_forward=64, max_seqs_per_forward=8, quiet=True
    ) as llm:
        for what in ("first", "cached"):
            for prompt, output in zip(prompts, llm.generate(prompts, params, use_tqdm=False), strict=True):
                reference.assert_greedy(prompt, output.completions[0].token_ids, f"{family} {what}")
        assert llm.stats().compiles_after_ready_total == 0


def test_eager_runs_the_same_graph(tiny_checkpoint: Callable[[str], tuple[Path, object]]) -> None:
    directory, reference = tiny_checkpoint("llama3")
    prompt = list(range(10, 60))
    with LLM(
        str(directory), torch_compile=False, kv_cache_num_tokens=512, max_tokens_per_forward=64, quiet=True
    ) as llm:
        output = llm.generate(prompt, SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True), use_tqdm=False)[
            0
        ]
    reference.assert_greedy(prompt, output.completions[0].token_ids, "eager")
