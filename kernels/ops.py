"""Registers toka's operators with torch: importing this module makes `torch.ops.toka.*` callable and traceable.

`toka::x` is the operator that models and the step program call; its implementation is the plain-torch reference, so a traced graph
runs anywhere, without a compiler. `toka_cpp::x` has the same schema and fake; its implementation comes with the library that
`kernels.cpp.build` compiles and loads, that of `toka_triton::x` with `kernels.triton.library`. A compiler pass swaps one for the
other (see registry.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from toka.kernels.op_schema import PANEL_WIDTH, SCHEMAS
from toka.kernels.reference.adjust_logits import adjust_logits
from toka.kernels.reference.encoder_attention import encoder_attention
from toka.kernels.reference.linear import embedding_packed, linear, linear_packed, pack_linear, sparse_logits
from toka.kernels.reference.linear_quantised import (
    embedding_quantised,
    embedding_quantised_packed,
    group_num_bytes,
    linear_quantised,
    linear_quantised_packed,
    pack_quantised,
)
from toka.kernels.reference.merge_attention import merge_attention
from toka.kernels.reference.paged_attention import paged_attention
from toka.kernels.reference.rope_write_kv import rope_write_kv
from toka.kernels.reference.sample import sample
from toka.kernels.reference.sum_tokens import sum_tokens
from toka.kernels.reference.token_logprobs import token_logprobs
from toka.kernels.reference.write_kv import write_kv

REFERENCE_NAMESPACE = "toka"
FAST_NAMESPACES = ("toka_cpp", "toka_triton")


def _fake_write_kv(key_THD: Tensor, value_THD: Tensor, key_cache: Tensor, value_cache: Tensor, slots_T: Tensor) -> None:
    return None


def _fake_paged_attention(query_THD: Tensor, *_: object) -> Tensor:
    return query_THD.new_empty(query_THD.shape)


def _fake_encoder_attention(query_THD: Tensor, *_: object) -> Tensor:
    return query_THD.new_empty(query_THD.shape)


def _fake_sum_tokens(
    hidden_TC: Tensor, rows_R: Tensor, query_start: Tensor, seq_lens_R: Tensor, sums_MC: Tensor
) -> None:
    return None


def _fake_sample(logits_RV: Tensor, rows_R: Tensor, *_: object) -> Tensor:
    return logits_RV.new_empty(rows_R.shape, dtype=torch.int32)


def _fake_adjust_logits(logits_SV: Tensor, *_: object) -> Tensor:
    return logits_SV.new_empty(logits_SV.shape, dtype=torch.float32)


def _fake_token_logprobs(logits_SV: Tensor, ids_S: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_places = ids_S.shape[0]
    return (
        logits_SV.new_empty((num_places,), dtype=torch.float32),
        logits_SV.new_empty((num_places,), dtype=torch.int32),
        logits_SV.new_empty((num_places, k), dtype=torch.int32),
        logits_SV.new_empty((num_places, k), dtype=torch.float32),
    )


def _fake_rope_write_kv(query_THD: Tensor, *_: object) -> Tensor:
    return query_THD.new_empty(query_THD.shape)


def _fake_linear(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    return x_NI.new_empty((x_NI.shape[0], weight_OI.shape[0]))


def _fake_pack_linear(weight_OI: Tensor) -> Tensor:
    return weight_OI.new_empty((-(-weight_OI.shape[0] // PANEL_WIDTH), weight_OI.shape[1], PANEL_WIDTH))


def _fake_linear_packed(
    x_NI: Tensor, panels: Tensor, bias_O: Tensor | None, out_features: int, *_: object, **__: object
) -> Tensor:
    return x_NI.new_empty((x_NI.shape[0], out_features))


def _fake_embedding_packed(ids_N: Tensor, panels_PIL: Tensor) -> Tensor:
    return panels_PIL.new_empty((ids_N.shape[0], panels_PIL.shape[1]))


def _fake_linear_quantised(x_NI: Tensor, codes: Tensor, *_: object) -> Tensor:
    return x_NI.new_empty((x_NI.shape[0], codes.shape[0]))


def _fake_embedding_quantised(
    ids_N: Tensor, codes: Tensor, scales_OG: Tensor, minimums_OG: Tensor | None, bits: int, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty((ids_N.shape[0], codes.shape[1] * 8 // bits), dtype=dtype)


def _fake_pack_quantised(bits: int, codes: Tensor, scales_OG: Tensor, minimums_OG: Tensor | None = None) -> Tensor:
    out_features, num_groups = scales_OG.shape
    group_bytes = group_num_bytes(codes.shape[1] * 8 // bits, num_groups, bits, minimums_OG is not None)
    return codes.new_empty((-(-out_features // PANEL_WIDTH), num_groups * group_bytes))


def _fake_embedding_quantised_packed(
    ids_N: Tensor, panels: Tensor, in_features: int, bits: int, num_groups: int, has_minimums: bool, dtype: torch.dtype
) -> Tensor:
    return panels.new_empty((ids_N.shape[0], in_features), dtype=dtype)


def _fake_merge_attention(output_STHD: Tensor, lse_STH: Tensor) -> tuple[Tensor, Tensor]:
    return output_STHD.new_empty(output_STHD.shape[1:]), lse_STH.new_empty(lse_STH.shape[1:])


def _fake_sparse_logits(hidden_NC: Tensor, weight_VC: Tensor, ids_NK: Tensor) -> Tensor:
    return hidden_NC.new_empty(ids_NK.shape, dtype=torch.float32)


_REFERENCES: dict[str, Callable[..., object]] = {
    "write_kv": write_kv,
    "paged_attention": paged_attention,
    "encoder_attention": encoder_attention,
    "sum_tokens": sum_tokens,
    "sample": sample,
    "adjust_logits": adjust_logits,
    "token_logprobs": token_logprobs,
    "rope_write_kv": rope_write_kv,
    "linear": linear,
    "pack_linear": pack_linear,
    "linear_packed": linear_packed,
    "embedding_packed": embedding_packed,
    "linear_quantised": linear_quantised,
    "embedding_quantised": embedding_quantised,
    "pack_quantised": pack_quantised,
    "linear_quantised_packed": linear_quantised_packed,
    "embedding_quantised_packed": embedding_quantised_packed,
    "merge_attention": merge_attention,
    "sparse_logits": sparse_logits,
}
_FAKES: dict[str, Callable[..., object]] = {
    "write_kv": _fake_write_kv,
    "paged_attention": _fake_paged_attention,
    "encoder_attention": _fake_encoder_attention,
    "sum_tokens": _fake_sum_tokens,
    "sample": _fake_sample,
    "adjust_logits": _fake_adjust_logits,
    "token_logprobs": _fake_token_logprobs,
    "rope_write_kv": _fake_rope_write_kv,
    "linear": _fake_linear,
    "pack_linear": _fake_pack_linear,
    "linear_packed": _fake_linear_packed,
    "embedding_packed": _fake_embedding_packed,
    "linear_quantised": _fake_linear_quantised,
    "embedding_quantised": _fake_embedding_quantised,
    "pack_quantised": _fake_pack_quantised,
    "linear_quantised_packed": _fake_linear_packed,
    "embedding_quantised_packed": _fake_embedding_quantised_packed,
    "merge_attention": _fake_merge_attention,
    "sparse_logits": _fake_sparse_logits,
}


def _define(namespace: str) -> torch.library.Library:
    library = torch.library.Library(namespace, "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", _FAKES[name], lib=library)
    return library


# A definition lives as long as its Library object.
_LIBRARIES = {namespace: _define(namespace) for namespace in (REFERENCE_NAMESPACE, *FAST_NAMESPACES)}
for _name, _reference in _REFERENCES.items():
    _LIBRARIES[REFERENCE_NAMESPACE].impl(_name, _reference, "CompositeExplicitAutograd")
