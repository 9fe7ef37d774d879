"""References of the operators over weights of integer codes with scales; op_schema.py says what the tensors hold.

Legend: N rows, I in features, O out features, G groups of neighbouring in features, K = I / G features of a group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from toka.kernels.op_schema import PANEL_WIDTH, QUAD
from toka.kernels.reference.linear import before_product

_MAX_ACTIVATION_CODE = 127.0
_SMALLEST_MAGNITUDE = (
    1e-30  # a group of activations below is taken for zeros: the inverse of its scale would be infinite
)


def unpack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 [O, I * bits / 8] → uint8 [O, I]; of 4 bits the even in feature is in the low half of its byte."""
    if bits == 8:
        return codes
    return torch.stack((codes & 15, codes >> 4), -1).flatten(1)


def dequantise(codes: Tensor, scales_OG: Tensor, minimums_OG: Tensor | None, bits: int) -> Tensor:
    """The weight as float32 [O, I]."""
    codes_OI = unpack_codes(codes, bits)
    out_features, in_features = codes_OI.shape
    scales_OG1 = scales_OG.float()[:, :, None]
    minimums_OG1 = -(2.0 ** (bits - 1)) * scales_OG1 if minimums_OG is None else minimums_OG.float()[:, :, None]
    grouped_OGK = codes_OI.view(out_features, scales_OG.shape[1], -1).float()
    return (grouped_OGK * scales_OG1 + minimums_OG1).view(out_features, in_features)


def quantise_activations(x_NI: Tensor, num_groups: int) -> Tensor:
    """Each row and group rounded to 255 steps between minus and plus its largest magnitude, as float32 [N, I] again."""
    x_NGK: Tensor = torch.unflatten(x_NI.float(), 1, (num_groups, -1))
    largest_NG1 = x_NGK.abs().amax(-1, keepdim=True)
    code_NG1 = torch.full_like(largest_NG1, _MAX_ACTIVATION_CODE)  # a number / tensor would be rounded twice
    inverse_NG1 = torch.where(largest_NG1 > _SMALLEST_MAGNITUDE, code_NG1 / largest_NG1, 0.0)
    codes_NGK = torch.round(x_NGK * inverse_NG1)
    return (codes_NGK * (largest_NG1 / _MAX_ACTIVATION_CODE)).view(x_NI.shape)


def linear_quantised(
    x_NI: Tensor,
    codes: Tensor,
    scales_OG: Tensor,
    minimums_OG: Tensor | None,
    bias_O: Tensor | None,
    bits: int,
    int8_activations: bool,
) -> Tensor:
    """x · weightᵀ + bias in x's dtype, computed in float32."""
    x_wide_NI = quantise_activations(x_NI, scales_OG.shape[1]) if int8_activations else x_NI.float()
    weight_OI = dequantise(codes, scales_OG, minimums_OG, bits)
    return F.linear(x_wide_NI, weight_OI, None if bias_O is None else bias_O.float()).to(x_NI.dtype)


def embedding_quantised(
    ids_N: Tensor, codes: Tensor, scales_OG: Tensor, minimums_OG: Tensor | None, bits: int, dtype: torch.dtype
) -> Tensor:
    """Rows ids_N (int32 or int64) of the weight; [N, I]."""
    ids = ids_N.long()
    minimums = None if minimums_OG is None else minimums_OG[ids]
    return dequantise(codes[ids], scales_OG[ids], minimums, bits).to(dtype)


# ---------------------------------------------------------------------------------------------------------------- panels


def group_num_bytes(in_features: int, num_groups: int, bits: int, has_minimums: bool) -> int:
    """Bytes of one group of one panel; the layout is kernels/cpp/quantised.h's."""
    padded = -(-(in_features // num_groups) // (2 * QUAD)) * 2 * QUAD
    scale_bytes = 4 if num_groups == 1 else 2
    return PANEL_WIDTH * (padded * bits // 8 + scale_bytes * (2 if has_minimums else 1))


def pack_quantised(bits: int, codes: Tensor, scales_OG: Tensor, minimums_OG: Tensor | None = None) -> Tensor:
    """Panels uint8 [ceil(O / PANEL_WIDTH), bytes of a panel]."""
    codes_OI = unpack_codes(codes, bits)
    (out_features, in_features), num_groups = codes_OI.shape, scales_OG.shape[1]
    num_panels, group_size = -(-out_features // PANEL_WIDTH), in_features // num_groups
    padding = -group_size % (2 * QUAD)
    missing = num_panels * PANEL_WIDTH - out_features
    quads_PLGQ4 = F.pad(codes_OI.view(out_features, num_groups, group_size), (0, padding, 0, 0, 0, missing))
    quads_PLGQ4 = quads_PLGQ4.view(num_panels, PANEL_WIDTH, num_groups, -1, QUAD)
    panels = quads_PLGQ4.permute(0, 2, 3, 1, 4)  # [P, G, quads, lane, 4]
    if bits == 4:
        panels = panels[:, :, 0::2] | panels[:, :, 1::2] << 4
    parts = [panels.flatten(2)]
    for each_OG in (scales_OG, minimums_OG):
        if each_OG is not None:
            each_PGL = F.pad(each_OG, (0, 0, 0, missing)).view(num_panels, PANEL_WIDTH, num_groups).transpose(1, 2)
            parts.append(each_PGL.contiguous().view(torch.uint8).flatten(2))
    return torch.cat(parts, -1).flatten(1)


def unpack_quantised(
    panels: Tensor, in_features: int, bits: int, num_groups: int, has_minimums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [O, I], scales and minimums [O, G] (those of symmetric codes made explicit), O rounded up to whole panels."""
    num_panels, group_size = panels.shape[0], in_features // num_groups
    group_bytes = group_num_bytes(in_features, num_groups, bits, has_minimums)
    scale_dtype = torch.float32 if num_groups == 1 else torch.float16
    scales_bytes = PANEL_WIDTH * scale_dtype.itemsize
    code_bytes = group_bytes - scales_bytes * (2 if has_minimums else 1)
    groups = panels.view(num_panels, num_groups, group_bytes)
    quads = groups[..., :code_bytes].reshape(num_panels, num_groups, -1, PANEL_WIDTH, QUAD)
    if bits == 4:
        quads = torch.stack((quads & 15, quads >> 4), 3).flatten(2, 3)
    codes_OI = quads.permute(0, 3, 1, 2, 4).reshape(num_panels * PANEL_WIDTH, num_groups, -1)[..., :group_size]

    def column(start: int) -> Tensor:
        values = groups[..., start : start + scales_bytes].contiguous().view(scale_dtype)
        return values.transpose(1, 2).reshape(num_panels * PANEL_WIDTH, num_groups)

    scales_OG = column(code_bytes)
    minimums_OG = column(code_bytes + scales_bytes) if has_minimums else -(2.0 ** (bits - 1)) * scales_OG.float()
    return codes_OI.reshape(-1, in_features), scales_OG, minimums_OG


def linear_quantised_packed(
    x_NI: Tensor,
    panels: Tensor,
    bias_O: Tensor | None,
    out_features: int,
    bits: int,
    num_groups: int,
    has_minimums: bool,
    int8_activations: bool,
    norm_weight_I: Tensor | None = None,
    norm_eps: float = 0.0,
    gated: bool = False,
    residual_NO: Tensor | None = None,
) -> Tensor:
    """`linear_quantised` over a packed weight, with what stands before and behind it."""
    before_NI = before_product(x_NI, norm_weight_I, norm_eps, gated)
    codes, scales, minimums = unpack_quantised(panels, before_NI.shape[1], bits, num_groups, has_minimums)
    weight_OI = dequantise(codes, scales, minimums, 8)[:out_features]
    if int8_activations:
        before_NI = quantise_activations(before_NI, num_groups)
    out_NO = F.linear(before_NI, weight_OI, None if bias_O is None else bias_O.float())
    return (out_NO if residual_NO is None else out_NO + residual_NO.float()).to(x_NI.dtype)


def embedding_quantised_packed(
    ids_N: Tensor, panels: Tensor, in_features: int, bits: int, num_groups: int, has_minimums: bool, dtype: torch.dtype
) -> Tensor:
    """Rows ids_N of a packed weight; [N, I]."""
    codes, scales, minimums = unpack_quantised(panels, in_features, bits, num_groups, has_minimums)
    ids = ids_N.long()
    return dequantise(codes[ids], scales[ids], minimums[ids], 8).to(dtype)
