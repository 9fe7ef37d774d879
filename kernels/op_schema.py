"""Schemas of toka's operators: one table, from which the reference ops (`toka::`) and every fast family (`toka_cpp::`) are defined.

Legend: T tokens of the step (padded), R rows of the step (padded), Hq query heads, Hk KV heads, D head dim, V vocabulary.
A *row* addresses the tables that live on the device (block table, sampling settings, last token). A padded row is -1 in `rows_R`
and owns no token (`query_start` repeats); a padded token lies after `query_start[-1]` and has slot -1.

write_kv: stores key_THD, value_THD [T, Hk, D] into the caches [num_blocks, Hk, block_size, D], cast to their dtype, at
    slots_T (int32 or int64) [T] = block * block_size + offset; slot -1 is not written.
paged_attention: causal attention of query_THD [T, Hq, D] over the cache; returns [T, Hq, D] in the query's dtype.
    block_table int32 [max_rows, max_blocks]; rows_R int32 [R]; query_start int32 [R + 1]; seq_lens_R int32 [R] = tokens in the
    cache once this step's keys are written, so that the last query of row i stands at position seq_lens_R[i] - 1.
    sliding_window: 0 = off, w = a token sees the last w positions, itself included. Padded tokens get zeros.
sample: draws one token id a row from logits_RV; returns int32 [R], and sets last_token[row] of every row >= 0. Tables of
    [max_rows]: temperature, top_p, min_p float32; top_k, held_back_until, last_token int32; seed int64;
    held_back_ids int32 [max_rows, 16]. The position of the token to be drawn is seq_lens_R[i]. See reference/sample.py.
"""

from __future__ import annotations

SCHEMAS: dict[str, str] = {
    "write_kv": (
        "(Tensor key_THD, Tensor value_THD, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slots_T) -> ()"
    ),
    "paged_attention": (
        "(Tensor query_THD, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor rows_R, Tensor query_start, "
        "Tensor seq_lens_R, float scale, int sliding_window) -> Tensor"
    ),
    "sample": (
        "(Tensor logits_RV, Tensor rows_R, Tensor seq_lens_R, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, "
        "Tensor seed, Tensor held_back_ids, Tensor held_back_until, Tensor(a!) last_token) -> Tensor"
    ),
}
