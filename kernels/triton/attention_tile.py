"""What the attention kernels share: finding a row, walking over its keys, and the description of a problem.

Legend: M rows of a tile, one query head of one query token each; N keys of a tile; D head dim, padded to a power of two; R the step's
rows, padded. All query heads of one KV head (the *group*) go into one tile, so that keys and values are read once for them:
tile row m is query token m // GROUP of the tile, query head m % GROUP of the group.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from toka.errors import InvariantError
from toka.kernels.triton.tuning import INTERPRETER, Capability, Key, capability_of

LOG2_E = 1.4426950408889634
# Programs of an interpreted launch: more than one, so that tests see them share the work.
INTERPRETED_PROGRAMS = 3
# From here on the hardware converts FP8 (e4m3); older devices do it with integer instructions.
NATIVE_FP8: Capability = (8, 9)


@triton.jit
def find_row(index, count_R):
    """Which row item `index` belongs to, when row i has count_R[i] items, and the item's number in that row."""
    end_R = tl.cumsum(count_R, 0)
    before_R = end_R <= index
    return tl.sum(before_R.to(tl.int32), 0), index - tl.sum(tl.where(before_R, count_R, 0), 0)


@triton.jit
def to_compute_dtype(x, dtype: tl.constexpr, FP8_BITS: tl.constexpr):
    """x in the dtype of the products. FP8_BITS: x holds the bits of float8_e4m3fn as integers."""
    if FP8_BITS:
        # Sign, exponent and mantissa move to their places in float16, whose exponent counts from 15 where e4m3's counts from 7.
        bits = x.to(tl.uint16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        return (half * 256.0).to(dtype)
    return x.to(dtype)


@triton.jit
def load_where(pointers, wanted, other: tl.constexpr, MASKED: tl.constexpr):
    """Load all, or with MASKED only where wanted and `other` elsewhere."""
    if MASKED:
        return tl.load(pointers, mask=wanted, other=other)
    return tl.load(pointers)


@triton.jit
def attend_keys(
    acc_MD,
    largest_M,
    total_M,
    query_MD,
    position_M,
    key_ptr,
    value_ptr,
    blocks_ptr,
    begin,
    end,
    first_visible,
    scale_log2,
    key_block_stride,
    key_token_stride,
    value_block_stride,
    value_token_stride,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FP8_BITS: tl.constexpr,
):
    """Add the keys at positions begin .. end - 1 to a tile's state: weighted values, largest score and sum of weights, all float32.

    Scores have base 2. key_ptr, value_ptr: one KV head of block 0. blocks_ptr: the row's line of the block table. MASKED: keys after a
    query's position, before its window, before first_visible or from `end` on are left out (and not read); else all queries see all
    keys, which are a multiple of BLOCK_N.
    """
    dim_D = tl.arange(0, DIM_BLOCK)
    in_head_D = dim_D < HEAD_DIM
    PADDED: tl.constexpr = HEAD_DIM != DIM_BLOCK
    index_N = tl.arange(0, BLOCK_N)
    # Blocks are looked up a tile ahead: keys whose address was only just loaded could not be fetched ahead of their use.
    block_N = tl.load(blocks_ptr + (begin + index_N) // BLOCK_SIZE, mask=begin + index_N < end, other=0)
    for start in range(begin, end, BLOCK_N):
        position_N = start + index_N
        next_N = position_N + BLOCK_N
        in_reach_N = (position_N < end) & (position_N >= first_visible)
        this_block_N = block_N.to(tl.int64)
        block_N = tl.load(blocks_ptr + next_N // BLOCK_SIZE, mask=next_N < end, other=0)
        offset_N = position_N % BLOCK_SIZE
        key_N_ptr = key_ptr + this_block_N * key_block_stride + offset_N * key_token_stride
        value_N_ptr = value_ptr + this_block_N * value_block_stride + offset_N * value_token_stride

        key_DN = load_where(
            key_N_ptr[None, :] + dim_D[:, None], in_reach_N[None, :] & in_head_D[:, None], 0.0, MASKED or PADDED
        )
        key_DN = to_compute_dtype(key_DN, query_MD.dtype, FP8_BITS)
        score_MN = tl.dot(query_MD, key_DN, input_precision="tf32x3") * scale_log2
        if MASKED:
            seen_MN = (position_N[None, :] <= position_M[:, None]) & in_reach_N[None, :]
            if WINDOW > 0:
                seen_MN = seen_MN & (position_N[None, :] > position_M[:, None] - WINDOW)
            score_MN = tl.where(seen_MN, score_MN, -float("inf"))

        new_largest_M = tl.maximum(largest_M, tl.max(score_MN, 1))
        reference_M = tl.where(new_largest_M == -float("inf"), 0.0, new_largest_M)
        weight_MN = tl.exp2(score_MN - reference_M[:, None])
        kept_M = tl.exp2(largest_M - reference_M)
        total_M = total_M * kept_M + tl.sum(weight_MN, 1)
        largest_M = new_largest_M

        value_ND = load_where(
            value_N_ptr[:, None] + dim_D[None, :], in_reach_N[:, None] & in_head_D[None, :], 0.0, MASKED or PADDED
        )
        value_ND = to_compute_dtype(value_ND, query_MD.dtype, FP8_BITS)
        acc_MD = tl.dot(weight_MN.to(value_ND.dtype), value_ND, acc_MD * kept_M[:, None], input_precision="tf32x3")
    return acc_MD, largest_M, total_M


@dataclass(frozen=True)
class Problem:
    """Arguments of paged_attention, checked, with what the kernels' launches derive from shapes alone."""

    query_THD: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_table: Tensor
    rows_R: Tensor
    query_start: Tensor
    seq_lens_R: Tensor
    scale: float
    window: int
    shared_groups: Tensor | None = None
    shared_members: Tensor | None = None
    shared_lens: Tensor | None = None

    def __post_init__(self) -> None:
        caches = (self.key_cache, self.value_cache)
        if self.num_heads % self.num_kv_heads or any(cache.shape[3] != self.head_dim for cache in caches):
            raise InvariantError(
                f"paged_attention: queries {list(self.query_THD.shape)} do not fit a cache {list(self.key_cache.shape)}"
            )
        if self.query_THD.stride(2) != 1 or any(cache.stride(3) != 1 for cache in caches):
            raise InvariantError("paged_attention: the numbers of one head must lie side by side")
        tables = (self.block_table, self.rows_R, self.query_start, self.seq_lens_R)
        shared = [x for x in (self.shared_groups, self.shared_members, self.shared_lens) if x is not None]
        if len(shared) not in (0, 3):
            raise InvariantError("paged_attention: shared_groups, shared_members and shared_lens go together")
        if any(table.dtype != torch.int32 for table in (*tables, *shared)):
            raise InvariantError(
                "paged_attention: block_table, rows, query_start, seq_lens and what rows share must be int32"
            )
        if not all(table.is_contiguous() for table in shared):
            raise InvariantError("paged_attention: what rows share must lie side by side")

    @property
    def num_tokens(self) -> int:
        return self.query_THD.shape[0]

    @property
    def num_heads(self) -> int:
        return self.query_THD.shape[1]

    @property
    def head_dim(self) -> int:
        return self.query_THD.shape[2]

    @property
    def num_kv_heads(self) -> int:
        return self.key_cache.shape[1]

    @property
    def block_size(self) -> int:
        return self.key_cache.shape[2]

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def num_rows(self) -> int:
        return self.rows_R.shape[0]

    @property
    def max_context(self) -> int:
        """Tokens that a row's line of the block table can name."""
        return self.block_table.shape[1] * self.block_size

    @property
    def shares_prefixes(self) -> bool:
        """Whether there is room for groups of rows that share positions (the last line holds none), and no window, under which they
        are ignored.
        """
        return self.shared_groups is not None and self.shared_groups.shape[0] > 1 and self.window == 0

    @property
    def capability(self) -> Capability:
        return capability_of(self.query_THD.device)

    @property
    def key(self) -> Key:
        """The shape class by which launch parameters are kept; it says nothing about the batch."""
        return self.head_dim, self.group, dtype_name(self.query_THD.dtype), dtype_name(self.key_cache.dtype)

    def arguments(self) -> dict[str, Any]:
        """What the kernels take. WIDE: products in float32, since Triton's interpreter can't multiply bfloat16."""
        fp8_bits = self.key_cache.dtype == torch.float8_e4m3fn and self.capability < NATIVE_FP8
        key_cache, value_cache = self.key_cache, self.value_cache
        if fp8_bits:
            key_cache, value_cache = key_cache.view(torch.uint8), value_cache.view(torch.uint8)
        return {
            "query_ptr": self.query_THD,
            "key_ptr": key_cache,
            "value_ptr": value_cache,
            "block_table_ptr": self.block_table,
            "rows_ptr": self.rows_R,
            "query_start_ptr": self.query_start,
            "seq_lens_ptr": self.seq_lens_R,
            "num_rows": self.num_rows,
            "scale_log2": self.scale * LOG2_E,
            "query_token_stride": self.query_THD.stride(0),
            "query_head_stride": self.query_THD.stride(1),
            "key_block_stride": key_cache.stride(0),
            "key_head_stride": key_cache.stride(1),
            "key_token_stride": key_cache.stride(2),
            "value_block_stride": value_cache.stride(0),
            "value_head_stride": value_cache.stride(1),
            "value_token_stride": value_cache.stride(2),
            "table_row_stride": self.block_table.stride(0),
            "NUM_KV_HEADS": self.num_kv_heads,
            "GROUP": self.group,
            "HEAD_DIM": self.head_dim,
            "DIM_BLOCK": max(16, triton.next_power_of_2(self.head_dim)),
            "BLOCK_SIZE": self.block_size,
            "WINDOW": self.window,
            "ROWS_BLOCK": rows_block(self.num_rows),
            "FP8_BITS": fp8_bits,
            "WIDE": self.capability == INTERPRETER and self.query_THD.dtype == torch.bfloat16,
        }


# Not specialised on, since they change from bucket to bucket: else serving would meet variants that warmup has not compiled.
UNSPECIALISED = ("num_rows", "num_tokens", "num_groups")
ANY_ALIGNMENT = (
    *("block_table_ptr", "rows_ptr", "query_start_ptr", "seq_lens_ptr"),
    *("groups_ptr", "members_ptr", "shared_lens_ptr"),
)


def rows_block(num_rows: int) -> int:
    """How many rows a program looks at at once: few sizes (16, 128, 1024, ...), so that few variants are compiled."""
    size = 16
    while size < num_rows:
        size *= 8
    return size


def num_programs(device: torch.device, per_multiprocessor: int) -> int:
    """Programs of a launch whose programs share out a number of items that only the device knows."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return _num_multiprocessors(device) * per_multiprocessor


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def item_bytes(name: str) -> int:
    """Bytes of one number of the dtype with this name."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype.itemsize


def shared_bytes(capability: Capability) -> int:
    """Shared memory that one program can have. Source: CUDA C++ Programming Guide, table of technical specifications."""
    major, _ = capability
    if capability in ((8, 6), (8, 9)) or major == 12:
        return 99 << 10
    return (163 << 10) if major == 8 else (227 << 10)
