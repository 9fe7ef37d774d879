"""Every implementation of sum_tokens for CPUs against the reference, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from toka.kernels.registry import FLOATS, Implementation, implementations

pytestmark = pytest.mark.usefixtures("cpp_kernels")

FAST = [i for i in implementations("sum_tokens") if i.family not in ("reference", "triton")]
MAX_ROWS = 6


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("implementation", FAST, ids=lambda i: i.family)
@pytest.mark.parametrize("dtype", sorted(FLOATS, key=str), ids=str)
@pytest.mark.parametrize("width", [1, 40, 384, 1000])
def test_same_as_the_reference(implementation: Implementation, width: int, dtype: torch.dtype) -> None:
    """Rows that begin, one that goes on, one that is padding and one without a token."""
    hidden_TC = torch.randn(150, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    arguments = (hidden_TC, ints(4, 0, -1, 2), ints(0, 100, 103, 103, 140), ints(100, 33, 0, 37))
    before_MC = torch.randn(MAX_ROWS, width)
    sums_MC, expected_MC = before_MC.clone(), before_MC.clone()
    implementation.overload(*arguments, sums_MC)
    torch.ops.toka.sum_tokens(*arguments, expected_MC)
    assert torch.equal(sums_MC, expected_MC)
    assert torch.equal(sums_MC[[1, 3, 5]], before_MC[[1, 3, 5]])
    torch.testing.assert_close(sums_MC[4], hidden_TC[:100].double().sum(0).float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sums_MC[0], before_MC[0] + hidden_TC[100:103].float().sum(0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("implementation", FAST, ids=lambda i: i.family)
@pytest.mark.parametrize("cut", [1, 7, 299])
def test_a_prompt_in_two_steps_has_the_same_sum_to_the_bit(implementation: Implementation, cut: int) -> None:
    hidden_TC = torch.randn(300, 384)
    whole_MC, cut_MC = torch.full((MAX_ROWS, 384), 9.0), torch.full((MAX_ROWS, 384), 9.0)
    implementation.overload(hidden_TC, ints(3), ints(0, 300), ints(300), whole_MC)
    implementation.overload(hidden_TC[:cut], ints(3), ints(0, cut), ints(cut), cut_MC)
    implementation.overload(hidden_TC[cut:], ints(3), ints(0, 300 - cut), ints(300), cut_MC)
    assert torch.equal(cut_MC, whole_MC)


def test_what_does_not_fit_is_refused() -> None:
    overload, sums_MC = torch.ops.toka_cpp.sum_tokens.default, torch.zeros(MAX_ROWS, 8)
    with pytest.raises(RuntimeError, match="must agree in C"):
        overload(torch.zeros(3, 9), ints(0), ints(0, 3), ints(3), sums_MC)
    with pytest.raises(RuntimeError, match="row 6 is outside of the table of sums"):
        overload(torch.zeros(3, 8), ints(6), ints(0, 3), ints(3), sums_MC)
