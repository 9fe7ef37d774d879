"""Every name is used once and none is left over; what does not fit is one line that names tensor, shapes and file."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from toka.errors import ConfigError
from toka.models.registry import build_model
from toka.models.spec import read_spec
from toka.weights.loader import load_weights, open_checkpoint
from toka.weights.weight import Weight

CONFIG = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": [1],
}


def weights_of(model):
    return {model.checkpoint_name(name): module for name, module in model.named_modules() if isinstance(module, Weight)}


@pytest.fixture
def checkpoint(tmp_path):
    """A directory with random bfloat16 weights for CONFIG; change(tensors) rewrites them."""
    model = build_model(read_spec(CONFIG), torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(weight.shape, generator=generator).bfloat16() for name, weight in weights_of(model).items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def change(checkpoint, **changes):
    tensors = load_file(checkpoint / "model.safetensors")
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, checkpoint / "model.safetensors")


def loaded(checkpoint, dtype=torch.float32, **config):
    model = build_model(read_spec(CONFIG | config), dtype)
    load_weights(model, open_checkpoint(checkpoint))
    return model


def refused(checkpoint, **config):
    with pytest.raises(ConfigError) as caught:
        loaded(checkpoint, **config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fills_every_weight_and_casts_it(checkpoint, dtype):
    expected = load_file(checkpoint / "model.safetensors")
    weights = weights_of(loaded(checkpoint, dtype))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert weight.as_tensor().dtype is dtype
        assert weight.as_tensor().equal(expected[name].to(dtype))


def test_leaves_nothing_on_the_meta_device(checkpoint):
    model = loaded(checkpoint)
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"cpu"}
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_tells_progress_in_bytes(checkpoint):
    model, told = build_model(read_spec(CONFIG), torch.float32), []
    load_weights(model, open_checkpoint(checkpoint), on_progress=lambda done, total: told.append((done, total)))
    total = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (total, total)
    assert len(told) == len(weights_of(model))


def test_harmless_names_are_ignored(checkpoint):
    change(checkpoint, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    assert loaded(checkpoint).embed_tokens.weight.as_tensor().abs().max() > 0


def test_missing_tensor(checkpoint):
    change(checkpoint, **{"model.layers.1.mlp.up_proj.weight": None})
    message = refused(checkpoint)
    assert message.startswith("Tensor 'model.layers.1.mlp.up_proj.weight' is missing")
    assert "model.safetensors" in message


def test_many_missing_tensors_are_counted(checkpoint):
    message = refused(checkpoint, num_hidden_layers=4)
    assert "'model.layers.2.input_layernorm.weight'" in message
    assert "and 15 more are missing" in message


def test_extra_tensor(checkpoint):
    change(checkpoint, **{"model.layers.0.self_attn.q_proj.bias": torch.ones(16)})
    message = refused(checkpoint)
    assert "'model.layers.0.self_attn.q_proj.bias'" in message
    assert "not known to the model" in message


def test_wrong_shape(checkpoint):
    message = refused(checkpoint, intermediate_size=25)
    assert "has shape [16, 24]" in message
    assert "expects [16, 25]" in message
    assert "model.safetensors" in message


def test_wrong_dtype(checkpoint):
    change(checkpoint, **{"model.norm.weight": torch.ones(16, dtype=torch.int32)})
    message = refused(checkpoint)
    assert "'model.norm.weight'" in message
    assert "I32" in message


def test_float8_without_its_scales_is_refused(checkpoint):
    change(checkpoint, **{"model.norm.weight": torch.ones(16).to(torch.float8_e4m3fn)})
    assert "F8_E4M3" in refused(checkpoint)


def test_a_tied_head_may_repeat_the_embedding(checkpoint):
    change(
        checkpoint,
        **{"lm_head.weight": load_file(checkpoint / "model.safetensors")["model.embed_tokens.weight"].clone()},
    )
    model = loaded(checkpoint, tie_word_embeddings=True)
    assert model.lm_head is None


def test_a_tied_head_that_differs_is_refused(checkpoint):
    message = refused(checkpoint, tie_word_embeddings=True)
    assert "'lm_head.weight'" in message
    assert "tie_word_embeddings" in message


def test_an_untied_head_must_be_there(checkpoint):
    change(checkpoint, **{"lm_head.weight": None})
    assert "'lm_head.weight' is missing" in refused(checkpoint)


def test_loading_needs_little_beyond_the_model(default_model):
    """The peak of resident memory while the default model loads in float32, against the model's own size."""
    program = """
import json, resource, sys
from pathlib import Path
import torch
from toka.model_source import ModelSource, read_hf_config
from toka.models.registry import build_model
from toka.models.spec import read_spec
from toka.weights.loader import load_weights, open_checkpoint
path = Path(sys.argv[1])
model = build_model(read_spec(read_hf_config(ModelSource("gguf", path, path, ""))), torch.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
load_weights(model, open_checkpoint(path))
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
print(json.dumps({"grown": grown, "model": sum(p.numel() * p.element_size() for p in model.parameters())}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(default_model.path)], capture_output=True, text=True, check=True
    )
    size = json.loads(done.stdout)
    assert size["model"] > 500e6
    assert size["grown"] < size["model"] + 64e6
