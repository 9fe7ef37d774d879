"""Tensors of a GGUF file come out as the gguf library dequantises them, whole and in pieces, q and k in Hugging Face's order."""

import gguf
import numpy as np
import pytest
import torch

from toka.errors import ConfigError
from toka.weights.gguf_reader import GgufReader

TYPES = gguf.GGMLQuantizationType
QUANTISABLE = [TYPES.F32, TYPES.F16, TYPES.BF16, TYPES.Q4_0, TYPES.Q4_1, TYPES.Q5_0, TYPES.Q5_1, TYPES.Q8_0]
SCALES_AT = {TYPES.Q4_K: [0, 2], TYPES.Q5_K: [0, 2], TYPES.Q6_K: [208]}
"""K types that the library cannot quantise to: where in a block its half-precision scales stand."""

EMBEDDING = {"token_embd.weight": np.zeros((10, 256))}
DTYPES = {TYPES.F16: torch.float16, TYPES.BF16: torch.bfloat16}


def random_tensor(kind, num_rows, seed=0):
    """[num_rows, 512] of a type, as the writer fixture takes it."""
    generator = np.random.default_rng(seed)
    if kind in QUANTISABLE:
        return generator.normal(size=(num_rows, 512)), kind
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (num_rows * 2, block_bytes), dtype=np.uint8)
    for place in SCALES_AT[kind]:
        blocks[:, place : place + 2] = (
            generator.normal(size=num_rows * 2).astype(np.float16).view(np.uint8).reshape(-1, 2)
        )
    return blocks.reshape(num_rows, -1), kind, True


def as_library_has_it(path, name):
    [tensor] = [tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name]
    shape = [int(size) for size in reversed(tensor.shape)]
    return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float32))


@pytest.mark.parametrize("kind", [*QUANTISABLE, *SCALES_AT], ids=lambda kind: kind.name)
def test_every_type(kind, tmp_path, write_gguf):
    path = write_gguf(tmp_path / "m.gguf", EMBEDDING | {"blk.1.ffn_down.weight": random_tensor(kind, 24)})
    reader = GgufReader(path)
    name = "model.layers.1.mlp.down_proj.weight"
    entry = reader.tensors[name]
    assert (entry.shape, entry.encoding, entry.dtype) == ((24, 512), kind.name, DTYPES.get(kind, torch.float32))
    expected = as_library_has_it(path, "blk.1.ffn_down.weight")
    assert expected.abs().max() > 0
    for start, stop in ((0, 24), (0, 1), (7, 20), (23, 24)):
        rows = reader.read(name, start, stop)
        assert rows.dtype is entry.dtype
        torch.testing.assert_close(rows.float(), expected[start:stop], rtol=0, atol=0)


@pytest.mark.parametrize("kind", [TYPES.F32, TYPES.BF16, TYPES.Q4_1, TYPES.Q6_K], ids=lambda kind: kind.name)
def test_q_and_k_of_llama_are_put_back_into_order(kind, tmp_path, write_gguf):
    """Head dim 8 (embedding_length 256 over 32 heads): Hugging Face's rows 0 1 2 ... of a head stand at 0 2 4 6 1 3 5 7."""
    tensors = EMBEDDING | {
        "blk.0.attn_q.weight": random_tensor(kind, 24),
        "blk.0.attn_v.weight": random_tensor(kind, 24),
        "blk.0.attn_k.bias": np.arange(16.0),
    }
    settings = {"attention.head_count": 32, "attention.head_count_kv": 4}
    path = write_gguf(tmp_path / "m.gguf", tensors, settings=settings)
    reader = GgufReader(path)
    order = [8 * head + row for head in range(3) for row in (0, 2, 4, 6, 1, 3, 5, 7)]
    expected = as_library_has_it(path, "blk.0.attn_q.weight")[order]
    for start, stop in ((0, 24), (3, 5), (7, 17), (16, 24)):
        rows = reader.read("model.layers.0.self_attn.q_proj.weight", start, stop)
        torch.testing.assert_close(rows.float(), expected[start:stop], rtol=0, atol=0)
    values = reader.read("model.layers.0.self_attn.v_proj.weight", 0, 24)
    torch.testing.assert_close(values.float(), as_library_has_it(path, "blk.0.attn_v.weight"), rtol=0, atol=0)
    bias = reader.read("model.layers.0.self_attn.k_proj.bias", 0, 16)
    assert bias.tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]


def test_q_and_k_of_qwen2_are_in_order_already(tmp_path, write_gguf):
    path = write_gguf(tmp_path / "m.gguf", EMBEDDING | {"blk.0.attn_k.bias": np.arange(16.0)}, arch="qwen2")
    assert GgufReader(path).read("model.layers.0.self_attn.k_proj.bias", 0, 16).tolist() == list(range(16))


def test_unknown_names_stay_as_they_are(tmp_path, write_gguf):
    tensors = EMBEDDING | {
        "blk.0.attn_sinks.weight": np.ones(8),
        "rope_freqs.weight": np.ones(16),
        "cls.weight": np.ones(2),
    }
    path = write_gguf(tmp_path / "m.gguf", tensors)
    assert set(GgufReader(path).tensors) == {
        "model.embed_tokens.weight",
        "blk.0.attn_sinks.weight",
        "rope_freqs.weight",
        "cls.weight",
    }


def test_a_type_that_is_not_supported(tmp_path, write_gguf):
    blocks = np.zeros((4, 2 * gguf.GGML_QUANT_SIZES[TYPES.Q2_K][1]), np.uint8)
    path = write_gguf(tmp_path / "m.gguf", EMBEDDING | {"blk.0.ffn_down.weight": (blocks, TYPES.Q2_K, True)})
    with pytest.raises(ConfigError, match=r"blk\.0\.ffn_down\.weight.*m\.gguf.*Q2_K.*Q4_0"):
        GgufReader(path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path, write_gguf):
    path = write_gguf(tmp_path / "m.gguf", {"token_embd.weight": np.ones((10, 256))})
    reader = GgufReader(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"m\.gguf was cut short"):
        reader.read("model.embed_tokens.weight", 0, 10)
