"""The dense format loads pieces as well as wholes, and a weight hides how it is stored."""

import pytest
import torch
from torch import nn

from toka.errors import ConfigError
from toka.weights import weight as weight_module
from toka.weights.weight import Piece, TensorEntry, Weight

WHOLE = torch.arange(48.0).reshape(8, 6)
CPU = torch.device("cpu")


class MemoryReader:
    """A checkpoint of tensors in memory that notes what is read."""

    def __init__(self, **tensors):
        self.stored, self.reads = tensors, []

    @property
    def tensors(self):
        return {name: TensorEntry(tuple(t.shape), "F32", t.dtype, "memory") for name, t in self.stored.items()}

    def read(self, name, start, stop):
        self.reads.append((start, stop))
        return self.stored[name][start:stop]


@pytest.fixture
def meta_weight():
    with torch.device("meta"):
        return Weight((8, 6), torch.float32)


@pytest.mark.parametrize("index", [0, 1])
def test_a_piece_along_each_dim(meta_weight, index):
    for dim in (0, 1):
        meta_weight.load(MemoryReader(w=WHOLE), "w", CPU, Piece(dim, index, 2))
        assert meta_weight.as_tensor().equal(WHOLE.chunk(2, dim)[index])


def test_a_piece_of_rows_reads_those_rows_only(meta_weight):
    reader = MemoryReader(w=WHOLE)
    meta_weight.load(reader, "w", CPU, Piece(0, 3, 4))
    assert reader.reads == [(6, 8)]


def test_a_piece_that_does_not_come_out_even(meta_weight):
    with pytest.raises(ConfigError, match=r"dim 1 .* \[8, 6\] .* 4 equal pieces"):
        meta_weight.load(MemoryReader(w=WHOLE), "w", CPU, Piece(1, 0, 4))


def test_large_tensors_are_read_in_chunks(meta_weight, monkeypatch):
    monkeypatch.setattr(weight_module, "_CHUNK_NUM_ELEMENTS", 20)
    reader = MemoryReader(w=WHOLE)
    meta_weight.load(reader, "w", CPU)
    assert reader.reads == [(0, 3), (3, 6), (6, 8)]
    assert meta_weight.as_tensor().equal(WHOLE)


def test_linear_and_embedding(meta_weight):
    meta_weight.load(MemoryReader(w=WHOLE), "w", CPU)
    x, bias = torch.randn(3, 6), torch.randn(8)
    torch.testing.assert_close(meta_weight.linear(x, bias), x @ WHOLE.T + bias)
    torch.testing.assert_close(meta_weight.linear(x), x @ WHOLE.T)
    assert meta_weight.embedding(torch.tensor([5, 0], dtype=torch.int32)).equal(WHOLE[[5, 0]])


def test_a_format_may_store_a_weight_in_several_tensors_and_choose_the_op():
    """The seam that quantised formats use: a made-up one with a sign and a magnitude."""

    class SignAndMagnitude:
        name = "sign_and_magnitude"

        def part_shapes(self, shape, dtype):
            return {"sign": (shape, torch.int8), "magnitude": (shape, dtype)}

        def checkpoint_names(self, name):
            return (f"{name}.sign", f"{name}.magnitude")

        def load(self, reader, name, shape, parts, piece):
            for part in ("sign", "magnitude"):
                parts[part].copy_(reader.read(f"{name}.{part}", 0, shape[0]))

        def dequantise(self, parts, dtype):
            return parts["sign"] * parts["magnitude"]

        def linear(self, x_NI, parts, bias_O):
            return nn.functional.linear(x_NI, self.dequantise(parts, x_NI.dtype), bias_O)

        def embedding(self, ids_N, parts, dtype):
            return parts["sign"][ids_N] * parts["magnitude"][ids_N]

    signed = torch.randn(8, 6)
    weight = Weight((8, 6), torch.float32, SignAndMagnitude())
    weight.load(MemoryReader(**{"w.sign": signed.sign().to(torch.int8), "w.magnitude": signed.abs()}), "w", CPU)
    assert weight.as_tensor().equal(signed)
    assert weight.num_bytes() == 48 * 5
    x = torch.randn(2, 6)
    torch.testing.assert_close(weight.linear(x), x @ signed.T)
    assert weight.embedding(torch.tensor([2])).equal(signed[[2]])
