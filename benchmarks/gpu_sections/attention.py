"""Paged attention against PyTorch's SDPA, FlexAttention and, where it is installed, FlashInfer, on the same queries and keys.

SDPA and FlexAttention read contiguous keys and values, toka and FlashInfer scattered blocks.
Legend: T tokens, B rows, H query heads, K KV heads, L tokens of a row in the cache, D head dim, N blocks, P block size.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_sections.measure import Deadline, device_ms

BLOCK_SIZE = 16
FLASHINFER_WORKSPACE_BYTES = 128 * 2**20
MAX_OFF = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # outputs of 4 round to 2^-6 in bfloat16, twice


@dataclass(frozen=True)
class Case:
    """rows equal rows with `queries` new tokens each and `length` tokens in the cache after them."""

    rows: int
    queries: int
    length: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def name(self) -> str:
        kind = "decode" if self.queries == 1 else "prefill"
        return f"{kind}_d{self.head_dim}_{self.rows}x{self.queries}_of_{self.length}"

    @property
    def flops(self) -> float:
        seen = self.queries * (self.length - self.queries) + self.queries * (self.queries + 1) / 2
        return 4 * self.rows * self.num_heads * self.head_dim * seen

    def kv_bytes(self, dtype: torch.dtype) -> int:
        return 2 * self.rows * self.length * self.num_kv_heads * self.head_dim * dtype.itemsize


_ON_A_GPU = [
    (1, 1, 8192),
    (64, 1, 1024),
    (256, 1, 1024),
    (1, 2048, 2048),
    (8, 1, 4096),
    (1, 8192, 8192),
    (1, 512, 4096),
]
_ON_CPU = [(1, 1, 40), (3, 1, 17), (1, 33, 33), (1, 16, 50)]


def cases(device: torch.device) -> list[Case]:
    """What is measured, the most telling first."""
    if device.type == "cpu":
        return [Case(*sizes, num_heads=4, num_kv_heads=2, head_dim=32) for sizes in _ON_CPU]
    return [
        Case(*sizes, num_heads=32, num_kv_heads=8, head_dim=head_dim) for sizes in _ON_A_GPU for head_dim in (128, 64)
    ]


class Problem:
    """A case's tensors: q_BHTD, k_BKLD, v_BKLD, and the same keys and values in scattered blocks."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype):
        self.case = case

        def draw(heads: int, length: int) -> Tensor:
            return torch.randn(case.rows, heads, length, case.head_dim, device=device, dtype=dtype)

        self.q_BHTD = draw(case.num_heads, case.queries)
        self.k_BKLD, self.v_BKLD = draw(case.num_kv_heads, case.length), draw(case.num_kv_heads, case.length)
        self.q_THD = self.q_BHTD.transpose(1, 2).reshape(-1, case.num_heads, case.head_dim).contiguous()
        self.scale = case.head_dim**-0.5
        blocks_per_row = -(-case.length // BLOCK_SIZE)
        places = torch.randperm(case.rows * blocks_per_row, device=device)
        self.block_table = places.view(case.rows, blocks_per_row).int()
        self.key_cache, self.value_cache = self._blocks(self.k_BKLD), self._blocks(self.v_BKLD)
        self.rows = torch.arange(case.rows, dtype=torch.int32, device=device)
        self.query_start = torch.arange(case.rows + 1, dtype=torch.int32, device=device) * case.queries
        self.seq_lens = torch.full((case.rows,), case.length, dtype=torch.int32, device=device)

    def _blocks(self, x_BKLD: Tensor) -> Tensor:
        padded = F.pad(x_BKLD, (0, 0, 0, -self.case.length % BLOCK_SIZE))
        x_NKPD = padded.unflatten(2, (-1, BLOCK_SIZE)).transpose(1, 2).flatten(0, 1)
        blocks = torch.empty_like(x_NKPD)
        blocks[self.block_table.flatten().long()] = x_NKPD
        return blocks


# Each makes the run of one contender ready; None: it can't run this case.
Contender = Callable[[Problem], Callable[[], Tensor] | None]


def measure(device: torch.device, deadline: Deadline, *, compiled: bool) -> Iterator[tuple[str, Any]]:
    """Yields for each case the milliseconds of each contender and how far toka is from its limits.

    First toka against SDPA in all cases, then the others as long as there is time: FlexAttention compiles for each case. A peer that fails
    is noted. Raises at the end if toka failed, or was wrong, anywhere.
    """
    contenders: dict[str, Contender] = {
        "toka": functools.partial(toka_attention, device=device),
        "sdpa": sdpa,
        "flashinfer": flashinfer,
        "flex": functools.partial(flex, compiled=compiled),
    }
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found: dict[Case, dict[str, Any]] = {case: {} for case in cases(device)}
    for names in (("toka", "sdpa", "flashinfer"), ("flex",)):
        for case, figures in found.items():
            if deadline.is_over:
                figures["cut"] = f"no time left for {', '.join(names)}"
            else:
                torch.manual_seed(0)
                problem = Problem(case, device, dtype)
                figures |= _race(problem, {name: contenders[name] for name in names}, device)
                _rate(figures, case, dtype)
            yield case.name, figures
    if wrong := [case.name for case, figures in found.items() if figures.get("toka_off", 0.0) > MAX_OFF[dtype]]:
        raise AssertionError(f"toka's attention differs from SDPA's in {', '.join(wrong)}")
    if failed := [case.name for case, figures in found.items() if "toka_error" in figures]:
        raise RuntimeError(f"toka's attention failed in {', '.join(failed)}")


def _race(problem: Problem, contenders: dict[str, Contender], device: torch.device) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    expected = sdpa(problem)().float()
    for name, prepare in contenders.items():
        try:
            run = prepare(problem)
            if run is None:
                continue
            if name != "sdpa":
                figures[f"{name}_off"] = float((run().float() - expected).abs().max())
            figures[f"{name}_ms"] = device_ms(run, device)
        except Exception as error:
            figures[f"{name}_error"] = f"{type(error).__name__}: {error}"[:200]
    return figures


def _rate(figures: dict[str, Any], case: Case, dtype: torch.dtype) -> None:
    """Add toka's rate, and how many times faster than each peer it is."""
    if "toka_ms" not in figures:
        return
    ms = figures["toka_ms"]
    if case.queries == 1:
        figures["gb_per_s"] = case.kv_bytes(dtype) / ms / 1e6
    else:
        figures["tflop_per_s"] = case.flops / ms / 1e9
    for peer in ("sdpa", "flashinfer", "flex"):
        if f"{peer}_ms" in figures:
            figures[f"over_{peer}"] = figures[f"{peer}_ms"] / ms


# ----------------------------------------------------------------------------------------------------------- contenders


def toka_attention(problem: Problem, device: torch.device) -> Callable[[], Tensor]:
    """The Triton kernels on CUDA, the plain-torch reference on CPU."""
    from toka.kernels.triton.library import load

    if device.type == "cuda":
        load()
    op = (torch.ops.toka_triton if device.type == "cuda" else torch.ops.toka).paged_attention.default
    p, case = problem, problem.case

    def run() -> Tensor:
        out_THD: Tensor = op(
            p.q_THD, p.key_cache, p.value_cache, p.block_table, p.rows, p.query_start, p.seq_lens, p.scale, 0
        )
        return out_THD.view(case.rows, case.queries, case.num_heads, case.head_dim).transpose(1, 2)

    return run


def sdpa(problem: Problem) -> Callable[[], Tensor]:
    """scaled_dot_product_attention, which chooses its backend itself."""
    from torch.nn.attention.bias import causal_lower_right

    p, case = problem, problem.case
    if case.queries == 1 or case.queries == case.length:
        causal = case.queries > 1
        return lambda: F.scaled_dot_product_attention(
            p.q_BHTD, p.k_BKLD, p.v_BKLD, is_causal=causal, enable_gqa=True, scale=p.scale
        )
    # A mask aligned to the last key goes to the fast backends only with as many KV heads as query heads.
    k_BHLD, v_BHLD = (x.repeat_interleave(case.num_heads // case.num_kv_heads, dim=1) for x in (p.k_BKLD, p.v_BKLD))
    mask: Any = causal_lower_right(case.queries, case.length)
    return lambda: F.scaled_dot_product_attention(p.q_BHTD, k_BHLD, v_BHLD, attn_mask=mask, scale=p.scale)


def flex(problem: Problem, compiled: bool) -> Callable[[], Tensor]:
    """flex_attention with a causal block mask, compiled for the case."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    p, case = problem, problem.case
    before = case.length - case.queries

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query + before

    # One new token sees all that is there, which needs no mask.
    mask = (
        None
        if case.queries == 1
        else create_block_mask(sees, None, None, case.queries, case.length, device=p.q_BHTD.device)
    )
    torch._dynamo.reset()
    function: Any = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
    return lambda: function(p.q_BHTD, p.k_BKLD, p.v_BKLD, block_mask=mask, enable_gqa=True, scale=p.scale)


def flashinfer(problem: Problem) -> Callable[[], Tensor] | None:
    """FlashInfer's wrappers over the same blocks; None where it is not installed."""
    if importlib.util.find_spec("flashinfer") is None:
        return None
    import flashinfer as package

    p, case = problem, problem.case
    workspace = torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=p.q_THD.device)
    pages_per_row = p.block_table.shape[1]
    indptr = torch.arange(case.rows + 1, dtype=torch.int32, device=p.q_THD.device) * pages_per_row
    last_page_len = torch.full_like(p.seq_lens, (case.length - 1) % BLOCK_SIZE + 1)
    pages = (
        indptr,
        p.block_table.flatten(),
        last_page_len,
        case.num_heads,
        case.num_kv_heads,
        case.head_dim,
        BLOCK_SIZE,
    )
    kind = {"q_data_type": p.q_THD.dtype, "kv_data_type": p.q_THD.dtype}
    if case.queries == 1:
        wrapper = package.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        wrapper.plan(*pages, **kind)
    else:
        wrapper = package.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        wrapper.plan(p.query_start, *pages, causal=True, **kind)

    def run() -> Tensor:
        out_THD: Tensor = wrapper.run(p.q_THD, (p.key_cache, p.value_cache))
        return out_THD.view(case.rows, case.queries, case.num_heads, case.head_dim).transpose(1, 2)

    return run
