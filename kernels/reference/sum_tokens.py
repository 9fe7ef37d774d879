"""Reference of `toka::sum_tokens`: running sums of the hidden states of each row's tokens.

Legend: T tokens, R rows of the step, M rows of the request table, C hidden size.
"""

from __future__ import annotations

from torch import Tensor


def sum_tokens(hidden_TC: Tensor, rows_R: Tensor, query_start: Tensor, seq_lens_R: Tensor, sums_MC: Tensor) -> None:
    """Add each row's tokens of this step to sums_MC[row], in their order; see op_schema.py."""
    starts = query_start.tolist()
    for i, (row, seq_len) in enumerate(zip(rows_R.tolist(), seq_lens_R.tolist(), strict=True)):
        begin, end = starts[i], starts[i + 1]
        if row < 0 or begin == end:
            continue
        if seq_len == end - begin:
            sums_MC[row] = 0.0
        for hidden_C in hidden_TC[begin:end].float():
            sums_MC[row] += hidden_C
