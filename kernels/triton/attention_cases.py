"""The attention kernels as serving launches them: the shapes that models have, with the launch parameters shipped for each architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from toka.kernels.op_schema import MAX_SHARED_LEVELS
from toka.kernels.triton import attention_states, decode_attention, prefill_attention, shared_attention
from toka.kernels.triton.attention_tile import ANY_ALIGNMENT, NATIVE_FP8, dtype_name
from toka.kernels.triton.compile_case import CompileCase, signature_of
from toka.kernels.triton.merge_attention import PARAMETERS as MERGE_PARAMETERS
from toka.kernels.triton.tuning import Capability, LaunchParameters

CAPABILITIES: tuple[Capability, ...] = ((8, 0), (9, 0), (10, 0))
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv"}


@dataclass(frozen=True)
class Shape:
    """A model's attention: heads, head dim, dtypes of query and cache, and the sliding window (0 = off)."""

    head_dim: int
    group: int
    num_kv_heads: int = 8
    query_dtype: torch.dtype = torch.bfloat16
    cache_dtype: torch.dtype = torch.bfloat16
    window: int = 0

    @property
    def name(self) -> str:
        cache = f" kv {TYPES[self.cache_dtype]}" if self.cache_dtype != self.query_dtype else ""
        window = f" window {self.window}" if self.window else ""
        return f"d{self.head_dim} group {self.group} {TYPES[self.query_dtype]}{cache}{window}"

    def parameters(self, kernel: Any, capability: Capability) -> LaunchParameters:
        """What is shipped for this shape."""
        key = (self.head_dim, self.group, dtype_name(self.query_dtype), dtype_name(self.cache_dtype))
        shipped: LaunchParameters = kernel.candidates(capability, key)[0]
        return shipped


SHAPES = (
    Shape(128, 4),  # Llama 3.1 8B
    Shape(64, 4),  # Llama 3.2 1B
    Shape(256, 2, num_kv_heads=4, window=1024),  # Gemma 2 and 3
    Shape(80, 1, num_kv_heads=32, query_dtype=torch.float16, cache_dtype=torch.float16),  # Phi 2: no power of two
    Shape(128, 4, cache_dtype=torch.float8_e4m3fn),
)
# Where rows can share prefixes: never under a window, so of Gemma the layers without.
SHARING_SHAPES = (*(shape for shape in SHAPES if not shape.window), Shape(256, 2, num_kv_heads=4))


def _case(
    kind: str, kernel: Any, shape: Shape, capability: Capability, parameters: LaunchParameters, *, shared: bool = False
) -> CompileCase:
    """shared: rows can share prefixes."""
    major, minor = capability
    fp8_bits = shape.cache_dtype == torch.float8_e4m3fn and capability < NATIVE_FP8
    shared_splits = attention_states.MAX_SHARED_SPLITS if shared else 0
    query, cache = f"*{TYPES[shape.query_dtype]}", "*u8" if fp8_bits else f"*{TYPES[shape.cache_dtype]}"
    types = {
        **{"query_ptr": query, "out_ptr": query, "key_ptr": cache, "value_ptr": cache},
        **dict.fromkeys(("partial_ptr", "partial_lse_ptr"), "*fp32"),
        **dict.fromkeys(("levels_ptr", *ANY_ALIGNMENT), "*i32"),
        "scale_log2": "fp32",
    }
    known = {
        "NUM_KV_HEADS": shape.num_kv_heads,
        "NUM_HEADS": shape.num_kv_heads * shape.group,
        "GROUP": shape.group,
        "GROUP_BLOCK": decode_attention.group_block(shape.group),
        "HEAD_DIM": shape.head_dim,
        "DIM_BLOCK": triton.next_power_of_2(shape.head_dim),
        "BLOCK_SIZE": 16,
        "WINDOW": shape.window,
        "SPLIT_TOKENS": attention_states.SPLIT_TOKENS,
        "MAX_SPLITS": attention_states.MAX_SPLITS,
        "MAX_SHARED_SPLITS": shared_splits,
        "PARTS": attention_states.MAX_SPLITS + MAX_SHARED_LEVELS * shared_splits,
        "SHARED": shared,
        "ROWS_BLOCK": 128,
        "GROUPS_BLOCK": 128,
        "FP8_BITS": fp8_bits,
        "WIDE": False,
        **dict(parameters.constants),
    }
    constants = {name: value for name, value in known.items() if name in kernel.arg_names}
    return CompileCase(
        name=f"{kind} {shape.name}",
        kernel=kernel,
        signature=signature_of(
            kernel, {name: kind for name, kind in types.items() if name in kernel.arg_names}, constants
        ),
        constants=constants,
        options=parameters.options,
        architectures=(10 * major + minor,),
    )


def _cases() -> list[CompileCase]:
    decode, combine = decode_attention.decode_attention_kernel, decode_attention.combine_parts_kernel
    prefill, shared = prefill_attention.prefill_attention_kernel, shared_attention.shared_attention_kernel
    cases = []
    for capability in CAPABILITIES:
        for shape in SHAPES:
            cases.append(_case("decode", decode, shape, capability, shape.parameters(decode_attention, capability)))
            cases.append(_case("prefill", prefill, shape, capability, shape.parameters(prefill_attention, capability)))
        for shape in SHARING_SHAPES:
            of_shared = shape.parameters(shared_attention, capability)
            cases.append(_case("shared prefix", shared, shape, capability, of_shared, shared=True))
        for shape in (SHAPES[0], SHAPES[4]):  # of the others it differs as little from decode without groups
            of_decode = shape.parameters(decode_attention, capability)
            cases.append(_case("decode after shared", decode, shape, capability, of_decode, shared=True))
        cases.append(_case("combine splits", combine, SHAPES[0], capability, MERGE_PARAMETERS))
        cases.append(_case("combine with shared", combine, SHAPES[0], capability, MERGE_PARAMETERS, shared=True))
    return cases


COMPILE_CASES = _cases()
