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
    Which rows share a prefix (all three or none; they say how attention may be computed, not what: results are the same to the bit on the
    CPU, within rounding on CUDA; ignored under a sliding window): shared_groups int32 [G, 5] = (level, first member, end of members,
    first position, end position), ended by a group without members; members are shared_members int32 [N], places in the batch (i of
    rows_R) of rows with one query, which hold the same blocks for the group's positions. The groups of a place tile the positions
    [0, shared_lens[place]), level by level; shared_lens int32 [at least R]. Positions are multiples of SHARED_PREFIX_STEP and leave each
    row its own query's at least.
encoder_attention: attention of query_THD over key_THD, value_THD [T, H, D] in which every token of a row sees all tokens of the row,
    those behind it too, and no others; returns [T, H, D] in the query's dtype. A step holds rows whole. query_start int32 [R + 1].
    Padded tokens get zeros.
sum_tokens: adds the hidden states hidden_TC of each row's tokens to sums_MC[row] (float32 [max_rows, C]), one after the other, so that
    the sum is the same to the bit however a prompt is cut. rows_R, query_start, seq_lens_R as in paged_attention; a row that begins with
    this step (it has no more tokens than the step brings) begins with zero.
sample: draws one token id a row from logits_RV; returns int32 [R], and sets last_token[row] of every row >= 0. Tables of
    [max_rows]: temperature, top_p, min_p float32; top_k, held_back_until, last_token int32; seed int64;
    held_back_ids int32 [max_rows, 16]. The position of the token to be drawn is seq_lens_R[i]. See reference/sample.py.
    Which tokens a grammar allows (both or none): masks_KW int32 [K, ceil(V / 32)], bit v % 32 of word v / 32 says whether token v may be
    drawn; mask_of_R int32 [R], the place of each row's mask among them, -1 = any token may be drawn. A mask leaves the held-back ids
    held back, unless it allows nothing else.
adjust_logits: logits_SV [S, V] as rows that ask for it want them to be drawn from; returns float32 [S, V]. A place whose row is -1 is
    copied as it is. A row's tokens stand at the positions 0 .. seq_lens_S[i] - 1 of token_of_slot int32 [at least num_blocks * block_size],
    which is laid out as the KV cache is. Tables of [max_rows]: num_prompt_tokens int32, of which the row's tokens are the prompt;
    penalties float32 [max_rows, 3], presence, frequency and repetition; bias_ids int32 and biases float32 [max_rows, B], distinct ids,
    -1 = unused; bad_words int32 [max_rows, N, K], tokens that must not follow one another, filled up with -1 in front. See
    reference/adjust_logits.py.
token_logprobs: of softmax(logits_SV) as the model gave them, no setting applied: logprob float32 [S] and rank int32 [S] (1 = likeliest) of
    the tokens ids_S (int32), and ids int32 [S, k] and logprobs float32 [S, k] of the k likeliest. Of equal logits the lower id comes first.
    The value of a token is the same to the bit in both places. An id below 0 asks for nothing: its place gives -inf, 0, -1 and -inf; so do
    the places beyond the vocabulary where this has fewer than k tokens.
rope_write_kv: turns queries and keys by their tokens' angles (rotate-half, as models/rope.py), stores keys and values as write_kv
    does, returns the turned queries, contiguous [T, Hq, D]. cos_TF, sin_TF [T, D / 2] in the query's dtype.
linear: x_NI · weight_OIᵀ + bias_O → [N, O]; sums in float32, in an order that does not depend on N.
pack_linear: weight_OI [O, I] → the same numbers as panels of PANEL_WIDTH output features, [ceil(O / PANEL_WIDTH), I, PANEL_WIDTH], zeros
    beyond O: panel[p, i, l] = weight[p * PANEL_WIDTH + l, i]. Runs once, when weights are loaded.
linear_packed: `linear` over packed panels; out_features = O. What stands before and behind may be given too: with norm_weight_I x is
    normed first, x / sqrt(mean(x²) + norm_eps) * norm_weight; if gated, x is [N, 2 I] and silu(x[:, :I]) * x[:, I:] is multiplied;
    residual_NO is added in the end. embedding_packed: rows ids_N of the weight that was packed → [N, I].
linear_quantised: x_NI · weightᵀ + bias_O → [N, O] over a weight of integer codes of `bits` 4 or 8: codes uint8 [O, I * bits / 8], of 4
    bits the even in feature in the low half; scales_OG and minimums_OG for each of G groups of neighbouring in features, float16, or
    float32 if G = 1: weight[o, i] = scale[o, g] * code[o, i] + minimum[o, g]. Without minimums the codes are symmetric:
    minimum = -2^(bits - 1) * scale. int8_activations: x is rounded first, each row and group to 255 steps between minus and plus its
    largest magnitude.
embedding_quantised: rows ids_N of such a weight, in dtype.
pack_quantised: such a weight as panels uint8 [ceil(O / PANEL_WIDTH), bytes of a panel], laid out as kernels/cpp/quantised.h says.
linear_quantised_packed, embedding_quantised_packed: the same over panels.
merge_attention: attention over several disjoint sets of keys, joined (log-sum-exp): output_STHD float32 and lse_STH float32 (natural
    logarithm of the sum of exponentials, -inf = no key) of S parts → output [T, H, D] float32, lse [T, H] float32.
sparse_logits: dot products of each hidden state with K rows of the head only: hidden_NC, weight_VC, ids_NK int32 → float32 [N, K];
    an id of -1 gives -inf.
"""

from __future__ import annotations

from toka.plan import MAX_SHARED_LEVELS as MAX_SHARED_LEVELS
from toka.plan import SHARED_PREFIX_STEP as SHARED_PREFIX_STEP

PANEL_WIDTH = 32
QUAD = 4  # in features that lie side by side in a quantised panel

_FUSIONS = "Tensor? norm_weight_I=None, float norm_eps=0.0, bool gated=False, Tensor? residual_NO=None"

SCHEMAS: dict[str, str] = {
    "write_kv": (
        "(Tensor key_THD, Tensor value_THD, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slots_T) -> ()"
    ),
    "paged_attention": (
        "(Tensor query_THD, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor rows_R, Tensor query_start, "
        "Tensor seq_lens_R, float scale, int sliding_window, Tensor? shared_groups=None, Tensor? shared_members=None, "
        "Tensor? shared_lens=None) -> Tensor"
    ),
    "encoder_attention": (
        "(Tensor query_THD, Tensor key_THD, Tensor value_THD, Tensor query_start, float scale) -> Tensor"
    ),
    "sum_tokens": (
        "(Tensor hidden_TC, Tensor rows_R, Tensor query_start, Tensor seq_lens_R, Tensor(a!) sums_MC) -> ()"
    ),
    "sample": (
        "(Tensor logits_RV, Tensor rows_R, Tensor seq_lens_R, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, "
        "Tensor seed, Tensor held_back_ids, Tensor held_back_until, Tensor(a!) last_token, Tensor? masks_KW=None, "
        "Tensor? mask_of_R=None) -> Tensor"
    ),
    "adjust_logits": (
        "(Tensor logits_SV, Tensor rows_S, Tensor seq_lens_S, Tensor token_of_slot, Tensor block_table, "
        "Tensor num_prompt_tokens, Tensor penalties, Tensor bias_ids, Tensor biases, Tensor bad_words, int block_size) "
        "-> Tensor"
    ),
    "token_logprobs": "(Tensor logits_SV, Tensor ids_S, int k) -> (Tensor, Tensor, Tensor, Tensor)",
    "rope_write_kv": (
        "(Tensor query_THD, Tensor key_THD, Tensor value_THD, Tensor cos_TF, Tensor sin_TF, Tensor(a!) key_cache, "
        "Tensor(b!) value_cache, Tensor slots_T) -> Tensor"
    ),
    "linear": "(Tensor x_NI, Tensor weight_OI, Tensor? bias_O) -> Tensor",
    "pack_linear": "(Tensor weight_OI) -> Tensor",
    "linear_packed": f"(Tensor x_NI, Tensor panels_PIL, Tensor? bias_O, int out_features, {_FUSIONS}) -> Tensor",
    "embedding_packed": "(Tensor ids_N, Tensor panels_PIL) -> Tensor",
    "linear_quantised": (
        "(Tensor x_NI, Tensor codes, Tensor scales_OG, Tensor? minimums_OG, Tensor? bias_O, int bits, bool int8_activations) -> Tensor"
    ),
    "embedding_quantised": (
        "(Tensor ids_N, Tensor codes, Tensor scales_OG, Tensor? minimums_OG, int bits, ScalarType dtype) -> Tensor"
    ),
    "pack_quantised": "(int bits, Tensor codes, Tensor scales_OG, Tensor? minimums_OG=None) -> Tensor",
    "linear_quantised_packed": (
        "(Tensor x_NI, Tensor panels, Tensor? bias_O, int out_features, int bits, int num_groups, bool has_minimums, "
        f"bool int8_activations, {_FUSIONS}) -> Tensor"
    ),
    "embedding_quantised_packed": (
        "(Tensor ids_N, Tensor panels, int in_features, int bits, int num_groups, bool has_minimums, ScalarType dtype) -> Tensor"
    ),
    "merge_attention": "(Tensor output_STHD, Tensor lse_STH) -> (Tensor, Tensor)",
    "sparse_logits": "(Tensor hidden_NC, Tensor weight_VC, Tensor ids_NK) -> Tensor",
}
