"""The head of a GGUF file reads as the gguf library reads it; a damaged one is a ConfigError, never anything else."""

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toka.errors import ConfigError
from toka.gguf_file import GgufFile

TYPES = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def small_file(tmp_path_factory, write_gguf):
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    tensors = {
        "token_embd.weight": (np.arange(10 * 256).reshape(10, 256) / 1000, TYPES.Q8_0),
        "output_norm.weight": np.ones(256),
        "blk.0.ffn_up.weight": (np.ones((512, 256)), TYPES.F16),
    }
    metadata = {
        "tokenizer.ggml.tokens": ["a", "é", "", "日本"],
        "tokenizer.ggml.scores": [0.5, -1.0],
        "tokenizer.ggml.token_type": [1, 2, 3],
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ x }}\n",
    }
    return write_gguf(path, tensors, metadata=metadata)


def assert_same_as_library(path):
    ours, theirs = GgufFile.open(path), gguf.GGUFReader(path)
    expected = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata.keys() == expected.keys()
    for key, value in ours.metadata.items():
        assert (list(value) if isinstance(expected[key], list) else value) == expected[key]
    assert len(theirs.tensors) == len(ours.tensors) > 0
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert found.shape == tuple(int(size) for size in reversed(tensor.shape))
        assert (found.type, found.offset, found.num_bytes) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
        assert found.row_num_bytes * found.shape[0] == tensor.n_bytes


def test_reads_what_the_library_reads(small_file):
    assert_same_as_library(small_file)


def test_reads_the_default_model_as_the_library_does(default_model):
    assert_same_as_library(default_model.path)


def test_truncated_anywhere(small_file, tmp_path):
    whole = small_file.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 1200, 7), len(whole) // 2, len(whole) - 64]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match=r"cut\.gguf") as caught:
            GgufFile.open(cut)
        assert "\n" not in str(caught.value)


@settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 1300), value=st.binary(min_size=1, max_size=8))
def test_corrupt_anywhere(small_file, tmp_path, place, value):
    """A damaged head either still makes sense or is refused; it never loops, never exhausts memory, never raises else."""
    data = bytearray(small_file.read_bytes())
    data[place : place + len(value)] = value
    path = tmp_path / "corrupt.gguf"
    path.write_bytes(data)
    try:
        assert GgufFile.open(path).path == path
    except ConfigError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "too short"),
        (b"PK\x03\x04 a zip file", "not a GGUF file"),
        (b"GGUF" + (1).to_bytes(4, "little") + bytes(16), "version 1 is not supported"),
        (b"GGUF" + (3).to_bytes(4, "big") + bytes(16), "is not supported"),
    ],
)
def test_not_a_usable_gguf_file(tmp_path, content, words):
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        GgufFile.open(path)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.gguf"):
        GgufFile.open(tmp_path / "nowhere.gguf")
