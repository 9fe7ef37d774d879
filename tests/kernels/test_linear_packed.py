"""Products with packed weights: against plain torch, and to the bit whatever stands beside a row.

Legend: N rows, I in features, O out features, P panels, L = PANEL_WIDTH.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from toka.kernels.op_schema import PANEL_WIDTH
from toka.kernels.reference.linear import unpack_linear
from toka.kernels.registry import FLOATS

pytestmark = pytest.mark.usefixtures("cpp_kernels")

DTYPES = sorted(FLOATS, key=str)
# Half a unit in the last place of the stored result, and the sums' own rounding in float32.
RELATIVE_ERROR = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SHAPES = [(1, 1), (33, 7), (31, 16), (96, 130), (200, 576), (40, 3000)]


def product(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    panels_PIL = torch.ops.toka_cpp.pack_linear(weight_OI)
    out_NO: Tensor = torch.ops.toka_cpp.linear_packed(x_NI, panels_PIL, bias_O, weight_OI.shape[0])
    return out_NO


def inputs(num_rows: int, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(num_rows + out_features + in_features)
    shapes = (num_rows, in_features), (out_features, in_features), (out_features,)
    x_NI, weight_OI, bias_O = (torch.randn(shape, generator=random).to(dtype) for shape in shapes)
    return x_NI, weight_OI, bias_O


def assert_right(out_NO: Tensor, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> None:
    """Each output near the exact one, measured by the sum of the magnitudes that went into it."""
    bias = torch.zeros(len(weight_OI)) if bias_O is None else bias_O
    exact_NO = x_NI.double() @ weight_OI.double().t() + bias.double()
    size_NO = x_NI.double().abs() @ weight_OI.double().abs().t() + bias.double().abs()
    tolerance_NO = 2e-6 * size_NO + RELATIVE_ERROR[x_NI.dtype] * exact_NO.abs() + 1e-7
    assert out_NO.dtype == x_NI.dtype and out_NO.shape == exact_NO.shape
    assert ((out_NO.double() - exact_NO).abs() <= tolerance_NO).all()


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(0, 260),
    out_features=st.integers(1, 100),
    in_features=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
)
def test_any_shape_is_right(
    num_rows: int, out_features: int, in_features: int, dtype: torch.dtype, with_bias: bool
) -> None:
    x_NI, weight_OI, bias_O = inputs(num_rows, out_features, in_features, dtype)
    bias = bias_O if with_bias else None
    assert_right(product(x_NI, weight_OI, bias), x_NI, weight_OI, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 3, 14, 40, 300])
def test_rows_longer_than_a_chunk_are_right(num_rows: int, dtype: torch.dtype) -> None:
    x_NI, weight_OI, bias_O = inputs(num_rows, 70, 9001, dtype)
    assert_right(product(x_NI, weight_OI, bias_O), x_NI, weight_OI, bias_O)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_a_row_is_the_same_to_the_bit_alone_and_among_others(
    out_features: int, in_features: int, dtype: torch.dtype
) -> None:
    x_NI, weight_OI, bias_O = inputs(512, out_features, in_features, dtype)
    panels_PIL = torch.ops.toka_cpp.pack_linear(weight_OI)
    alone_NO = torch.cat([torch.ops.toka_cpp.linear_packed(x, panels_PIL, bias_O, out_features) for x in x_NI.split(1)])
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        for num_rows in (*range(1, 71), 127, 512):
            first = (512 - num_rows) // 2  # rows also change their place
            rows = slice(first, first + num_rows)
            out_NO = torch.ops.toka_cpp.linear_packed(x_NI[rows], panels_PIL, bias_O, out_features)
            assert torch.equal(out_NO, alone_NO[rows]), (num_rows, num_threads)


def test_a_neighbour_that_is_not_finite_changes_nothing() -> None:
    x_NI, weight_OI, _ = inputs(20, 64, 50, torch.float32)
    expected_NO = product(x_NI, weight_OI)
    x_NI[3], x_NI[17] = float("nan"), float("inf")
    others = [i for i in range(20) if i not in (3, 17)]
    assert torch.equal(product(x_NI, weight_OI)[others], expected_NO[others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs_are_read_where_they_lie(dtype: torch.dtype) -> None:
    x_NI, weight_OI, bias_O = inputs(37, 45, 100, dtype)
    expected_NO = product(x_NI[:, 30:70].contiguous(), weight_OI[:, 30:70].contiguous(), bias_O)
    assert torch.equal(product(x_NI[:, 30:70], weight_OI[:, 30:70], bias_O), expected_NO)
    across_NI = x_NI[:, 30:70].t().contiguous().t()
    assert torch.equal(product(across_NI, weight_OI[:, 30:70], bias_O), expected_NO)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("out_features", "in_features"), [*SHAPES, (3000, 64)])
def test_packing_there_and_back(out_features: int, in_features: int, dtype: torch.dtype) -> None:
    _, weight_OI, _ = inputs(0, out_features, in_features, dtype)
    panels_PIL = torch.ops.toka_cpp.pack_linear(weight_OI)
    assert torch.equal(panels_PIL, torch.ops.toka.pack_linear(weight_OI))
    assert torch.equal(unpack_linear(panels_PIL, out_features), weight_OI)


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_ids", [0, 1, 400])
def test_an_embedding_is_a_row_of_what_was_packed(num_ids: int, dtype: torch.dtype, id_dtype: torch.dtype) -> None:
    _, weight_OI, _ = inputs(0, 1000, 90, dtype)
    ids_N = torch.randint(1000, (num_ids,), generator=torch.Generator().manual_seed(num_ids)).to(id_dtype)
    rows_NI = torch.ops.toka_cpp.embedding_packed(ids_N, torch.ops.toka_cpp.pack_linear(weight_OI))
    assert torch.equal(rows_NI, weight_OI[ids_N.long()])


def test_what_does_not_fit_is_refused() -> None:
    x_NI, weight_OI, bias_O = inputs(2, 40, 10, torch.float32)
    panels_PIL = torch.ops.toka_cpp.pack_linear(weight_OI)
    linear_packed, embedding_packed = torch.ops.toka_cpp.linear_packed, torch.ops.toka_cpp.embedding_packed
    with pytest.raises(RuntimeError, match="x has 9 features, the panels have 10"):
        linear_packed(x_NI[:, :9], panels_PIL, None, 40)
    with pytest.raises(RuntimeError, match="2 panels don't hold 65 out features"):
        linear_packed(x_NI, panels_PIL, None, 2 * PANEL_WIDTH + 1)
    with pytest.raises(RuntimeError, match="x and the panels must have one dtype"):
        linear_packed(x_NI.bfloat16(), panels_PIL, None, 40)
    with pytest.raises(RuntimeError, match="the bias must be"):
        linear_packed(x_NI, panels_PIL, bias_O[:39], 40)
    with pytest.raises(RuntimeError, match="panels contiguous"):
        linear_packed(x_NI, panels_PIL.transpose(1, 2).contiguous().transpose(1, 2), None, 40)
    for outside in (-1, 2 * PANEL_WIDTH):
        with pytest.raises(RuntimeError, match=f"id {outside} is outside of the 64 packed rows"):
            embedding_packed(torch.tensor([0, outside]), panels_PIL)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [0, 1, 5, 33, 300])
@pytest.mark.parametrize("in_features", [50, 3000])
@pytest.mark.parametrize("before", ["plain", "norm", "gate"])
def test_what_stands_around_a_product_is_computed_with_it(
    before: str, in_features: int, num_rows: int, dtype: torch.dtype
) -> None:
    x_NI, weight_OI, bias_O = inputs(num_rows, 70, in_features, dtype)
    if before == "gate":
        x_NI = torch.cat((x_NI, x_NI.flip(-1)), 1)
    norm_weight_I = torch.rand(in_features).to(dtype) if before == "norm" else None
    residual_NO = torch.randn(num_rows, 140).to(dtype)[:, 35:105]
    panels_PIL = torch.ops.toka_cpp.pack_linear(weight_OI)
    arguments = (x_NI, panels_PIL, bias_O, 70, norm_weight_I, 1e-5, before == "gate", residual_NO)
    found, expected = torch.ops.toka_cpp.linear_packed(*arguments), torch.ops.toka.linear_packed(*arguments)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * 30)


def test_fusions_that_do_not_fit_are_refused() -> None:
    x_NI, weight_OI, _ = inputs(2, 40, 10, torch.float32)
    panels_PIL = torch.ops.toka_cpp.pack_linear(weight_OI)
    linear = torch.ops.toka_cpp.linear_packed
    with pytest.raises(RuntimeError, match="the norm's weight must be"):
        linear(x_NI, panels_PIL, None, 40, torch.ones(9), 1e-5)
    with pytest.raises(RuntimeError, match="x is either normed or gated"):
        linear(torch.cat((x_NI, x_NI), 1), panels_PIL, None, 40, torch.ones(10), 1e-5, True)
    with pytest.raises(RuntimeError, match="x has 5 features, the panels have 10"):
        linear(x_NI, panels_PIL, None, 40, None, 0.0, True)
    with pytest.raises(RuntimeError, match="the residual must be"):
        linear(x_NI, panels_PIL, None, 40, None, 0.0, False, torch.zeros(3, 40))
