"""GGUF metadata in the terms of config.json: translated, known to be neutral, or refused by name."""

import math

import numpy as np
import pytest

from toka.errors import ConfigError
from toka.gguf_config import to_hf_config
from toka.gguf_file import GgufFile
from toka.models.spec import read_spec

EMBEDDING = {"token_embd.weight": np.zeros((10, 256))}


@pytest.fixture
def translate(tmp_path, write_gguf):
    def run(arch="llama", settings=None, tensors=None, metadata=None):
        path = write_gguf(tmp_path / "model.gguf", EMBEDDING | (tensors or {}), arch, settings, metadata)
        return to_hf_config(GgufFile.open(path))

    return run


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_translates_the_sizes(translate, arch):
    config = translate(arch, {"attention.key_length": 64, "attention.value_length": 64})
    spec = read_spec(config)
    assert (spec.model_type, spec.vocab_size, spec.hidden_size, spec.intermediate_size) == (arch, 10, 256, 512)
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (2, 8, 2, 64)
    assert (spec.max_context_tokens, spec.rope.theta, spec.tied_head) == (64, 500.0, True)
    assert spec.norm_eps == pytest.approx(1e-5)


def test_the_default_model(default_model):
    spec = read_spec(to_hf_config(GgufFile.open(default_model.path)))
    assert (spec.model_type, spec.num_layers, spec.hidden_size, spec.vocab_size) == ("llama", 30, 576, 49152)
    assert (spec.rope.theta, spec.max_context_tokens, spec.eos_token_ids) == (1e5, 8192, (2,))


def test_head_count_kv_and_head_dim_may_be_absent(translate):
    spec = read_spec(translate(settings={"attention.head_count_kv": None}))
    assert (spec.num_kv_heads, spec.head_dim) == (8, 32)


def test_tensors_tell_heads_and_biases(translate):
    vector = np.zeros(256)
    config = translate(
        tensors={"output.weight": np.zeros((10, 256)), "blk.0.attn_q.bias": vector, "blk.0.ffn_up.bias": vector}
    )
    assert (config["tie_word_embeddings"], config["attention_bias"], config["mlp_bias"]) == (False, True, True)


def test_a_sliding_window_makes_a_llama_a_mistral(translate):
    assert read_spec(translate(settings={"attention.sliding_window": 16})).sliding_windows == (16, 16)


def test_every_end_token_counts_once(translate):
    config = translate(metadata={"tokenizer.ggml.eot_token_id": 9, "tokenizer.ggml.eom_token_id": 2})
    assert config["eos_token_id"] == [2, 9]


def test_linear_and_yarn_scaling(translate):
    linear = read_spec(translate(settings={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})).rope
    assert (linear.type, linear.factor) == ("linear", 4.0)
    older = read_spec(translate(settings={"rope.scale_linear": 2.0})).rope
    assert (older.type, older.factor) == ("linear", 2.0)
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}
    rope = read_spec(translate(settings=yarn)).rope
    assert (rope.type, rope.factor, rope.original_context_tokens, rope.beta_fast) == ("yarn", 4.0, 16, 32.0)
    assert rope.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    scaled = read_spec(
        translate(settings=yarn | {"rope.scaling.attn_factor": 0.5, "rope.scaling.yarn_beta_fast": 16.0})
    ).rope
    assert scaled.attention_factor == pytest.approx(0.5 * (0.1 * math.log(4) + 1))
    assert scaled.beta_fast == 16.0


def test_rope_factors_are_read_from_their_tensor(translate):
    factors = np.linspace(1, 8, 16)
    rope = read_spec(translate(tensors={"rope_freqs.weight": factors})).rope
    assert rope.type == "factors"
    assert rope.factors == pytest.approx(factors)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"arch": "gpt2"}, ["'gpt2'", "llama, qwen2, qwen3"]),
        ({"settings": {"expert_count": 8}}, ["llama.expert_count=8"]),
        ({"settings": {"logit_scale": 0.5}}, ["llama.logit_scale=0.5"]),
        ({"settings": {"attention.brand_new": 1}}, ["llama.attention.brand_new=1"]),
        ({"settings": {"rope.dimension_count": 16}}, ["rope.dimension_count=16", "32"]),
        ({"settings": {"attention.value_length": 64}}, ["attention.value_length=64"]),
        ({"settings": {"attention.head_count": [4, 8]}}, ["attention.head_count", "layer to layer"]),
        ({"settings": {"block_count": None}}, ["lacks llama.block_count"]),
        ({"settings": {"rope.scaling.type": "longrope"}}, ["'longrope'", "linear, yarn"]),
        (
            {
                "settings": {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
                "tensors": {"rope_freqs.weight": np.ones(16)},
            },
            ["both rope_freqs.weight"],
        ),
    ],
)
def test_refuses_by_name(translate, arguments, words):
    with pytest.raises(ConfigError) as caught:
        translate(**arguments)
    message = str(caught.value)
    assert "\n" not in message
    for word in ["model.gguf", *words]:
        assert word in message


def test_a_file_without_an_embedding_is_refused(tmp_path, write_gguf):
    path = write_gguf(tmp_path / "model.gguf", {"output_norm.weight": np.ones(256)})
    with pytest.raises(ConfigError, match=r"token_embd\.weight"):
        to_hf_config(GgufFile.open(path))
