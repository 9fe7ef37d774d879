"""`toka_triton::paged_attention`: prefixes that rows share by the shared-prefix kernel, the other positions of rows with one query by the
split-KV kernel, rows with several by the prefill kernel.

All kernels are launched for every step, whatever it holds, and find their rows on the device: the host does not know, so nothing waits
for the device, and a launch can be captured in a CUDA graph. Grids depend on shapes only. Their programs are as many as the device
runs at once, and each takes item after item, the number of which is a sum over the rows' lengths. So a step of only decodes costs
one short launch for the prefill kernel, one without groups another for the shared-prefix kernel (none where there is no room for groups),
and a context of 128k tokens no program that finds nothing to do.

The states of splits and of shared prefixes lie in a workspace from torch's caching allocator (attention_states.py).
"""

from __future__ import annotations

from torch import Tensor

from toka.kernels.triton.attention_states import states_of
from toka.kernels.triton.attention_tile import Problem
from toka.kernels.triton.decode_attention import attend_decode_rows
from toka.kernels.triton.prefill_attention import attend_prefill_rows
from toka.kernels.triton.shared_attention import attend_shared_prefixes


def paged_attention(
    query_THD: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    rows_R: Tensor,
    query_start: Tensor,
    seq_lens_R: Tensor,
    scale: float,
    sliding_window: int,
    shared_groups: Tensor | None = None,
    shared_members: Tensor | None = None,
    shared_lens: Tensor | None = None,
) -> Tensor:
    """As `toka::paged_attention` (op_schema.py). Caches may have another dtype than the query, float8_e4m3fn too.

    Raises InvariantError if shapes, strides or dtypes do not fit.
    """
    if query_THD.stride(2) != 1:
        query_THD = query_THD.contiguous()
    problem = Problem(
        query_THD,
        key_cache,
        value_cache,
        block_table,
        rows_R,
        query_start,
        seq_lens_R,
        scale,
        sliding_window,
        shared_groups,
        shared_members,
        shared_lens,
    )
    out_THD = query_THD.new_empty(query_THD.shape)
    if problem.num_tokens == 0:
        return out_THD
    if problem.num_rows == 0:
        return out_THD.zero_()
    states = states_of(problem, out_THD.device)
    if problem.shares_prefixes:
        attend_shared_prefixes(problem, states)
    attend_decode_rows(problem, states, out_THD)
    attend_prefill_rows(problem, out_THD)
    return out_THD
