"""Logits of every family, rope type, bias and head equal those of transformers: in one prefill, in chunks, and decoding."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 1e4, **parameters}}


CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama-no-gqa": LlamaConfig(**SIZES | {"num_key_value_heads": 6}),
    "llama-head-dim": LlamaConfig(**SIZES, head_dim=32),
    "llama-gelu": LlamaConfig(**SIZES, hidden_act="gelu"),
    "llama-gelu-tanh": LlamaConfig(**SIZES, hidden_act="gelu_pytorch_tanh"),
    "llama-relu": LlamaConfig(**SIZES, hidden_act="relu"),
    "llama-linear": LlamaConfig(**SIZES, **rope(rope_type="linear", factor=4.0)),
    "llama-dynamic": LlamaConfig(**SIZES, **rope(rope_type="dynamic", factor=4.0)),
    "llama-llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "llama-yarn": LlamaConfig(**SIZES, rope_parameters=YARN_ROPE),
    "llama-yarn-untruncated": LlamaConfig(
        **SIZES, rope_parameters=YARN_ROPE | {"truncate": False, "beta_fast": 8, "beta_slow": 2}
    ),
    "llama-yarn-mscale": LlamaConfig(**SIZES, rope_parameters=YARN_ROPE | {"mscale": 0.7, "mscale_all_dim": 1.1}),
    "llama-yarn-attention-factor": LlamaConfig(**SIZES, rope_parameters=YARN_ROPE | {"attention_factor": 1.3}),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral-sliding": MistralConfig(**SIZES, sliding_window=7),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2-tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2-sliding": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen2-yarn": Qwen2Config(**SIZES, rope_parameters=YARN_ROPE),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "qwen3-tied-biases": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True, attention_bias=True),
}
TOLERANCE = 1e-4


@dataclass
class Pair:
    """One checkpoint in both implementations, and the directory that holds it."""

    reference: Any
    ours: Any
    directory: Any


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory, load_model, randomise):
    directory = tmp_path_factory.mktemp(request.param)
    reference = AutoModelForCausalLM.from_config(CONFIGS[request.param], attn_implementation="eager").eval()
    randomise(reference)
    reference.save_pretrained(directory)
    return Pair(reference, load_model(directory, json.loads((directory / "config.json").read_text())), directory)


def tokens(seed: int, count: int) -> torch.Tensor:
    return torch.randint(97, (count,), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def reference_logits(reference: Any, token_ids: torch.Tensor) -> torch.Tensor:
    return reference(token_ids[None]).logits[0]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.abs().max() > 1  # else the tolerance would say nothing
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def test_prefill_in_one_step(pair, paged_run):
    ids = tokens(1, 45)
    [logits] = paged_run(pair.ours).step([(0, ids)])
    assert_close(logits, reference_logits(pair.reference, ids))


def test_chunked_prefill_and_decode_beside_other_rows(pair, paged_run):
    """Two requests whose steps are cut differently, in steps with padding; neither sees the other."""
    first, second = tokens(2, 40), tokens(3, 23)
    run = paged_run(pair.ours)
    found_first = [run.step([(2, first[:9])], num_padded_tokens=3)[0]]
    found_second = []
    for pieces in ([9, 25, 0, 11], [25, 26, 11, 17], [26, 27, 17, 18], [27, 40, 18, 23]):
        a, b, c, d = pieces
        logits_first, logits_second = run.step([(2, first[a:b]), (0, second[c:d])], num_padded_tokens=2)
        found_first.append(logits_first)
        found_second.append(logits_second)
    assert_close(torch.cat(found_first), reference_logits(pair.reference, first))
    assert_close(torch.cat(found_second), reference_logits(pair.reference, second))


def test_older_rope_fields_mean_the_same(pair, load_model, paged_run):
    """`rope_scaling` beside `rope_theta`, as transformers 4 wrote them."""
    config = json.loads((pair.directory / "config.json").read_text())
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    config["rope_scaling"] = {"type": parameters.pop("rope_type"), **parameters}
    ids = tokens(4, 30)
    [logits] = paged_run(load_model(pair.directory, config)).step([(1, ids)])
    [expected] = paged_run(pair.ours).step([(1, ids)])
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


@torch.inference_mode()
def test_dynamic_rope_beyond_the_trained_context_is_that_of_token_by_token(tmp_path, load_model, paged_run, randomise):
    config = LlamaConfig(**SIZES | {"max_position_embeddings": 16}, **rope(rope_type="dynamic", factor=4.0))
    reference = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(reference)
    reference.save_pretrained(tmp_path)
    ids, cache, expected = tokens(5, 48), None, []
    for token in ids:
        output = reference(token[None, None], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        expected.append(output.logits[0])
    run = paged_run(load_model(tmp_path, json.loads((tmp_path / "config.json").read_text())))
    found = [run.step([(0, ids[:33])])[0], run.step([(0, ids[33:])])[0]]
    assert_close(torch.cat(found), torch.cat(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama-llama3", "qwen2", "qwen3"])
def test_half_precision_errs_no_more_than_transformers(name, dtype, tmp_path, load_model, paged_run, randomise):
    reference = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager").eval()
    randomise(reference)
    reference.save_pretrained(tmp_path)
    ids = tokens(6, 40)
    exact = reference_logits(reference, ids)
    theirs = reference_logits(reference.to(dtype), ids)
    [ours] = paged_run(load_model(tmp_path, json.loads((tmp_path / "config.json").read_text()), dtype)).step([(0, ids)])
    assert ours.dtype is dtype
    their_error = (theirs.float() - exact).square().mean().sqrt()
    our_error = (ours.float() - exact).square().mean().sqrt()
    assert their_error > 0
    assert our_error < 1.5 * their_error
