"""linear and sparse_logits in Triton: against the references, and row by row to the bit.

Legend: N rows, I in features, O out features, C hidden size, V vocabulary, K ids.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

# Triton's interpreter cuts bfloat16 off instead of rounding, which costs one step of 2**-8.
RELATIVE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
every_dtype = pytest.mark.parametrize("dtype", RELATIVE, ids=str)


def randn(seed: int, *sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


@every_dtype
@pytest.mark.parametrize(
    ("num_rows", "in_features", "out_features"), [(0, 32, 48), (1, 64, 64), (19, 100, 130), (33, 7, 1)]
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_like_the_reference(
    num_rows: int, in_features: int, out_features: int, has_bias: bool, dtype: torch.dtype
) -> None:
    x_NI = randn(1, num_rows, in_features).to(dtype)
    weight_OI = randn(2, out_features, in_features).to(dtype)
    bias_O = randn(3, out_features).to(dtype) if has_bias else None
    expected = torch.ops.toka.linear(x_NI, weight_OI, bias_O)
    actual = torch.ops.toka_triton.linear(x_NI, weight_OI, bias_O)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected, rtol=RELATIVE[dtype], atol=RELATIVE[dtype] * in_features**0.5)


@every_dtype
def test_a_row_is_the_same_to_the_bit_alone_and_among_others(dtype: torch.dtype) -> None:
    x_NI, weight_OI = randn(1, 37, 200).to(dtype), randn(2, 70, 200).to(dtype)
    together_NO = torch.ops.toka_triton.linear(x_NI, weight_OI, None)
    for row in (0, 5, 16, 36):
        alone_NO = torch.ops.toka_triton.linear(x_NI[row : row + 1], weight_OI, None)
        assert torch.equal(alone_NO[0], together_NO[row])
    for num_rows in (2, 15, 17, 33):
        # The same rows at other places of other tiles.
        some_NO = torch.ops.toka_triton.linear(x_NI[37 - num_rows :], weight_OI, None)
        assert torch.equal(some_NO, together_NO[37 - num_rows :])


def test_linear_takes_rows_and_weights_with_strides() -> None:
    x_NI, weight_OI = randn(1, 5, 96), randn(2, 40, 96)
    expected = torch.ops.toka.linear(x_NI[:, 32:64], weight_OI[:, :32], None)
    torch.testing.assert_close(torch.ops.toka_triton.linear(x_NI[:, 32:64], weight_OI[:, :32], None), expected)
    expected = torch.ops.toka.linear(x_NI.t()[:40, :].t(), weight_OI[:, ::2][:, :40], None)
    actual = torch.ops.toka_triton.linear(x_NI.t().contiguous().t()[:, :40], weight_OI[:, ::2][:, :40], None)
    torch.testing.assert_close(actual, expected)


@every_dtype
@pytest.mark.parametrize(("num_states", "hidden_size", "num_ids"), [(0, 8, 3), (2, 8, 0), (1, 64, 1), (3, 150, 21)])
def test_sparse_logits_like_the_reference(num_states: int, hidden_size: int, num_ids: int, dtype: torch.dtype) -> None:
    hidden_NC = randn(1, num_states, hidden_size + 3).to(dtype)[:, 3:]
    weight_VC = randn(2, 50, hidden_size).to(dtype)
    ids_NK = torch.randint(0, 50, (num_states, num_ids), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    ids_NK[:, 1::4] = -1
    expected = torch.ops.toka.sparse_logits(hidden_NC, weight_VC, ids_NK)
    actual = torch.ops.toka_triton.sparse_logits(hidden_NC, weight_VC, ids_NK)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_sparse_logit_depends_on_its_own_id_only() -> None:
    hidden_NC, weight_VC = randn(1, 3, 150), randn(2, 50, 150)
    ids_NK = torch.arange(40, dtype=torch.int32).expand(3, -1)
    all_NK = torch.ops.toka_triton.sparse_logits(hidden_NC, weight_VC, ids_NK)
    some_NK = torch.ops.toka_triton.sparse_logits(hidden_NC[1:2], weight_VC, ids_NK[:1, 17:20])
    assert torch.equal(some_NK, all_NK[1:2, 17:20])


@pytest.mark.parametrize("op", ["linear", "sparse_logits"])
def test_opcheck(op: str) -> None:
    x_NI, weight_OI = randn(1, 3, 32), randn(2, 20, 32)
    third = None if op == "linear" else torch.zeros(3, 2, dtype=torch.int32)
    overload = getattr(torch.ops.toka_triton, op).default
    torch.library.opcheck(overload, (x_NI, weight_OI, third), test_utils=("test_schema", "test_faketensor"))
