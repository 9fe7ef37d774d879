"""Penalties, biases and bad words: what is drawn is what they make of the reference's logits, whatever runs beside it."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest
import torch

from toka import LLM, SamplingParams
from toka.model_source import ModelSource
from toka.scheduler.scheduler import Scheduler

TIE = 1e-3  # adjusted logits of the reference closer than this count as equal
GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)


def _with(**settings: object) -> SamplingParams:
    return msgspec.structs.replace(GREEDY, **settings)


def _adjusted(logits: torch.Tensor, tokens: list[int], num_prompt: int, sampling: SamplingParams) -> torch.Tensor:
    """The definition, on the logits of the token that follows these."""
    adjusted, generated = logits.clone(), tokens[num_prompt:]
    for token in set(tokens):
        by = sampling.repetition_penalty
        adjusted[token] = adjusted[token] / by if adjusted[token] > 0 else adjusted[token] * by
    for token in set(generated):
        adjusted[token] -= sampling.frequency_penalty * generated.count(token) + sampling.presence_penalty
    for token, bias in sampling.logit_bias:
        adjusted[token] += bias
    for *before, last in sampling.bad_words:
        if before == tokens[len(tokens) - len(before) :]:
            adjusted[last] = float("-inf")
    return adjusted


def _assert_greedy(reference, prompt: list[int], generated: list[int], sampling: SamplingParams) -> None:
    logits = reference.logits(prompt + generated)
    for i, token in enumerate(generated):
        before = prompt + generated[:i]
        adjusted = _adjusted(logits[len(before) - 1], before, len(prompt), sampling)
        assert float(adjusted.max() - adjusted[token]) <= TIE, f"token {i} is not the likeliest"


@pytest.fixture(scope="module")
def prompts(smollm2_llm: LLM, questions: list[str]) -> list[list[int]]:
    return [smollm2_llm.tokenizer.encode(f"Question: {question}\nAnswer:") for question in questions[:6]]


@pytest.fixture(scope="module")
def settings(smollm2_llm: LLM, prompts: list[list[int]]) -> list[SamplingParams]:
    """One for each prompt; the last one asks for nothing. Bad words are such as would come."""
    plain = smollm2_llm.generate(prompts, GREEDY, use_tqdm=False)
    said = [output.completions[0].token_ids for output in plain]
    return [
        _with(frequency_penalty=1.5),
        _with(presence_penalty=2.0, repetition_penalty=1.2),
        _with(repetition_penalty=1.3),
        _with(bad_words=((said[3][0],), tuple(said[3][4:6]), tuple(said[3][7:10]))),
        _with(logit_bias=((said[4][0], -100.0), (said[4][1], 3.0), (1234, 2.0)), frequency_penalty=-0.5),
        GREEDY,
    ]


def _texts(outputs) -> list[list[int]]:
    return [output.completions[0].token_ids for output in outputs]


def test_each_is_what_the_definition_says(
    smollm2_llm: LLM, smollm2_reference, prompts: list[list[int]], settings: list[SamplingParams]
) -> None:
    """Together, alone, and with the prompt in the prefix cache."""
    together = _texts(smollm2_llm.generate(prompts, settings, use_tqdm=False))
    plain = _texts(smollm2_llm.generate(prompts, GREEDY, use_tqdm=False))
    for prompt, tokens, without, sampling in zip(prompts, together, plain, settings, strict=True):
        _assert_greedy(smollm2_reference, prompt, tokens, sampling)
        assert (tokens == without) is (sampling == GREEDY)
        [again] = smollm2_llm.generate(prompt, sampling, use_tqdm=False)
        assert again.num_cached_tokens > 0 and again.completions[0].token_ids == tokens


def test_samples_of_one_prompt_count_for_themselves(smollm2_llm: LLM, prompts: list[list[int]]) -> None:
    sampling = _with(temperature=1.0, frequency_penalty=2.0, n=4, seed=5)
    [output] = smollm2_llm.generate(prompts[0], sampling, use_tqdm=False)
    texts = [completion.token_ids for completion in output.completions]
    assert len({tuple(text) for text in texts}) == 4
    for number, text in enumerate(texts):
        alone = msgspec.structs.replace(sampling, n=1, seed=5 + number)
        [again] = smollm2_llm.generate(prompts[0], alone, use_tqdm=False)
        assert again.completions[0].token_ids == text


def test_logprobs_are_the_models_own(
    smollm2_llm: LLM, smollm2_reference, prompts: list[list[int]], settings: list[SamplingParams]
) -> None:
    sampling = msgspec.structs.replace(settings[3], logprobs=2)
    [output] = smollm2_llm.generate(prompts[3], sampling, use_tqdm=False)
    tokens = output.completions[0].token_ids
    expected = smollm2_reference.logits(prompts[3] + tokens)[len(prompts[3]) - 1 : -1].log_softmax(1)
    entries = output.completions[0].logprobs
    for token, entry, logprobs in zip(tokens, entries, expected, strict=True):
        assert entry.logprob == pytest.approx(float(logprobs[token]), abs=2e-3)
    assert entries[0].rank > 1  # the likeliest is a bad word


def test_preempted_requests_go_on_as_if_nothing_had_happened(
    smollm2: ModelSource, smollm2_llm: LLM, smollm2_reference, prompts: list[list[int]], settings: list[SamplingParams]
) -> None:
    flags = {
        "kv_cache_num_tokens": 512,
        "max_tokens_per_forward": 48,
        "max_seqs_per_forward": 8,
        "quantize": "none",
        "quiet": True,
    }
    with LLM(str(smollm2.path), scheduling_steps_ahead=3, **flags) as llm:
        unforeseen = dataclasses.replace(llm._engine.scheduler.config, admission="when_free")
        llm._engine.scheduler = Scheduler(unforeseen)
        outputs = llm.generate(prompts, settings, use_tqdm=False)
        assert llm.stats().preemptions_total > 0 and llm.stats().compiles_after_ready_total == 0
    for prompt, tokens, sampling in zip(prompts, _texts(outputs), settings, strict=True):
        _assert_greedy(smollm2_reference, prompt, tokens, sampling)
