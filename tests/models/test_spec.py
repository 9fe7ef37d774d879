"""The configuration is taken over or refused by name, in one line."""

import pytest

from toka.errors import ConfigError
from toka.models.registry import FAMILIES
from toka.models.spec import ARCHITECTURES, read_spec

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    "eos_token_id": [2, 7],
    "dtype": "bfloat16",
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def config(**changes):
    return LLAMA | changes


def test_reads_a_llama():
    spec = read_spec(LLAMA)
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (4, 8, 2, 8)
    assert (spec.rope.type, spec.rope.theta, spec.max_context_tokens) == ("default", 5e5, 256)
    assert (spec.qkv_bias, spec.output_bias, spec.mlp_bias, spec.qk_norm, spec.tied_head) == (False,) * 5
    assert (spec.eos_token_ids, spec.checkpoint_dtype, spec.norm_eps) == ((2, 7), "bfloat16", 1e-5)
    assert spec.sliding_windows == (0, 0, 0, 0)


def test_absent_and_null_fields_have_transformers_defaults():
    spec = read_spec(
        {k: v for k, v in LLAMA.items() if k not in ("rope_parameters", "rms_norm_eps")} | {"num_key_value_heads": None}
    )
    assert (spec.num_kv_heads, spec.norm_eps, spec.rope.theta, spec.activation) == (8, 1e-6, 1e4, "silu")


def test_every_architecture_has_a_family():
    assert FAMILIES.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"model_type": "mistral", "sliding_window": 32}, (32,) * 4),
        ({"model_type": "mistral", "sliding_window": None}, (0,) * 4),
        ({"model_type": "mistral"}, (4096,) * 4),
        ({"model_type": "llama", "sliding_window": 32}, (0,) * 4),
        ({"model_type": "qwen2", "sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, (0,) * 4),
        ({"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": False}, (0,) * 4),
        (
            {"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": True, "max_window_layers": 3},
            (0, 0, 0, 32),
        ),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 32,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (32, 0, 32, 0),
        ),
    ],
)
def test_sliding_windows(changes, windows):
    assert read_spec(config(**changes, architectures=None)).sliding_windows == windows


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_type": "default"}, 256),
        ({"rope_type": "linear", "factor": 4.0}, 1024),
        ({"rope_type": "dynamic", "factor": 2.0}, 512),
        ({**LLAMA3, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
    ],
)
def test_context_with_rope_scaling(rope, context):
    assert read_spec(config(rope_parameters=rope)).max_context_tokens == context


def test_the_rope_scaling_flag_replaces_that_of_the_checkpoint_and_keeps_its_theta():
    rope = read_spec(config(), rope_scaling={"rope_type": "linear", "factor": 2.0}).rope
    assert (rope.type, rope.factor, rope.theta) == ("linear", 2.0, 5e5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, ["model_type", "'gpt2'", "llama, mistral, qwen2, qwen3"]),
        ({"model_type": None}, ["model_type", "supported"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["architectures", "LlamaForCausalLM"]),
        ({"hidden_act": "quick_gelu"}, ["hidden_act", "'quick_gelu'", "silu"]),
        (
            {"rope_parameters": {"rope_type": "longrope"}},
            ["rope_type", "'longrope'", "default, linear, dynamic, llama3, yarn"],
        ),
        ({"rope_scaling": {"type": "su"}}, ["rope_type", "'su'"]),
        ({"rope_parameters": {"rope_type": "linear"}}, ["lacks factor"]),
        ({"rope_parameters": {"rope_type": "linear", "factor": -1}}, ["factor", "above 0", "'-1'"]),
        ({"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}}, ["high_freq_factor", "low_freq_factor"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, ["full_attention", "differ between layers"]),
        ({"rope_parameters": [1]}, ["rope_parameters", "object"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "'0.5'"]),
        ({"rope_interleaved": True}, ["rope_interleaved"]),
        ({"hidden_size": None}, ["lacks hidden_size"]),
        ({"hidden_size": "64"}, ["hidden_size", "whole number", "'64'"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "above 0"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "divide"]),
        ({"head_dim": 7}, ["head_dim", "even"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps", "'nan'"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings", "true or false"]),
        ({"eos_token_id": ["</s>"]}, ["eos_token_id"]),
        (
            {
                "model_type": "qwen2",
                "architectures": None,
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["x"] * 4,
            },
            ["layer_types"],
        ),
    ],
)
def test_refuses_in_one_line(changes, words):
    with pytest.raises(ConfigError) as caught:
        read_spec(config(**changes))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
