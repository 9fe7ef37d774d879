"""The inputs that change every step, in one static buffer on the device, filled with one copy (floor 5).

Legend: T tokens of the bucket, R rows of the bucket, S sampled rows of the bucket; all include padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from toka.plan import BatchPlan

PADDING_ROW = -1
_ALIGN = 16  # in int32: every array begins on a cache line


@dataclass(frozen=True)
class Bucket:
    """The sizes a step is padded to. num_rows follows from num_tokens: no row has fewer tokens than one."""

    num_tokens: int
    num_rows: int
    num_samples: int


class StepBuffers:
    """Static inputs of a step, all int32:

    token_ids, token_rows, positions [T]; rows, seq_lens [R]; query_start [R + 1];
    sample_index [S] (place of the token in the batch whose successor is drawn), sample_rows, sample_seq_lens [S];
    sample_query_start [S + 1] (query_start for these tokens alone, one a row).
    Padding: tokens have row -1, rows are -1 with no tokens, samples have row -1.
    """

    def __init__(self, max_tokens: int, max_rows: int, device: torch.device):
        self._sizes = {
            **dict.fromkeys(("token_ids", "token_rows", "positions"), max_tokens),
            **dict.fromkeys(("rows", "seq_lens", "sample_index", "sample_rows", "sample_seq_lens"), max_rows),
            **dict.fromkeys(("query_start", "sample_query_start"), max_rows + 1),
        }
        self._offsets: dict[str, int] = {}
        total = 0
        for name, size in self._sizes.items():
            self._offsets[name] = total
            total += -(-size // _ALIGN) * _ALIGN
        self._host = torch.zeros(total, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = self._host if device.type == "cpu" else torch.zeros(total, dtype=torch.int32, device=device)
        self._host_array = self._host.numpy()
        self._counting = np.arange(max_rows + 1, dtype=np.int32)
        self._views: dict[
            tuple[str, int], torch.Tensor
        ] = {}  # complete once the warmup has met every size of each ladder

    @property
    def num_bytes(self) -> int:
        """Size on the device."""
        return self._device.nbytes

    def fill(self, plan: BatchPlan, bucket: Bucket) -> dict[str, torch.Tensor]:
        """Write the plan, padded to the bucket, and return the inputs by name (views of the static buffer)."""
        tokens, rows = plan.num_tokens, plan.num_rows
        self._write("token_ids", plan.token_ids, bucket.num_tokens, 0)
        self._write("token_rows", plan.token_rows(), bucket.num_tokens, PADDING_ROW)
        self._write("positions", plan.positions(), bucket.num_tokens, 0)
        self._write("rows", plan.rows, bucket.num_rows, PADDING_ROW)
        self._write("seq_lens", plan.seq_lens, bucket.num_rows, 0)
        self._write("query_start", plan.query_start, bucket.num_rows + 1, tokens)
        last = plan.query_start[1 : rows + 1][plan.samples] - 1
        num_samples = len(last)
        self._write("sample_index", last, bucket.num_samples, 0)
        self._write("sample_rows", plan.rows[plan.samples], bucket.num_samples, PADDING_ROW)
        self._write("sample_query_start", self._counting[: num_samples + 1], bucket.num_samples + 1, num_samples)
        self._write("sample_seq_lens", plan.seq_lens[plan.samples], bucket.num_samples, 0)
        if self._device is not self._host:
            self._device.copy_(self._host, non_blocking=True)
        return self._views_of(bucket)

    def _write(self, name: str, values: np.ndarray, padded_size: int, padding: int) -> None:
        start = self._offsets[name]
        self._host_array[start : start + len(values)] = values
        self._host_array[start + len(values) : start + padded_size] = padding

    def _views_of(self, bucket: Bucket) -> dict[str, torch.Tensor]:
        sizes = {
            **dict.fromkeys(("token_ids", "token_rows", "positions"), bucket.num_tokens),
            **dict.fromkeys(("rows", "seq_lens"), bucket.num_rows),
            **dict.fromkeys(("sample_index", "sample_rows", "sample_seq_lens"), bucket.num_samples),
            "query_start": bucket.num_rows + 1,
            "sample_query_start": bucket.num_samples + 1,
        }
        return {name: self._view(name, size) for name, size in sizes.items()}

    def _view(self, name: str, size: int) -> torch.Tensor:
        view = self._views.get((name, size))
        if view is None:
            start = self._offsets[name]
            view = self._views[name, size] = self._device[start : start + size]
        return view
