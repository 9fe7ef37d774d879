"""References of the linear operators: `linear`, and the same over weights packed in panels; `sparse_logits`.

Legend: N rows, I in features, O out features, P panels, L = PANEL_WIDTH features of a panel, C hidden size, V vocabulary, K ids a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from toka.kernels.op_schema import PANEL_WIDTH


def linear(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x · weightᵀ + bias in x's dtype, each row by itself, so that no row depends on its neighbours."""
    weight_IO = weight_OI.float().t()
    rows = [row_I.float() @ weight_IO for row_I in x_NI]
    out_NO = torch.stack(rows) if rows else weight_IO.new_empty((0, weight_IO.shape[1]))
    return (out_NO if bias_O is None else out_NO + bias_O.float()).to(x_NI.dtype)


def pack_linear(weight_OI: Tensor) -> Tensor:
    """[O, I] → panels [ceil(O / PANEL_WIDTH), I, PANEL_WIDTH], zeros beyond O."""
    out_features, in_features = weight_OI.shape
    num_panels = -(-out_features // PANEL_WIDTH)
    padded = F.pad(weight_OI, (0, 0, 0, num_panels * PANEL_WIDTH - out_features))
    return padded.view(num_panels, PANEL_WIDTH, in_features).transpose(1, 2).contiguous()


def unpack_linear(panels_PIL: Tensor, out_features: int) -> Tensor:
    """The weight [O, I] that `pack_linear` was given."""
    return panels_PIL.transpose(1, 2).reshape(-1, panels_PIL.shape[1])[:out_features]


def linear_packed(
    x_NI: Tensor,
    panels_PIL: Tensor,
    bias_O: Tensor | None,
    out_features: int,
    norm_weight_I: Tensor | None = None,
    norm_eps: float = 0.0,
    gated: bool = False,
    residual_NO: Tensor | None = None,
) -> Tensor:
    """`linear` over a packed weight, with what stands before and behind it."""
    before_NI = before_product(x_NI, norm_weight_I, norm_eps, gated)
    out_NO = linear(before_NI, unpack_linear(panels_PIL, out_features).float(), bias_O)
    return (out_NO if residual_NO is None else out_NO + residual_NO.float()).to(x_NI.dtype)


def before_product(x_NI: Tensor, norm_weight_I: Tensor | None, norm_eps: float, gated: bool) -> Tensor:
    """The in features of a product in float32: x, normed or gated if asked."""
    x_wide_NI = x_NI.float()
    if norm_weight_I is not None:
        scale_N1 = torch.rsqrt(x_wide_NI.square().mean(-1, keepdim=True) + norm_eps)
        return x_wide_NI * scale_N1 * norm_weight_I.float()
    if gated:
        gate_NI, up_NI = x_wide_NI.chunk(2, -1)
        return F.silu(gate_NI) * up_NI
    return x_wide_NI


def embedding_packed(ids_N: Tensor, panels_PIL: Tensor) -> Tensor:
    """Rows ids_N (int32 or int64) of the packed weight, contiguous [N, I]."""
    ids = ids_N.long()
    return panels_PIL[ids // PANEL_WIDTH, :, ids % PANEL_WIDTH].contiguous()


def sparse_logits(hidden_NC: Tensor, weight_VC: Tensor, ids_NK: Tensor) -> Tensor:
    """Dot products with the head's rows ids_NK, float32 [N, K]; -inf where an id is -1."""
    chosen_NKC = weight_VC[ids_NK.clamp(min=0).long()].float()
    logits_NK = torch.einsum("nc,nkc->nk", hidden_NC.float(), chosen_NKC)
    return logits_NK.masked_fill(ids_NK < 0, float("-inf"))
