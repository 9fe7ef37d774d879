"""Registers toka's operators with torch: importing this module makes `torch.ops.toka.*` callable and traceable.

`toka::x` is the operator that models and the step program call; its implementation is the plain-torch reference, so a traced graph
runs anywhere, without a compiler. `toka_cpp::x` has the same schema and fake; its implementation comes with the library that
`kernels.cpp.build` compiles and loads. A compiler pass swaps one for the other (see registry.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from toka.kernels.op_schema import SCHEMAS
from toka.kernels.reference.paged_attention import paged_attention
from toka.kernels.reference.sample import sample
from toka.kernels.reference.write_kv import write_kv

REFERENCE_NAMESPACE = "toka"
FAST_NAMESPACES = ("toka_cpp",)


def _fake_write_kv(key_THD: Tensor, value_THD: Tensor, key_cache: Tensor, value_cache: Tensor, slots_T: Tensor) -> None:
    return None


def _fake_paged_attention(query_THD: Tensor, *_: object) -> Tensor:
    return query_THD.new_empty(query_THD.shape)


def _fake_sample(logits_RV: Tensor, rows_R: Tensor, *_: object) -> Tensor:
    return logits_RV.new_empty(rows_R.shape, dtype=torch.int32)


_REFERENCES: dict[str, Callable[..., Tensor | None]] = {
    "write_kv": write_kv,
    "paged_attention": paged_attention,
    "sample": sample,
}
_FAKES: dict[str, Callable[..., Tensor | None]] = {
    "write_kv": _fake_write_kv,
    "paged_attention": _fake_paged_attention,
    "sample": _fake_sample,
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
