"""The engine on a GPU: transformers' greedy tokens, the same tokens with and without captured graphs, and the memory that was foretold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from toka.config import Config
from toka.engine.build import build_engine
from toka.engine.core import EngineCore
from toka.messages import Ready, Submit, TokenLogprob, pack_tokens
from toka.model_source import ModelSource
from toka.params import SamplingParams

pytestmark = pytest.mark.gpu

TIE = 1e-3  # two logits of the reference closer than this count as equal
NUM_TOKENS = 40
PROMPTS = [[(7 * i + 3 * j) % 250 + 2 for j in range(5 + 13 * i)] for i in range(6)]
MAX_ERROR = 0.05  # of the foretold activations, relative to the measured peak


@pytest.fixture(scope="module")
def reference(device: str) -> Iterator[Any]:
    """A tiny random Llama of transformers, in float32 on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=320,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=1,
        bos_token_id=0,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.3 if parameter.ndim == 1 else 0.12)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield model.to(device)
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(scope="module")
def checkpoint(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    directory = tmp_path_factory.mktemp("tiny-llama")
    reference.save_pretrained(directory)
    return ModelSource("hf_dir", directory, directory, directory.name)


@contextmanager
def engine_of(
    checkpoint: ModelSource, device: str, cache_dir: Path, **flags: Any
) -> Iterator[tuple[EngineCore, Ready]]:
    chosen = {
        "model": str(checkpoint.path),
        "device": device,
        "dtype": "float32",
        "cache_dir": str(cache_dir),
        "kv_cache_num_tokens": 1024,
        "max_tokens_per_forward": 64,
        "max_seqs_per_forward": 8,
    }
    core, ready = build_engine(Config(**(chosen | flags)).check(), checkpoint, quiet=True)
    try:
        yield core, ready
        stats = core.stats()
        assert stats.compiles_after_ready_total == 0
        assert stats.num_free_blocks == stats.num_blocks
    finally:
        core.shutdown()


def generate(core: EngineCore, prompts: list[list[int]], temperature: float = 0.0) -> list[list[int]]:
    """NUM_TOKENS tokens after each prompt, all prompts together."""
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=temperature, top_k=20, ignore_eos=True)
    first_id = core.stats().generation_tokens_total + 1
    generated: dict[int, list[int]] = {first_id + i: [] for i in range(len(prompts))}
    for request_id, prompt in zip(generated, prompts, strict=True):
        core.submit(
            Submit(
                request_id=request_id, prompt=pack_tokens(prompt), sampling=sampling, stop_token_ids=(), seed=request_id
            )
        )
    while core.has_work:
        outputs = core.step()
        if outputs is not None:
            for request_id, token in zip(outputs.request_ids.tolist(), outputs.token_ids.tolist(), strict=True):
                generated[request_id].append(token)
    return list(generated.values())


@torch.inference_mode()
def assert_greedy(reference: Any, prompt: list[int], generated: list[int]) -> None:
    """Each token is the likeliest after all before it, or within TIE of it."""
    ids = torch.tensor([prompt + generated], device=reference.device)
    logits = reference(ids).logits[0, len(prompt) - 1 : -1].float()
    chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
    assert float((logits.max(dim=1).values - chosen).max()) <= TIE


def test_greedy_tokens_are_those_of_transformers(
    device: str, reference: Any, checkpoint: ModelSource, cache_dir: Path
) -> None:
    """All prompts together in chunked prefills, then again from the prefix cache."""
    with engine_of(checkpoint, device, cache_dir) as (core, _):
        for _ in range(2):
            for prompt, generated in zip(PROMPTS, generate(core, PROMPTS), strict=True):
                assert len(generated) == NUM_TOKENS
                assert_greedy(reference, prompt, generated)
        assert core.stats().cached_prompt_tokens_total > 0


def test_attention_by_groups_draws_greedy_tokens_too(
    device: str, reference: Any, checkpoint: ModelSource, cache_dir: Path
) -> None:
    """128 tokens that all prompts begin with, 64 more that half of them share, and one of their own; in captured steps."""
    text = [(11 * i) % 250 + 2 for i in range(256)]
    prompts = [text[:128] + text[64 * (i % 2) :][:64] + [5 + i] for i in range(6)]
    flags = {"use_hydragen": True, "hydragen_min_group_size": 2, "hydragen_min_prefix_len": 64}
    with engine_of(checkpoint, device, cache_dir, **flags) as (core, _):
        for _ in range(2):
            for prompt, generated in zip(prompts, generate(core, prompts), strict=True):
                assert_greedy(reference, prompt, generated)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_captured_steps_draw_what_eager_steps_draw(
    device: str, checkpoint: ModelSource, cache_dir: Path, dtype: str
) -> None:
    drawn = []
    for use_cudagraphs in (True, False):
        with engine_of(checkpoint, device, cache_dir, dtype=dtype, use_cudagraphs=use_cudagraphs) as (core, _):
            drawn.append([generate(core, PROMPTS), generate(core, PROMPTS[::-1], temperature=0.8)])
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("use_cudagraphs", [True, False])
def test_logprobs_are_those_of_transformers(
    device: str, reference: Any, checkpoint: ModelSource, cache_dir: Path, use_cudagraphs: bool
) -> None:
    """Of prompts and of generated tokens, behind captured steps of many sizes and beside requests that ask for none."""
    with engine_of(checkpoint, device, cache_dir, use_cudagraphs=use_cudagraphs) as (core, _):
        asks = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True, logprobs=3, prompt_logprobs=3)
        plain = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
        for i, prompt in enumerate(PROMPTS):
            for request_id, sampling in ((i + 1, asks), (i + 101, plain)):
                submit = Submit(
                    request_id=request_id, prompt=pack_tokens(prompt), sampling=sampling, stop_token_ids=(), seed=1
                )
                core.submit(submit)
        found: dict[int, list[TokenLogprob]] = {i + 1: [] for i in range(len(PROMPTS))}
        while core.has_work:
            outputs = core.step()
            for scored in (outputs.prompt_scores, outputs.scores) if outputs is not None else ():
                for request_id, entry in scored.pack().entries() if scored is not None else ():
                    found[request_id].append(entry)
    for prompt, entries in zip(PROMPTS, found.values(), strict=True):
        tokens = prompt[:1] + [entry.token_id for entry in entries]
        assert tokens[: len(prompt)] == prompt and len(tokens) == len(prompt) + 9
        with torch.inference_mode():
            expected = reference(torch.tensor([tokens], device=device)).logits[0].double().log_softmax(-1).cpu()
        for row, entry in zip(expected, entries, strict=False):
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-3)
            assert [value for _, value in entry.top[:3]] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)


@pytest.mark.parametrize("sizes", [(64, 8), (512, 16), (2048, 64)], ids=str)
def test_the_memory_plan_is_what_the_warmup_measures(
    device: str, checkpoint: ModelSource, cache_dir: Path, sizes: tuple[int, int]
) -> None:
    from toka.devices import PlanFlags
    from toka.warmup.plan import make_plan

    flags = {"max_tokens_per_forward": sizes[0], "max_seqs_per_forward": sizes[1]}
    planned = make_plan(
        PlanFlags(
            model=str(checkpoint.path),
            device=device,
            dtype="float32",
            cache_dir=str(cache_dir),
            kv_cache_num_tokens=1024,
            **flags,
        )
    ).table
    with engine_of(checkpoint, device, cache_dir, **flags) as (_, ready):
        measured: Any = ready.report["memory"]
    assert planned.weights == measured["weights"]
    assert planned.tables == measured["tables"]
    assert planned.kv_cache == measured["kv_cache"]
    assert planned.activations == pytest.approx(measured["activations"], rel=MAX_ERROR)
