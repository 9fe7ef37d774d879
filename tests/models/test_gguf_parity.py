"""Models read from GGUF files compute what transformers computes from the same file."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from toka.gguf_file import GgufFile
from toka.model_source import ModelSource, read_hf_config

SIZES = {
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
ROPE = {"rope_type": "default", "rope_theta": 500.0}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, rope_parameters=ROPE),
    "llama-tied": LlamaConfig(**SIZES, rope_parameters=ROPE, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES, rope_parameters=ROPE),
    "qwen3": Qwen3Config(**SIZES, rope_parameters=ROPE, head_dim=128),
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOLERANCE = 1e-4


def gguf_tensors(model, arch, kind):
    """The tensors as llama.cpp's converter stores them: its names, vectors in F32, q and k of llama interleaved."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        stem, _, suffix = name.rpartition(".")
        array = tensor.numpy()
        if stem.startswith("model.layers."):
            _, _, layer, part = stem.split(".", 3)
            if arch == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = array.reshape(-1, 2, model.config.head_dim // 2, *array.shape[1:])
                array = heads.swapaxes(1, 2).reshape(array.shape)
            ours = f"blk.{layer}.{NAMES[part]}.{suffix}"
        else:
            ours = f"{NAMES[stem]}.{suffix}"
        tensors[ours] = (array, kind if array.ndim > 1 else gguf.GGMLQuantizationType.F32)
    return tensors


def compare(path: Path, load_model, paged_run, token_ids, for_transformers: Path | None = None):
    theirs = for_transformers or path
    reference = AutoModelForCausalLM.from_pretrained(
        theirs.parent, gguf_file=theirs.name, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        expected = reference(token_ids[None]).logits[0]
    run = paged_run(load_model(path, read_hf_config(ModelSource("gguf", path, path, path.stem))))
    pieces = token_ids.split([len(token_ids) - 7, 4, 1, 1, 1])  # prefill in two chunks, then decode
    found = torch.cat([run.step([(1, piece)])[0] for piece in pieces])
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("name", CONFIGS)
def test_tiny_models(name, kind, tmp_path, write_gguf, load_model, paged_run, randomise):
    model, arch = AutoModelForCausalLM.from_config(CONFIGS[name]), name.partition("-")[0]
    randomise(model)
    tensors = gguf_tensors(model, arch, gguf.GGMLQuantizationType[kind])
    sizes = (
        {"attention.key_length": 128, "attention.value_length": 128}
        if arch == "qwen3"
        else {"rope.dimension_count": 32}
    )
    settings = {"vocab_size": 64, **sizes}
    path = write_gguf(tmp_path / "model.gguf", tensors, arch, settings, {"general.name": "tiny"})
    compare(path, load_model, paged_run, torch.randint(64, (20,), generator=torch.Generator().manual_seed(1)))


def test_llama3_rope_stored_as_factors(tmp_path, write_gguf, load_model, paged_run, randomise):
    """Llama 3's scaling lies in a tensor of divisors in GGUF files, which transformers passes over; so compare with the original."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    config = LlamaConfig(**SIZES, rope_parameters={"rope_type": "llama3", "rope_theta": 500.0, **scaling})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(model)
    unscaled = 1.0 / (500.0 ** (torch.arange(0, 32, 2) / 32))
    tensors = gguf_tensors(model, "llama", gguf.GGMLQuantizationType.F32)
    factors = (unscaled / model.model.rotary_emb.inv_freq).numpy()
    assert factors.max() > 2
    path = write_gguf(tmp_path / "model.gguf", tensors | {"rope_freqs.weight": factors})
    token_ids = torch.randint(64, (40,), generator=torch.Generator().manual_seed(2))
    [found] = paged_run(load_model(path, read_hf_config(ModelSource("gguf", path, path, "")))).step([(0, token_ids)])
    with torch.inference_mode():
        torch.testing.assert_close(found, model(token_ids[None]).logits[0], rtol=0, atol=TOLERANCE)


def without_tokenizer(path: Path, copy: Path, write_gguf) -> Path:
    """The same tensors and settings without the vocabulary, over which transformers would spend half a minute."""
    head = GgufFile.open(path)
    tensors = {}
    for name, tensor in head.tensors.items():
        raw = np.fromfile(path, np.uint8, count=tensor.num_bytes, offset=tensor.offset).reshape(tensor.shape[0], -1)
        is_vector = len(tensor.shape) == 1
        tensors[name] = raw.view(np.float32).reshape(-1) if is_vector else (raw, tensor.type, True)
    settings = {key.removeprefix("llama."): value for key, value in head.metadata.items() if key.startswith("llama.")}
    return write_gguf(copy, tensors, "llama", settings)


def test_the_default_model(default_model, load_model, paged_run, tmp_path, write_gguf):
    token_ids = torch.randint(49152, (24,), generator=torch.Generator().manual_seed(3))
    copy = without_tokenizer(default_model.path, tmp_path / "copy.gguf", write_gguf)
    compare(default_model.path, load_model, paged_run, token_ids, for_transformers=copy)
