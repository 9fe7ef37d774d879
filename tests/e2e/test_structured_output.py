"""Structured output of a real engine: every completed output fits its grammar, whatever runs beside it and however it is cut into steps.

TOKA_TEST_SCHEMAS sets how many schemas are tried (benchmarks/json_schemas.py draws them), 200 by default.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from toka import LLM, SamplingParams
from toka.errors import RequestError
from toka.llm import Completion
from toka.params import StructuredOutput
from toka.scheduler.admission import AdmitWhenFree

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from json_schemas import Schemas

NUM_SCHEMAS = int(os.environ.get("TOKA_TEST_SCHEMAS", "200"))
VOCAB_SIZE, EOS_ID = 416, 1  # the tokenizer has fewer ids: no grammar allows the others


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with random weights, and a tokenizer whose tokens are pieces of JSON."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    directory = tmp_path_factory.mktemp("structured")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    records = [{"name": "alpha beta", "count": i, "items": [{"id": i, "value": "the quick fox"}]} for i in range(200)]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(json.dumps, records), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        eos_token_id=EOS_ID,
        bos_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0.0, 0.05)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    """Steps of few tokens, and blocks for a few long requests only."""
    flags = {"max_tokens_per_forward": 48, "max_seqs_per_forward": 16, "kv_cache_num_tokens": 4096}
    with LLM(str(checkpoint), dtype="float32", num_threads=1, quiet=True, **flags) as llm:
        yield llm
        assert llm.stats().compiles_after_ready_total == 0
        assert llm.stats().num_free_blocks == llm.stats().num_blocks
        assert not llm._engine.constraints._states  # type: ignore[union-attr]


def generate(llm: LLM, params: list[SamplingParams], prompt_tokens: int = 3) -> list[list[Completion]]:
    prompts = [[2 + (i + k) % 200 for k in range(prompt_tokens + i % 7)] for i in range(len(params))]
    return [output.completions for output in llm.generate(prompts, params, use_tqdm=False)]


def regex(pattern: str, **fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 60, "seed": 3, "structured": StructuredOutput("regex", pattern), **fields})


def test_every_completed_output_fits_its_schema(llm: LLM) -> None:
    """Beside unconstrained requests, with several samples, seeds, filters, logprobs, greedy ones among them."""
    schemas = [Schemas(seed).draw() for seed in range(NUM_SCHEMAS)]
    params = [
        SamplingParams(
            max_tokens=300,
            temperature=(0.0, 0.7, 1.0, 1.5)[i % 4],
            top_k=(0, 0, 20)[i % 3],
            top_p=(1.0, 0.9)[i % 2],
            n=2 if i % 10 == 0 else 1,
            seed=i,
            logprobs=1 if i % 9 == 0 else None,
            structured=StructuredOutput("json_schema", json.dumps(schema)),
        )
        for i, schema in enumerate(schemas)
    ]
    free = SamplingParams(max_tokens=30, ignore_eos=True)
    completions = generate(llm, [*params, *[free] * 20])
    assert all(len(each.token_ids) == 30 for [each] in completions[len(schemas) :])
    num_done = num_samples = 0
    for schema, samples in zip(schemas, completions, strict=False):
        for sample in samples:
            num_samples += 1
            if sample.finish_reason == "stop":
                num_done += 1
                check = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
                check.validate(json.loads(sample.text))
                assert sample.token_ids[-1] == EOS_ID
            else:
                assert sample.finish_reason == "length" and len(sample.token_ids) == 300
    assert num_done > 0.8 * num_samples, f"{num_done} of {num_samples}"


def test_any_json_object(llm: LLM) -> None:
    params = [
        SamplingParams(
            max_tokens=500, temperature=0.8, seed=i, structured=StructuredOutput("json_schema", '{"type": "object"}')
        )
        for i in range(20)
    ]
    texts = [each.text for [each] in generate(llm, params) if each.finish_reason == "stop"]
    assert len(texts) >= 10 and all(isinstance(json.loads(text), dict) for text in texts)


@pytest.mark.parametrize(
    "pattern", [r"[a-c]{3,9}", r"(foo|ba[rz]){1,5}!", r"\d{3}-\d{4}", "(日本|naïve 😀){2}", "x{40}", ".{1,9}", ""]
)
def test_regexes(llm: LLM, pattern: str) -> None:
    for [each] in generate(llm, [regex(pattern, temperature=t, seed=s) for t in (0.0, 1.0) for s in range(4)]):
        assert each.finish_reason == "stop" and re.fullmatch(pattern, each.text), each.text


def test_choices_and_grammars(llm: LLM) -> None:
    choice = StructuredOutput("lark", 'start: "yes" | "no \\"indeed\\"" | "日本"')
    nested = StructuredOutput("lark", 'start: "(" [start] ")"')
    params = [SamplingParams(max_tokens=60, seed=i, structured=(choice, nested)[i % 2]) for i in range(24)]
    texts = [each.text for [each] in generate(llm, params) if each.finish_reason == "stop"]
    assert set(texts[::2]) <= {"yes", 'no "indeed"', "日本"} | set(texts[1::2]) and len(set(texts)) > 2
    assert all(
        text in ("yes", 'no "indeed"', "日本") or text == "(" * (len(text) // 2) + ")" * (len(text) // 2)
        for text in texts
    )


def test_forced_text_is_computed_in_few_steps_and_counts_as_generated(llm: LLM) -> None:
    """Where logprobs are wanted every token is drawn; the text is the same."""
    text = '{"name": "alpha beta", "count": 12345678, "items": []}'
    pattern = re.escape(text) + "(a|b)"
    before = llm.stats()
    [[jumped]] = generate(llm, [regex(pattern)])
    between = llm.stats()
    [[drawn]] = generate(llm, [regex(pattern, logprobs=0)])
    after = llm.stats()
    assert jumped.text == drawn.text and jumped.text[:-1] == text and jumped.token_ids == drawn.token_ids
    assert between.generation_tokens_total - before.generation_tokens_total == len(jumped.token_ids) > 15
    assert between.num_steps_total - before.num_steps_total <= 8
    assert after.num_steps_total - between.num_steps_total >= len(drawn.token_ids)
    assert drawn.logprobs is not None and len(drawn.logprobs) == len(drawn.token_ids)


def test_logprobs_are_those_of_the_distribution_without_the_mask(llm: LLM) -> None:
    free = SamplingParams(max_tokens=1, temperature=0.0, logprobs=20)
    [[unmasked], [masked]] = [generate(llm, [each])[0] for each in (free, regex("[q-z]", logprobs=20, temperature=0.0))]
    assert unmasked.logprobs is not None and masked.logprobs is not None
    assert masked.text[0] in "qrstuvwxyz" and masked.logprobs[0].rank > 1
    assert masked.logprobs[0].top == unmasked.logprobs[0].top


def test_the_end(llm: LLM) -> None:
    """min_tokens and ignore_eos go on as long as the grammar lets them, a stop string and max_tokens end in the midst of it."""
    [[least]] = generate(llm, [regex("a*", min_tokens=9, max_tokens=500)])
    assert least.finish_reason == "stop" and len(least.token_ids) > 9
    [[over]] = generate(llm, [regex("ab", min_tokens=9)])
    assert (over.text, over.finish_reason) == ("ab", "stop")
    [[long]] = generate(llm, [regex("a*", ignore_eos=True)])
    assert long.finish_reason == "length" and len(long.token_ids) == 60 and set(long.text) == {"a"}
    [[whole]] = generate(llm, [regex("a{1,20}b", ignore_eos=True)])
    assert whole.finish_reason == "stop" and re.fullmatch("a{1,20}b", whole.text)
    [[cut]] = generate(llm, [regex("abcdefgh[xyz]{30}", stop=("fg",))])
    assert (cut.text, cut.finish_reason) == ("abcde", "stop")
    [[short]] = generate(llm, [regex("[a-z]{500}", max_tokens=7)])
    assert short.finish_reason == "length" and len(short.token_ids) == 7
    [[stopped]] = generate(
        llm, [regex("[0-9]{50}", stop_token_ids=tuple(llm.tokenizer.encode(d)[0] for d in "0123456789"))]
    )
    assert stopped.finish_reason == "stop" and len(stopped.text) < 50


def test_the_company_does_not_change_a_seeded_output(llm: LLM) -> None:
    """Alone, beside many, preempted, and with prompts in several chunks; forced tokens among them."""
    schema = json.dumps(
        {
            "type": "object",
            "properties": {"the long name": {"enum": ["alpha beta gamma", "alpha delta"]}, "n": {"type": "integer"}},
            "required": ["the long name", "n"],
            "additionalProperties": False,
        }
    )
    grammar = StructuredOutput("json_schema", schema)
    params = [SamplingParams(max_tokens=150, seed=i, temperature=0.9, structured=grammar) for i in range(12)]
    prompts = [[2 + (7 * i + k) % 300 for k in range(100)] for i in range(len(params))]
    alone = [llm.generate([prompt], each, use_tqdm=False)[0] for prompt, each in zip(prompts, params, strict=True)]
    scheduler = llm._engine.scheduler
    usual, scheduler._admission = scheduler._admission, AdmitWhenFree(0)
    hogs = [SamplingParams(max_tokens=350, ignore_eos=True, seed=i) for i in range(12)]
    before = llm.stats().preemptions_total
    try:
        together = llm.generate(
            [each for i, prompt in enumerate(prompts) for each in ([5 + i] * 30, prompt)],
            [each for pair in zip(hogs, params, strict=True) for each in pair],
            use_tqdm=False,
        )[1::2]
    finally:
        scheduler._admission = usual
    assert llm.stats().preemptions_total > before
    assert [each.completions[0].token_ids for each in together] == [each.completions[0].token_ids for each in alone]


def test_an_aborted_request_leaves_nothing(llm: LLM) -> None:
    from toka.llm import _Run

    run = _Run(llm)
    run.submit([1, 2, 3], regex("[a-z]{400}", max_tokens=500, n=3))
    for _ in range(5):
        llm._engine.step()
    run.abort()
    assert not llm._engine.has_work


@pytest.mark.parametrize(
    ("kind", "source"),
    [("regex", "(a"), ("json_schema", "{"), ("json_schema", '{"type": "x"}'), ("lark", "start: e\ne: e")],
)
def test_a_wrong_grammar_is_refused_and_nothing_runs(llm: LLM, kind: Any, source: str) -> None:
    with pytest.raises(RequestError, match="not valid"):
        llm.generate(["a"], SamplingParams(structured=StructuredOutput(kind, source)), use_tqdm=False)
    assert not llm._engine.has_work


def test_a_text_that_its_grammar_cannot_follow_ends_in_an_error(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here since following it takes too long; nobody else is touched."""
    with monkeypatch.context() as patch:
        patch.setattr("toka.engine.constraints.MAX_TAKE_S", -1.0)
        [[failed], [free]] = generate(llm, [regex("[a-z]{9}"), SamplingParams(max_tokens=5, ignore_eos=True)])
    assert failed.finish_reason == "error" and (free.finish_reason, len(free.token_ids)) == ("length", 5)
    [[again]] = generate(llm, [regex("[a-z]{9}")])
    assert again.finish_reason == "stop"
