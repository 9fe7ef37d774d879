"""The choice of a kernel, and the reasons that it gives."""

from __future__ import annotations

import pytest
import torch

from toka.errors import ConfigError
from toka.kernels.op_schema import SCHEMAS
from toka.kernels.registry import IMPLEMENTATIONS, Trait, choose, implementations
from toka.kernels.triton import library as triton_library

BOTH = ("reference", "cpp")


def test_the_fastest_that_fits_is_chosen() -> None:
    kernel = choose("paged_attention", "cpu", torch.bfloat16, families=BOTH, head_dim=64)
    assert kernel.overload is torch.ops.toka_cpp.paged_attention.default
    assert kernel.reason == "cpp, priority 10"


def test_the_reason_names_what_was_passed_over() -> None:
    kernel = choose("paged_attention", "cpu", torch.float32, families=BOTH, head_dim=512)
    assert kernel.overload is torch.ops.toka.paged_attention.default
    assert kernel.reason.startswith("reference, priority 0; passed over: ")
    assert "cpp head dim 512 is above 256" in kernel.reason
    kernel = choose("sample", "cuda", torch.float32, families=BOTH)
    assert "cpp runs on cpu only" in kernel.reason
    kernel = choose("sample", "cpu", torch.float32, families=("reference",))
    assert "cpp is not among the families in use" in kernel.reason


def test_nothing_that_fits_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"no kernel for sample on cpu with torch.float64: .*reference does not take"):
        choose("sample", "cpu", torch.float64, families=BOTH)
    with pytest.raises(ConfigError, match="reference is not chunk_invariant"):
        choose("paged_attention", "cuda", torch.float32, families=BOTH, traits=[Trait.CHUNK_INVARIANT])
    with pytest.raises(ConfigError, match=r"unknown kernel operator 'attention'; known: .*paged_attention, .*sample, "):
        choose("attention", "cpu", torch.float32, families=BOTH)


def test_triton_serves_cuda_and_the_cpu_only_where_it_interprets(monkeypatch: pytest.MonkeyPatch) -> None:
    families = ("reference", "torch", "triton")
    for op in {each.op for each in IMPLEMENTATIONS if each.family == "triton"}:
        dtype, traits = torch.float32, [Trait.BATCH_INVARIANT]
        for device, family in (("cuda", "triton"), ("cpu", "reference")):
            kernel = choose(op, device, dtype, families=families, head_dim=64, traits=traits)
            assert kernel.implementation.family == family
        assert "triton runs on cuda only" in kernel.reason
        monkeypatch.setattr(triton_library, "is_interpreting", lambda: True)
        assert (
            choose(op, "cpu", dtype, families=families, head_dim=64, traits=traits).overload.namespace == "toka_triton"
        )
        monkeypatch.undo()
    kernel = choose("linear", "cuda", torch.bfloat16, families=families)
    assert kernel.implementation.family == "torch"


def test_every_operator_has_one_reference_below_all_others() -> None:
    for op in {each.op for each in IMPLEMENTATIONS} & set(SCHEMAS):
        found = implementations(op)
        assert [each.family for each in found].count("reference") == 1 and found[-1].family == "reference"
        assert len({(i.family, i.priority) for i in found}) == len(found)
