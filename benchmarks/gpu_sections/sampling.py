"""The sampler against the usual one of PyTorch operators: argmax for greedy rows; softmax, sort, cumulative sum and draw for the others.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gpu_sections.measure import Deadline, device_ms
from toka.params import MAX_STOP_TOKEN_IDS

TEMPERATURE, TOP_K, TOP_P = 0.8, 50, 0.9


def measure(device: torch.device, deadline: Deadline) -> Iterator[tuple[str, Any]]:
    """Yields the milliseconds of both for greedy and for filtered rows, by number of rows."""
    on_gpu = device.type == "cuda"
    vocab_size, batches = (128256, (1, 64, 512)) if on_gpu else (500, (1, 3))
    for num_rows in batches:
        torch.manual_seed(0)
        logits_RV = torch.randn(num_rows, vocab_size, device=device) * 2
        logits_RV = logits_RV.to(torch.bfloat16 if on_gpu else torch.float32)
        for kind, peer in (("greedy", _greedy), ("filtered", _filtered)):
            if deadline.is_over:
                return
            toka_ms = device_ms(toka_sampler(logits_RV, greedy=kind == "greedy"), device)
            torch_ms = device_ms(functools.partial(peer, logits_RV), device)
            yield (
                f"{kind}_{num_rows}",
                {"toka_ms": toka_ms, "torch_ms": torch_ms, "over_torch": torch_ms / toka_ms},
            )


def toka_sampler(logits_RV: Tensor, *, greedy: bool) -> Callable[[], Tensor]:
    """The Triton kernels on CUDA, the plain-torch reference on CPU."""
    from toka.kernels.triton.library import load

    device, num_rows = logits_RV.device, len(logits_RV)
    if device.type == "cuda":
        load()
    op = (torch.ops.toka_triton if device.type == "cuda" else torch.ops.toka).sample.default

    def column(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((num_rows,), value, dtype=dtype, device=device)

    rows_R = torch.arange(num_rows, dtype=torch.int32, device=device)
    tables = (
        column(0.0 if greedy else TEMPERATURE, torch.float32),
        column(0 if greedy else TOP_K, torch.int32),
        column(1.0 if greedy else TOP_P, torch.float32),
        column(0.0, torch.float32),
        torch.arange(num_rows, device=device),
        torch.full((num_rows, MAX_STOP_TOKEN_IDS), -1, dtype=torch.int32, device=device),
        column(0, torch.int32),
        column(0, torch.int32),
    )
    positions_R = column(100, torch.int32)
    return lambda: op(logits_RV, rows_R, positions_R, *tables)


def _greedy(logits_RV: Tensor) -> Tensor:
    return logits_RV.argmax(dim=-1)


def _filtered(logits_RV: Tensor) -> Tensor:
    probabilities_RV = torch.softmax(logits_RV.float() / TEMPERATURE, dim=-1)
    sorted_RV, ids_RV = probabilities_RV.sort(dim=-1, descending=True)
    before_RV = sorted_RV.cumsum(dim=-1) - sorted_RV
    kept_RV = sorted_RV.masked_fill(before_RV > TOP_P, 0.0)
    kept_RV[:, TOP_K:] = 0.0
    drawn_R1 = (kept_RV / torch.empty_like(kept_RV).exponential_()).argmax(dim=-1, keepdim=True)
    return ids_RV.gather(1, drawn_R1)
