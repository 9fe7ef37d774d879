"""toka_cpp::pack_quantised, linear_quantised_packed and embedding_quantised_packed against their references."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import toka.kernels.ops  # noqa: F401  (defines the operators)
from toka.kernels.reference import linear_quantised as reference

pytestmark = pytest.mark.usefixtures("cpp_kernels")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 6e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of the largest result


@dataclasses.dataclass(frozen=True)
class Layout:
    bits: int
    num_groups: int
    has_minimums: bool


LAYOUTS = [
    Layout(4, 3, True),
    Layout(4, 3, False),
    Layout(8, 3, False),
    Layout(8, 3, True),
    Layout(8, 1, False),
    Layout(8, 1, True),
    Layout(4, 1, False),
]


@dataclasses.dataclass(frozen=True)
class QuantisedWeight:
    codes: Tensor
    scales: Tensor
    minimums: Tensor | None
    layout: Layout

    @property
    def panels(self) -> Tensor:
        panels: Tensor = torch.ops.toka_cpp.pack_quantised(self.layout.bits, self.codes, self.scales, self.minimums)
        return panels

    def dequantised(self) -> Tensor:
        return reference.dequantise(self.codes, self.scales, self.minimums, self.layout.bits)


def random_weight(out_features: int, in_features: int, layout: Layout, seed: int = 0) -> QuantisedWeight:
    generator = torch.Generator().manual_seed(seed)
    num_bytes = in_features * layout.bits // 8
    codes = torch.randint(256, (out_features, num_bytes), generator=generator, dtype=torch.uint8)
    dtype = torch.float32 if layout.num_groups == 1 else torch.float16
    scales = (torch.rand(out_features, layout.num_groups, generator=generator) * 0.02 - 0.005).to(dtype)
    minimums = (-torch.rand(out_features, layout.num_groups, generator=generator) * 0.1).to(dtype)
    return QuantisedWeight(codes, scales, minimums if layout.has_minimums else None, layout)


def random_rows(num_rows: int, in_features: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(num_rows, in_features, generator=torch.Generator().manual_seed(seed)).to(dtype)


def product(
    x_NI: Tensor,
    weight: QuantisedWeight,
    int8_activations: bool,
    bias_O: Tensor | None = None,
    panels: Tensor | None = None,
) -> Tensor:
    layout, out_features = weight.layout, weight.codes.shape[0]
    out_NO: Tensor = torch.ops.toka_cpp.linear_quantised_packed(
        x_NI,
        weight.panels if panels is None else panels,
        bias_O,
        out_features,
        *dataclasses.astuple(layout),
        int8_activations,
    )
    return out_NO


def assert_right(x_NI: Tensor, weight: QuantisedWeight, int8_activations: bool, bias_O: Tensor | None = None) -> None:
    out_NO = product(x_NI, weight, int8_activations, bias_O)
    expected_NO = torch.ops.toka.linear_quantised(
        x_NI, weight.codes, weight.scales, weight.minimums, bias_O, weight.layout.bits, int8_activations
    )
    assert out_NO.dtype == x_NI.dtype and out_NO.shape == expected_NO.shape
    if expected_NO.numel():
        largest = float(expected_NO.float().abs().max())
        torch.testing.assert_close(out_NO, expected_NO, rtol=0, atol=TOLERANCE[x_NI.dtype] * max(largest, 1e-3))


@pytest.mark.parametrize("int8_activations", [True, False], ids=["int8", "float"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@settings(deadline=None, max_examples=60)
@given(
    num_rows=st.integers(0, 70), out_features=st.integers(1, 100), group=st.integers(1, 8), dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
)  # fmt: skip
def test_any_shape_is_right(
    layout: Layout,
    int8_activations: bool,
    num_rows: int,
    out_features: int,
    group: int,
    dtype: torch.dtype,
    with_bias: bool,
) -> None:
    in_features = layout.num_groups * 8 * group if layout.num_groups > 1 else 10 * group
    weight = random_weight(out_features, in_features, layout, seed=num_rows)
    bias_O = random_rows(1, out_features, dtype)[0] if with_bias else None
    assert_right(random_rows(num_rows, in_features, dtype), weight, int8_activations, bias_O)


@pytest.mark.parametrize("int8_activations", [True, False], ids=["int8", "float"])
@pytest.mark.parametrize("layout", [Layout(4, 80, True), Layout(8, 80, False), Layout(8, 1, False)], ids=str)
@pytest.mark.parametrize("num_rows", [1, 6, 40, 700])
def test_long_rows_are_right(layout: Layout, int8_activations: bool, num_rows: int) -> None:
    assert_right(random_rows(num_rows, 2560, torch.float32), random_weight(70, 2560, layout), int8_activations)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("int8_activations", [True, False], ids=["int8", "float"])
@pytest.mark.parametrize("layout", [Layout(4, 6, True), Layout(8, 6, False), Layout(8, 1, False)], ids=str)
def test_a_row_is_the_same_to_the_bit_alone_and_among_others(layout: Layout, int8_activations: bool) -> None:
    weight, x_NI = random_weight(600, 384, layout), random_rows(300, 384, torch.float32)
    panels = weight.panels
    alone_NO = torch.cat([product(x, weight, int8_activations, panels=panels) for x in x_NI.split(1)])
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        for num_rows in (*range(1, 40), 127, 300):
            rows = slice((300 - num_rows) // 2, (300 - num_rows) // 2 + num_rows)  # rows also change their place
            out_NO = product(x_NI[rows], weight, int8_activations, panels=panels)
            assert torch.equal(out_NO, alone_NO[rows]), (num_rows, num_threads)


@pytest.mark.parametrize("int8_activations", [True, False], ids=["int8", "float"])
def test_a_row_that_is_not_finite_tells_so_and_changes_no_other(int8_activations: bool) -> None:
    weight, x_NI = random_weight(64, 96, Layout(4, 3, True)), random_rows(20, 96, torch.float32)
    expected_NO = product(x_NI, weight, int8_activations)
    x_NI[3, 5], x_NI[17, 90] = float("nan"), float("inf")
    out_NO = product(x_NI, weight, int8_activations)
    others = [i for i in range(20) if i not in (3, 17)]
    assert torch.equal(out_NO[others], expected_NO[others])
    assert not out_NO[[3, 17]].isfinite().any()


def test_rows_of_zeros_and_tiny_values_give_what_the_minimums_say() -> None:
    weight = random_weight(40, 96, Layout(4, 3, True))
    x_NI = torch.stack((torch.zeros(96), torch.full((96,), 1e-38)))
    assert torch.equal(product(x_NI, weight, True), torch.zeros(2, 40))


def test_int8_activations_are_as_near_as_their_steps() -> None:
    weight, x_NI = random_weight(64, 96, Layout(8, 3, False)), random_rows(30, 96, torch.float32)
    rounded = reference.quantise_activations(x_NI, 3)
    steps = x_NI.view(30, 3, 32).abs().amax(-1, keepdim=True) / 127
    assert bool(((rounded - x_NI).view(30, 3, 32).abs() <= steps / 2 * (1 + 1e-5)).all())
    assert_right(rounded, weight, int8_activations=False)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("out_features", [1, 32, 75])
def test_packing_there_and_back(layout: Layout, out_features: int) -> None:
    in_features = 48 if layout.num_groups > 1 else 20
    weight = random_weight(out_features, in_features, layout)
    panels = weight.panels
    assert torch.equal(panels, torch.ops.toka.pack_quantised(layout.bits, weight.codes, weight.scales, weight.minimums))
    codes, scales, _ = reference.unpack_quantised(panels, in_features, *dataclasses.astuple(layout))
    assert torch.equal(codes[:out_features], reference.unpack_codes(weight.codes, layout.bits))
    assert torch.equal(scales[:out_features], weight.scales)


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_an_embedding_is_a_row_of_what_was_packed(layout: Layout, dtype: torch.dtype, id_dtype: torch.dtype) -> None:
    in_features = 96 if layout.num_groups > 1 else 20
    weight = random_weight(1000, in_features, layout)
    ids_N = torch.randint(1000, (300,), generator=torch.Generator().manual_seed(2)).to(id_dtype)
    rows_NI = torch.ops.toka_cpp.embedding_quantised_packed(
        ids_N, weight.panels, in_features, *dataclasses.astuple(layout), dtype
    )
    expected_NI = weight.dequantised()[ids_N.long()].to(dtype)
    torch.testing.assert_close(rows_NI, expected_NI, rtol=1e-2 if dtype != torch.float32 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("int8_activations", [True, False], ids=["int8", "float"])
@pytest.mark.parametrize("layout", [Layout(4, 3, True), Layout(8, 1, False)], ids=str)
@pytest.mark.parametrize("num_rows", [1, 40])
@pytest.mark.parametrize("before", ["norm", "gate"])
def test_what_stands_around_a_product_is_computed_with_it(
    before: str, num_rows: int, layout: Layout, int8_activations: bool
) -> None:
    weight, x_NI = random_weight(70, 96, layout), random_rows(num_rows, 192 if before == "gate" else 96, torch.float32)
    norm_weight_I = torch.rand(96) if before == "norm" else None
    arguments = (x_NI, weight.panels, None, 70, *dataclasses.astuple(layout), int8_activations)
    fusions = (norm_weight_I, 1e-5, before == "gate", random_rows(num_rows, 70, torch.float32))
    found = torch.ops.toka_cpp.linear_quantised_packed(*arguments, *fusions)
    expected = torch.ops.toka.linear_quantised_packed(*arguments, *fusions)
    # A rounding of what is normed or gated may move an activation by a whole step.
    step = float(x_NI.abs().max()) ** 2 / 127 * float(weight.dequantised().abs().max()) if int8_activations else 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 + step)


def test_what_does_not_fit_is_refused() -> None:
    weight, x_NI = random_weight(40, 96, Layout(4, 3, True)), random_rows(2, 96, torch.float32)
    linear, pack = torch.ops.toka_cpp.linear_quantised_packed, torch.ops.toka_cpp.pack_quantised
    panels = weight.panels
    with pytest.raises(RuntimeError, match=r"the panels must be contiguous \[2, "):
        linear(x_NI, panels, None, 40, 8, 3, True, True)
    with pytest.raises(RuntimeError, match="96 in features don't divide into 5 groups"):
        linear(x_NI, panels, None, 40, 4, 5, True, True)
    with pytest.raises(RuntimeError, match="weights of 3 bits"):
        linear(x_NI, panels, None, 40, 3, 3, True, True)
    with pytest.raises(RuntimeError, match="the bias must be"):
        linear(x_NI, panels, torch.zeros(39), 40, 4, 3, True, True)
    with pytest.raises(RuntimeError, match="groups of 12 in features are no multiple of 8"):
        pack(4, weight.codes, torch.zeros(40, 8, dtype=torch.float16), None)
    with pytest.raises(RuntimeError, match="scales must be Half"):
        pack(4, weight.codes, weight.scales.float(), None)
    with pytest.raises(RuntimeError, match="id 64 is outside of the 64 packed rows"):
        torch.ops.toka_cpp.embedding_quantised_packed(torch.tensor([64]), panels, 96, 4, 3, True, torch.float32)
