"""One file or several, and every way in which they can be wrong is one line."""

import json

import pytest
import torch
from safetensors.torch import save_file

from toka.errors import ConfigError
from toka.weights.safetensors_reader import SafetensorsReader

A, B = torch.arange(12.0).reshape(4, 3), torch.arange(5).to(torch.bfloat16)


def write_index(directory, weight_map):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path):
    save_file({"a": A}, tmp_path / "one.safetensors")
    save_file({"b": B}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    return tmp_path


def refused(directory):
    with pytest.raises(ConfigError) as caught:
        reader = SafetensorsReader(directory)
        for name, entry in reader.tensors.items():
            reader.read(name, 0, entry.shape[0])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_reads_a_and_b(reader):
    assert {name: (entry.shape, entry.encoding, entry.dtype) for name, entry in reader.tensors.items()} == {
        "a": ((4, 3), "F32", torch.float32),
        "b": ((5,), "BF16", torch.bfloat16),
    }
    assert reader.read("a", 1, 3).equal(A[1:3])
    assert reader.read("b", 0, 5).equal(B)
    assert reader.read("a", 0, 4).equal(A)


def test_one_file(tmp_path):
    save_file({"a": A, "b": B}, tmp_path / "model.safetensors")
    assert_reads_a_and_b(SafetensorsReader(tmp_path))


def test_one_file_of_another_name(tmp_path):
    save_file({"a": A, "b": B}, tmp_path / "weights.safetensors")
    assert_reads_a_and_b(SafetensorsReader(tmp_path))


def test_several_files_with_an_index(sharded):
    reader = SafetensorsReader(sharded)
    assert_reads_a_and_b(reader)
    assert reader.tensors["b"].file.name == "two.safetensors"


def test_the_index_decides_when_other_files_lie_beside(sharded):
    save_file({"a": A * 2, "b": B}, sharded / "consolidated.safetensors")
    assert_reads_a_and_b(SafetensorsReader(sharded))


def test_several_files_without_an_index(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    assert "2 *.safetensors files" in refused(sharded)


def test_missing_shard(sharded):
    (sharded / "two.safetensors").unlink()
    assert "two.safetensors is missing" in refused(sharded)


def test_tensor_that_the_index_promises_is_not_there(sharded):
    write_index(sharded, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    assert "'c' is in two.safetensors, but it is not" in refused(sharded)


def test_tensor_in_two_shards(sharded):
    save_file({"a": A, "b": B}, sharded / "two.safetensors")
    assert "'a' is in both" in refused(sharded)


@pytest.mark.parametrize(
    "index", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../one.safetensors"}}', "\xff"]
)
def test_malformed_index(sharded, index):
    (sharded / "model.safetensors.index.json").write_bytes(index.encode("latin-1"))
    assert "model.safetensors.index.json is malformed" in refused(sharded)


@pytest.mark.parametrize("length", [0, 4, 20, 100, -1])
def test_truncated(tmp_path, length):
    path = tmp_path / "model.safetensors"
    save_file({"a": A, "b": B}, path)
    path.write_bytes(path.read_bytes()[:length])
    assert "model.safetensors is truncated, corrupt or no safetensors file" in refused(tmp_path)


def test_a_pickle_under_another_name(tmp_path):
    torch.save({"a": A}, tmp_path / "model.safetensors")
    assert "no safetensors file" in refused(tmp_path)
