"""The bridge itself, from the CPU to the CPU: strides, shared storage and written arguments survive it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import toka.kernels.ops  # noqa: F401  (defines torch.ops.toka)


@pytest.fixture(scope="module")
def cuda_bridge() -> Any:
    spec = importlib.util.spec_from_file_location("cuda_bridge", Path(__file__).with_name("cuda_bridge.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_written_comes_back(cuda_bridge: Any) -> None:
    op = torch.ops.toka.write_kv.default
    merged_THD = torch.randn(5, 4, 16)
    key_THD, value_THD = merged_THD.split([2, 2], dim=1)
    slots_T = torch.tensor([3, -1, 9, 0, 15], dtype=torch.int32)
    expected = [torch.zeros(2, 2, 8, 16) for _ in range(2)]
    op(key_THD, value_THD, *expected, slots_T)
    bases = [torch.zeros(3, 2, 8, 16) for _ in range(2)]
    actual = [base[1:] for base in bases]  # at an offset in their storage
    cuda_bridge.bridged(op, op._schema, "cpu")(key_THD, value_THD, *actual, slots_T)
    for base, here, wanted in zip(bases, actual, expected, strict=True):
        assert torch.equal(here, wanted) and wanted.any() and not base[0].any()


def test_tensors_lie_as_before(cuda_bridge: Any) -> None:
    base = torch.arange(60.0).view(6, 10)
    given = (base[:, 2:8:2], base.t()[3:5], base[:0], torch.ones(3).expand(4, 3))
    seen: list[torch.Tensor] = []

    def look(*tensors: torch.Tensor) -> torch.Tensor:
        seen.extend(tensors)
        return tensors[0] * 2

    schema = torch._C.parse_schema("toka::look(Tensor a, Tensor b, Tensor c, Tensor d) -> Tensor")
    result = cuda_bridge.bridged(look, schema, "cpu")(*given)
    assert torch.equal(result, given[0] * 2)
    for tensor, before in zip(seen, given, strict=True):
        assert torch.equal(tensor, before) and tensor.stride() == before.stride()
        assert tensor.numel() == 0 or tensor.data_ptr() != before.data_ptr()
    assert seen[0].untyped_storage().data_ptr() == seen[1].untyped_storage().data_ptr()
