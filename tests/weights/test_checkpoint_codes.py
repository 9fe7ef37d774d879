"""GPTQ, AWQ and compressed-tensors checkpoints: packed here bit by bit as their papers' tools do, and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from toka.errors import ConfigError
from toka.weights.formats import QuantizeFlags, plan_formats
from toka.weights.quantization_config import stored_format
from toka.weights.safetensors_reader import SafetensorsReader
from toka.weights.weight import DENSE, Piece, Weight

CPU = torch.device("cpu")
PREFIX = "model.layers.0.mlp.down_proj"
NAME = f"{PREFIX}.weight"
OUT, IN, GROUP = 64, 128, 32
FLAGS = QuantizeFlags("auto", (), lm_head=False, int8_activations=True)


def packed_words(codes: Tensor, bits: int) -> Tensor:
    """[n, m] codes → int32 [n, m * bits / 32]: one stream of bits a row, the lowest first."""
    rows = []
    for row in codes.tolist():
        stream = sum(code << (bits * i) for i, code in enumerate(row))
        words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(len(row) * bits // 32)]
        rows.append([word - (1 << 32) if word >= 1 << 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def random_codes(bits: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(seed))


def scales_of(groups: int) -> Tensor:
    return (torch.rand(OUT, groups, generator=torch.Generator().manual_seed(3)) * 0.02 + 0.005).half()


def values(codes_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor, groups_I: Tensor) -> Tensor:
    """What the codes mean; groups_I: the group of each in feature."""
    return scales_OG.float()[:, groups_I] * (codes_OI - zeros_OG[:, groups_I]).float()


def load(directory: Path, tensors: dict[str, Tensor], config: dict[str, Any], piece: Piece | None = None) -> Weight:
    save_file(
        {f"{PREFIX}.{name}": tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors"
    )
    plan = plan_formats(directory, {"quantization_config": config}, FLAGS)
    weight = Weight((OUT, IN), torch.float32, plan.format_of(NAME))
    weight.load(SafetensorsReader(directory), NAME, CPU, piece)
    return weight


def assert_is(weight: Weight, expected_OI: Tensor, step: float = 1e-3) -> None:
    """The weight is what was stored, and products with it are products with that. step: float16's, of a minimum."""
    torch.testing.assert_close(weight.as_tensor(), expected_OI, rtol=1e-3, atol=step)
    x_NI = torch.randn(5, IN, generator=torch.Generator().manual_seed(4))
    error = (weight.linear(x_NI) - x_NI @ expected_OI.t()).norm() / (x_NI @ expected_OI.t()).norm()
    assert error < 0.02  # activations are rounded to int8


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("desc_act", [False, True], ids=["in order", "act-order"])
@pytest.mark.parametrize("sym", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(bits: int, sym: bool, desc_act: bool, version: str, tmp_path: Path) -> None:
    codes_OI, num_groups = random_codes(bits, OUT, IN), IN // GROUP
    zeros_OG = (
        torch.full((OUT, num_groups), 2 ** (bits - 1)) if sym else random_codes(bits, OUT, num_groups).clamp(min=1)
    )
    groups_I = torch.arange(IN) // GROUP
    if desc_act:
        groups_I = groups_I[torch.randperm(IN, generator=torch.Generator().manual_seed(1))]
    stored_zeros_OG = zeros_OG - (1 if version == "gptq" else 0)
    tensors = {
        "qweight": packed_words(codes_OI, bits).t(),
        "qzeros": packed_words(stored_zeros_OG.t(), bits),
        "scales": scales_of(num_groups).t(),
        "g_idx": groups_I.int(),
    }
    config = {
        "quant_method": "gptq", "bits": bits, "group_size": GROUP, "sym": sym, "desc_act": desc_act, "checkpoint_format": version,
    }  # fmt: skip
    weight = load(tmp_path, tensors, config)
    assert_is(weight, values(codes_OI, scales_of(num_groups), zeros_OG, groups_I), step=3e-3 if bits == 8 else 1e-3)
    assert weight.format.name == f"gptq_int{bits}"


def test_awq(tmp_path: Path) -> None:
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def packed(codes: Tensor) -> Tensor:
        """[n, O] → int32 [n, O / 8]: nibble i of a word holds output order[i]."""
        return packed_words(codes.view(codes.shape[0], -1, 8)[..., order].flatten(1), 4)

    codes_OI, zeros_OG, scales_OG = (
        random_codes(4, OUT, IN),
        random_codes(4, OUT, IN // GROUP, seed=1),
        scales_of(IN // GROUP),
    )
    tensors = {"qweight": packed(codes_OI.t()), "qzeros": packed(zeros_OG.t()), "scales": scales_OG.t()}
    weight = load(tmp_path, tensors, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"})
    assert_is(weight, values(codes_OI, scales_OG, zeros_OG, torch.arange(IN) // GROUP))


def compressed(bits: int, kind: str, strategy: str, symmetric: bool, actorder: str | None = None) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "actorder": actorder}
    group = {"targets": ["Linear"], "weights": {**weights, "group_size": GROUP if strategy == "group" else None}}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


@pytest.mark.parametrize("actorder", [None, "group"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("strategy", ["group", "channel"])
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_packed(
    bits: int, strategy: str, symmetric: bool, actorder: str | None, tmp_path: Path
) -> None:
    if actorder and strategy == "channel":
        pytest.skip("one group has no order")
    num_groups, half = IN // GROUP if strategy == "group" else 1, 2 ** (bits - 1)
    codes_OI, scales_OG = random_codes(bits, OUT, IN), scales_of(num_groups)
    zeros_OG = torch.full((OUT, num_groups), half) if symmetric else random_codes(bits, OUT, num_groups)
    groups_I = torch.arange(IN) * num_groups // IN
    if actorder:
        groups_I = groups_I[torch.randperm(IN, generator=torch.Generator().manual_seed(1))]
    tensors = {
        "weight_packed": packed_words(codes_OI, bits),
        "weight_scale": scales_OG.bfloat16(),
        "weight_shape": torch.tensor([OUT, IN]),
        **({} if symmetric else {"weight_zero_point": packed_words(zeros_OG.t(), bits).t()}),
        **({"weight_g_idx": groups_I.int()} if actorder else {}),
    }
    weight = load(tmp_path, tensors, compressed(bits, "pack-quantized", strategy, symmetric, actorder))
    expected_OI = values(codes_OI, scales_OG.bfloat16(), zeros_OG, groups_I)
    assert_is(weight, expected_OI, step=3e-3 if bits == 8 else 1e-3)


def test_compressed_tensors_w8a8(tmp_path: Path) -> None:
    codes_OI, scales_O1 = random_codes(8, OUT, IN) - 128, scales_of(1).float()
    config = compressed(8, "int-quantized", "channel", symmetric=True)
    config["config_groups"]["group_0"]["input_activations"] = {
        "num_bits": 8,
        "type": "int",
        "dynamic": True,
        "strategy": "token",
    }
    weight = load(tmp_path, {"weight": codes_OI.to(torch.int8), "weight_scale": scales_O1}, config)
    assert_is(weight, codes_OI * scales_O1)
    assert weight.format.int8_activations  # type: ignore[attr-defined]


def test_pieces_are_pieces_of_the_whole(tmp_path: Path) -> None:
    codes_OI, scales_OG = random_codes(4, OUT, IN), scales_of(IN // GROUP)
    tensors = {
        "weight_packed": packed_words(codes_OI, 4),
        "weight_scale": scales_OG,
        "weight_shape": torch.tensor([OUT, IN]),
    }
    config = compressed(4, "pack-quantized", "group", symmetric=True)
    whole = load(tmp_path, tensors, config).as_tensor()
    for piece in (Piece(0, 1, 2), Piece(1, 1, 2)):
        assert torch.equal(load(tmp_path, tensors, config, piece).as_tensor(), whole[piece.bounds((OUT, IN))])


def test_weights_that_were_left_out_are_dense(tmp_path: Path) -> None:
    tensors = {"weight_packed": packed_words(random_codes(4, OUT, IN), 4), "weight_scale": scales_of(4)}
    save_file({f"{PREFIX}.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    config = compressed(4, "pack-quantized", "group", symmetric=True)
    plan = plan_formats(tmp_path, {"quantization_config": config}, FLAGS)
    assert plan.format_of(NAME) is not DENSE and plan.format_of("model.layers.1.mlp.down_proj.weight") is DENSE


@pytest.mark.parametrize(
    "flags", [QuantizeFlags("none", (), False, True), QuantizeFlags("auto", (), False, True, has_kernels=False)]
)
def test_codes_that_nobody_wants_are_inflated(flags: QuantizeFlags, tmp_path: Path) -> None:
    codes_OI, scales_OG = random_codes(4, OUT, IN), scales_of(IN // GROUP)
    tensors = {
        "weight_packed": packed_words(codes_OI, 4),
        "weight_scale": scales_OG,
        "weight_shape": torch.tensor([OUT, IN]),
    }
    config = compressed(4, "pack-quantized", "group", symmetric=True)
    kept = load(tmp_path, tensors, config)
    plan = plan_formats(tmp_path, {"quantization_config": config}, flags)
    inflated = Weight((OUT, IN), torch.bfloat16, plan.format_of(NAME))
    inflated.load(SafetensorsReader(tmp_path), NAME, CPU, Piece(1, 1, 2))
    assert torch.equal(inflated.as_tensor(), kept.as_tensor()[:, IN // 2 :].bfloat16())
    assert inflated.num_bytes() == OUT * IN // 2 * 2 and list(inflated.parts()) == ["dense"]


def test_a_configuration_alone_tells_too(tmp_path: Path) -> None:
    config = compressed(4, "pack-quantized", "group", symmetric=True)
    plan = plan_formats(tmp_path, {"quantization_config": config}, FLAGS)
    assert plan.format_of(NAME) is not DENSE and plan.format_of("lm_head.weight") is DENSE


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' is not supported"),
        ({"quant_method": "gptq", "bits": 5, "group_size": 32}, "bits must be one of 2, 3, 4, 8, got 5"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 33}, "group_size must be -1 or a multiple of 8, got 33"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"x": {}}}, "dynamic"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, "version: gemv"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "format: marlin-24"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "config_groups: 0 groups"),
    ],
)
def test_what_is_not_supported_is_named(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"quantization_config: .*{said}"):
        stored_format(config, int8_activations=True)


def test_tensors_that_contradict_the_configuration_are_refused(tmp_path: Path) -> None:
    config = compressed(4, "pack-quantized", "group", symmetric=True)
    tensors = {"weight_packed": packed_words(random_codes(4, OUT, IN), 4), "weight_shape": torch.tensor([OUT, IN])}
    with pytest.raises(ConfigError, match=r"scales are of shape \[64, 2\], expected \[64, 4\]"):
        load(tmp_path, {**tensors, "weight_scale": scales_of(2)}, config)
    zeros = packed_words(random_codes(4, IN // GROUP, OUT), 4)
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True}
    tensors = {"qweight": packed_words(random_codes(4, OUT, IN), 4).t(), "qzeros": zeros, "scales": scales_of(4).t()}
    with pytest.raises(ConfigError, match="zero points differ from the middle"):
        load(tmp_path, {**tensors, "g_idx": (torch.arange(IN) // GROUP).int()}, gptq)


def test_rounding_a_quantised_checkpoint_again_is_refused(tmp_path: Path) -> None:
    flags = QuantizeFlags("int8_channel", (), lm_head=False, int8_activations=True)
    with pytest.raises(ConfigError, match=r"quantize=int8_channel: the checkpoint is quantised already \(gptq\)"):
        plan_formats(tmp_path, {"quantization_config": {"quant_method": "gptq"}}, flags)
