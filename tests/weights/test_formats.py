"""Formats of integer codes: GGUF blocks against the gguf library's own dequantisation, rounding at load, and which weight gets which."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from safetensors.torch import save_file
from torch import Tensor, nn

from toka.errors import ConfigError
from toka.weights.formats import QuantizeFlags, plan_formats
from toka.weights.gguf_codes import gguf_codes
from toka.weights.gguf_reader import GgufReader
from toka.weights.integer_codes import IntegerCodes
from toka.weights.round_to_nearest import RoundToNearest
from toka.weights.safetensors_reader import SafetensorsReader
from toka.weights.weight import DENSE, Piece, Weight

CPU = torch.device("cpu")
FLAGS = QuantizeFlags("auto", (), lm_head=False, int8_activations=True)
GGUF_TYPES = ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"]
NAME = "blk.0.ffn_down.weight"
HF_NAME = "model.layers.0.mlp.down_proj.weight"


def blocks_of(type_name: str, shape: tuple[int, int]) -> np.ndarray:
    """A tensor of this block type; where the library cannot quantise, random blocks with sane scales."""
    kind, generator = GGMLQuantizationType[type_name], np.random.default_rng(0)
    if type_name in ("Q4_0", "Q4_1", "Q8_0"):
        return quants.quantize(generator.standard_normal(shape).astype(np.float32), kind)
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (shape[0], shape[1] // block_size, block_bytes), dtype=np.uint8)
    halves = {"Q4_K": (0, 2), "Q6_K": (208,)}[type_name]
    for start in halves:
        scale = generator.uniform(-0.01, 0.01, blocks.shape[:2]).astype(np.float16)
        blocks[..., start : start + 2] = scale[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)


@pytest.fixture
def write_matrix(
    write_gguf: Callable[..., Path], tmp_path: Path
) -> Callable[[str, tuple[int, int]], tuple[Path, Tensor]]:
    """A file with one matrix beside its embedding, and what the library makes of the matrix."""

    def write(type_name: str, shape: tuple[int, int]) -> tuple[Path, Tensor]:
        blocks, kind = blocks_of(type_name, shape), GGMLQuantizationType[type_name]
        path = write_gguf(
            tmp_path / "model.gguf", {"token_embd.weight": np.zeros((10, 256)), NAME: (blocks, kind, True)}
        )
        return path, torch.from_numpy(quants.dequantize(blocks, kind))

    return write


WriteMatrix = Callable[[str, tuple[int, int]], tuple[Path, Tensor]]


def loaded(weight: Weight, reader: GgufReader | SafetensorsReader, name: str, piece: Piece | None = None) -> Tensor:
    weight.load(reader, name, CPU, piece)
    return weight.as_tensor()


@pytest.mark.parametrize("type_name", GGUF_TYPES)
def test_gguf_blocks_are_what_the_library_says(type_name: str, write_matrix: WriteMatrix) -> None:
    path, expected = write_matrix(type_name, (96, 512))
    reader = GgufReader(path)
    format = plan_formats(path, {}, FLAGS).format_of(HF_NAME)
    weight = Weight((96, 512), torch.float32, format)
    # Scales of the K types are products, which float16 rounds by a 2048th.
    rtol = 6e-4 if type_name.endswith("K") else 0
    found = loaded(weight, reader, HF_NAME)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * float(expected.abs().max()) / 4)
    assert format.name == f"gguf_{type_name.lower()}" and weight.num_bytes() < expected.numel() * 1.2


@pytest.mark.parametrize("type_name", GGUF_TYPES)
def test_pieces_of_a_weight_are_pieces_of_the_whole(type_name: str, write_matrix: WriteMatrix) -> None:
    reader = GgufReader(write_matrix(type_name, (96, 512))[0])
    format = gguf_codes(type_name, int8_activations=True)
    assert format is not None
    whole = loaded(Weight((96, 512), torch.float32, format), reader, HF_NAME)
    for piece in (Piece(0, 1, 2), Piece(1, 1, 2)):
        part = loaded(Weight((96, 512), torch.float32, format), reader, HF_NAME, piece)
        assert torch.equal(part, whole[piece.bounds((96, 512))])


def test_a_piece_of_a_row_that_is_one_group_has_its_scale(tmp_path: Path) -> None:
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    reader, format = checkpoint(tmp_path, values), RoundToNearest("int8_channel", 8, 0, False, False)
    whole = loaded(Weight((64, 256), torch.float32, format), reader, HF_NAME)
    part = loaded(Weight((64, 256), torch.float32, format), reader, HF_NAME, Piece(1, 1, 2))
    assert torch.equal(part, whole[:, 128:])


def test_a_cut_inside_of_a_group_is_refused(write_matrix: WriteMatrix) -> None:
    path, _ = write_matrix("Q4_1", (96, 96))
    format = gguf_codes("Q4_1", int8_activations=True)
    assert format is not None
    with pytest.raises(ConfigError, match="48 in features does not divide into groups of 32"):
        loaded(Weight((96, 96), torch.float32, format), GgufReader(path), HF_NAME, Piece(1, 0, 2))


def checkpoint(directory: Path, values: Tensor) -> SafetensorsReader:
    save_file({HF_NAME: values}, directory / "model.safetensors")
    return SafetensorsReader(directory)


# Largest error of a value in steps of its group's scale; clipping costs more than half a step at the ends.
@pytest.mark.parametrize(
    ("name", "max_relative_error"),
    [
        ("int8_channel", 0.01),
        ("gguf_q8_0", 0.006),
        ("int4_group32", 0.12),
        ("int4_group128", 0.15),
        ("gguf_q4_0", 0.14),
    ],
)
def test_rounding_is_near(name: str, max_relative_error: float, tmp_path: Path) -> None:
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    format = plan_formats(tmp_path, {}, QuantizeFlags(name, (), False, True)).format_of(HF_NAME)
    found = loaded(Weight((64, 256), torch.float32, format), checkpoint(tmp_path, values), HF_NAME)
    error = float((found - values).norm() / values.norm())
    assert error < max_relative_error


def test_clipping_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    format = RoundToNearest("int4_group128", 4, 128, True, True)

    def error() -> float:
        coded = format.quantise(values)
        assert coded.minimums is not None
        grouped = coded.codes.view(64, 2, 128) * coded.scales[..., None] + coded.minimums[..., None]
        return float((grouped.flatten(1) - values).square().sum())

    searched = error()
    monkeypatch.setattr("toka.weights.round_to_nearest._CLIPS", (1.0,))
    assert searched < 0.95 * error()


def test_what_is_on_the_grid_stays_as_it_is(write_matrix: WriteMatrix) -> None:
    path, expected = write_matrix("Q4_1", (96, 512))
    format = plan_formats(path, {}, QuantizeFlags("int4_group32", (), False, True)).format_of(HF_NAME)
    found = loaded(Weight((96, 512), torch.float32, format), GgufReader(path), HF_NAME)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)


def test_rows_of_equal_values_survive(tmp_path: Path) -> None:
    values = torch.zeros(4, 64)
    values[1], values[2] = 3.0, -0.5
    for name in ("int4_group32", "int8_channel", "gguf_q4_0"):
        format = plan_formats(tmp_path, {}, QuantizeFlags(name, (), False, True)).format_of(HF_NAME)
        found = loaded(Weight((4, 64), torch.float32, format), checkpoint(tmp_path, values), HF_NAME)
        torch.testing.assert_close(found, values, rtol=2e-3, atol=1e-3)


class Model(nn.Module):
    """What a plan is applied to: a matrix, a norm and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.norm = Weight((64, 64), torch.float32), Weight((64,), torch.float32)
        self.embed_tokens = Weight((64, 64), torch.float32)

    def checkpoint_name(self, weight: str) -> str:
        return {"proj": "model.layers.3.proj.weight", "embed_tokens": "model.embed_tokens.weight"}[weight]


@pytest.mark.parametrize(
    ("flags", "proj", "embedding"),
    [
        (QuantizeFlags("int8_channel", (), False, True), "int8_channel", "dense"),
        (QuantizeFlags("int8_channel", (), True, True), "int8_channel", "int8_channel"),
        (QuantizeFlags("int8_channel", ("*.3.*",), True, True), "dense", "int8_channel"),
        (QuantizeFlags("none", (), False, True), "dense", "dense"),
        (QuantizeFlags("auto", (), False, True), "dense", "dense"),
    ],
)
def test_which_weight_gets_which_format(flags: QuantizeFlags, proj: str, embedding: str, tmp_path: Path) -> None:
    model = Model()
    plan_formats(tmp_path, {}, flags).apply(model)
    assert (model.proj.format.name, model.embed_tokens.format.name) == (proj, embedding)
    assert model.norm.format is DENSE


def test_who_leaves_activations_open_asks_the_flag(tmp_path: Path) -> None:
    for name, asked, expected in (
        ("int8_channel", True, False),
        ("int8_channel_dynamic", False, True),
        ("int4_group32", True, True),
        ("int4_group32", False, False),
    ):
        format = plan_formats(tmp_path, {}, QuantizeFlags(name, (), False, asked)).format_of(HF_NAME)
        assert isinstance(format, IntegerCodes) and format.int8_activations is expected


def test_flags_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quantize_exclude and quantize_lm_head"):
        plan_formats(tmp_path, {}, QuantizeFlags("auto", ("*",), False, True))
    with pytest.raises(ConfigError, match="does not divide into groups of 128"):
        Weight((4, 64), torch.float32, RoundToNearest("int4_group128", 4, 128, True, True))


def test_without_kernels_gguf_is_inflated_and_nothing_rounded(write_matrix: WriteMatrix, tmp_path: Path) -> None:
    path, _ = write_matrix("Q4_1", (96, 512))
    nowhere = dataclasses.replace(FLAGS, has_kernels=False)
    assert plan_formats(path, {}, nowhere).format_of(HF_NAME) is DENSE
    with pytest.raises(
        ConfigError, match="quantize=int8_channel: this version multiplies with integer codes on the CPU only"
    ):
        plan_formats(tmp_path, {}, dataclasses.replace(nowhere, quantize="int8_channel"))


def test_rounding_what_is_no_float_is_refused(tmp_path: Path) -> None:
    format = plan_formats(tmp_path, {}, QuantizeFlags("int8_channel", (), False, True)).format_of(HF_NAME)
    with pytest.raises(ConfigError, match=r"quantize=int8_channel: tensor .* is stored as I8"):
        loaded(
            Weight((4, 64), torch.float32, format), checkpoint(tmp_path, torch.zeros(4, 64, dtype=torch.int8)), HF_NAME
        )
