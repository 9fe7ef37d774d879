"""Logprobs of generated tokens and of prompts, against transformers' log_softmax: chunked, cached, preempted, and beside others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from toka import LLM, SamplingParams
from toka.llm import RequestOutput
from toka.messages import TokenLogprob
from toka.scheduler.admission import AdmitWhenFree

CLOSE = 1e-4
MAX_TOKENS, MAX_SEQS = 40, 8  # a prompt of 100 tokens is scored in many steps, 8 places at most in each


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Callable[..., tuple[Path, object]]) -> tuple[Path, object]:
    return tiny_checkpoint("llama3")


@pytest.fixture(scope="module")
def llm(tiny: tuple[Path, object]) -> Iterator[LLM]:
    """So few blocks that requests of different lengths preempt each other."""
    flags = {"max_tokens_per_forward": MAX_TOKENS, "max_seqs_per_forward": MAX_SEQS, "kv_cache_num_tokens": 640}
    with LLM(str(tiny[0]), dtype="float32", num_threads=2, quiet=True, **flags) as llm:
        yield llm
        assert llm.stats().compiles_after_ready_total == 0
        assert llm.stats().num_free_blocks == llm.stats().num_blocks


def prompt_of(length: int, seed: int) -> list[int]:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(2, 258, (length,), generator=random).tolist()


class Expected:
    """The reference's logprobs of a whole sequence."""

    def __init__(self, tiny: tuple[Path, object], token_ids: list[int]):
        self._token_ids = token_ids
        self._logprobs = tiny[1].logits(token_ids).double().log_softmax(1)  # type: ignore[attr-defined]

    def check(self, entries: list[TokenLogprob], first: int, num_top: int) -> None:
        """entries: of the tokens from place `first` on."""
        for place, entry in enumerate(entries, first):
            row = self._logprobs[place - 1]
            assert entry.token_id == self._token_ids[place]
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=CLOSE)
            assert abs(entry.rank - 1 - int((row > row[entry.token_id]).sum())) <= 1
            best = row.topk(num_top).values.tolist()
            assert [value for _, value in entry.top] == pytest.approx(best, abs=CLOSE)
            assert all(value == pytest.approx(float(row[token]), abs=CLOSE) for token, value in entry.top)
            # A client tells by float equality whether the token was the likeliest.
            of_token = [value for token, value in entry.top if token == entry.token_id]
            assert of_token == ([entry.logprob] if entry.rank <= num_top else [])


def check(tiny: tuple[Path, object], output: RequestOutput, params: SamplingParams) -> None:
    prompt = output.prompt_token_ids
    for completion in output.completions:
        expected = Expected(tiny, [*prompt, *completion.token_ids])
        if params.logprobs is None:
            assert completion.logprobs is None
        else:
            assert completion.logprobs is not None and len(completion.logprobs) == len(completion.token_ids)
            expected.check(completion.logprobs, len(prompt), params.logprobs)
        if params.prompt_logprobs is None:
            assert output.prompt_logprobs is None
        else:
            assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(prompt)
            first, *entries = output.prompt_logprobs
            assert first is None
            expected.check(entries, 1, params.prompt_logprobs)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 40, 100])
def test_a_prompt_of_any_length_is_scored(tiny: tuple[Path, object], llm: LLM, length: int) -> None:
    for max_tokens in (0, 1, 4):
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, prompt_logprobs=2, logprobs=1, ignore_eos=True)
        [output] = llm.generate([prompt_of(length, length)], params, use_tqdm=False)
        assert len(output.completions[0].token_ids) == max_tokens
        assert output.completions[0].finish_reason == "length"
        check(tiny, output, params)


def test_settings_do_not_change_logprobs_and_the_likeliest_come_first(tiny: tuple[Path, object], llm: LLM) -> None:
    params = SamplingParams(
        max_tokens=12, min_tokens=12, temperature=1.7, top_k=7, top_p=0.9, min_p=0.01, seed=3, n=3, logprobs=20
    )
    [output] = llm.generate([prompt_of(20, 1)], params, use_tqdm=False)
    check(tiny, output, params)
    ranks = [entry.rank for each in output.completions for entry in each.logprobs or ()]
    assert max(ranks) > 1 and all(rank <= 7 for rank in ranks)


def test_a_warm_prefix_cache_changes_nothing(tiny: tuple[Path, object], llm: LLM) -> None:
    prompt = prompt_of(60, 2)
    params = SamplingParams(max_tokens=3, temperature=0.0, prompt_logprobs=3, logprobs=0)
    first, second = (llm.generate([prompt], params, use_tqdm=False)[0] for _ in range(2))
    assert second.num_cached_tokens == 0  # what is to be scored must be computed
    check(tiny, second, params)
    assert first.prompt_logprobs == second.prompt_logprobs
    plain = SamplingParams(max_tokens=3, temperature=0.0, logprobs=5)
    [cached] = llm.generate([prompt], plain, use_tqdm=False)
    assert cached.num_cached_tokens > 0
    check(tiny, cached, plain)


def test_many_at_once_with_preemption_lose_and_repeat_nothing(tiny: tuple[Path, object], llm: LLM) -> None:
    """Requests that ask for logprobs among some that do not; all together need far more blocks than there are."""
    asked: list[SamplingParams] = []
    for i in range(24):
        asked.append(
            SamplingParams(
                max_tokens=(0 if i % 6 == 0 else 60),
                temperature=0.7,
                seed=i,
                n=2 if i % 5 == 0 else 1,
                ignore_eos=True,
                logprobs=(None, 0, 4)[i % 3],
                prompt_logprobs=(None, 1, 20, 0)[i % 4],
            )
        )
    preempted = llm.stats().preemptions_total
    # Some prompts begin alike, so that the cache holds what others must score.
    prompts = [prompt_of(30, 7 + i % 3) + prompt_of(1 + 5 * (i % 11), i) for i in range(24)]
    scheduler = llm._engine.scheduler
    scheduler._admission = AdmitWhenFree(0)
    outputs = llm.generate(prompts, asked, use_tqdm=False)
    assert llm.stats().preemptions_total > preempted
    for output, params in zip(outputs, asked, strict=True):
        check(tiny, output, params)
