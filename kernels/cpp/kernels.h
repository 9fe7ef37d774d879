// The operators of this library; shapes, dtypes and meaning as in op_schema.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace toka {

using torch::stable::Tensor;

void write_kv(Tensor key_THD, Tensor value_THD, Tensor key_cache, Tensor value_cache, Tensor slots_T);

Tensor paged_attention(Tensor query_THD, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor rows_R,
                       Tensor query_start, Tensor seq_lens_R, double scale, int64_t sliding_window,
                       std::optional<Tensor> shared_groups, std::optional<Tensor> shared_members,
                       std::optional<Tensor> shared_lens);

Tensor encoder_attention(Tensor query_THD, Tensor key_THD, Tensor value_THD, Tensor query_start, double scale);

void sum_tokens(Tensor hidden_TC, Tensor rows_R, Tensor query_start, Tensor seq_lens_R, Tensor sums_MC);

Tensor sample(Tensor logits_RV, Tensor rows_R, Tensor seq_lens_R, Tensor temperature, Tensor top_k, Tensor top_p,
              Tensor min_p, Tensor seed, Tensor held_back_ids, Tensor held_back_until, Tensor last_token,
              std::optional<Tensor> masks_KW, std::optional<Tensor> mask_of_R);

Tensor adjust_logits(Tensor logits_SV, Tensor rows_S, Tensor seq_lens_S, Tensor token_of_slot, Tensor block_table,
                     Tensor num_prompt_tokens, Tensor penalties, Tensor bias_ids, Tensor biases, Tensor bad_words,
                     int64_t block_size);

std::tuple<Tensor, Tensor, Tensor, Tensor> token_logprobs(Tensor logits_SV, Tensor ids_S, int64_t k);

Tensor rope_write_kv(Tensor query_THD, Tensor key_THD, Tensor value_THD, Tensor cos_TF, Tensor sin_TF, Tensor key_cache,
                     Tensor value_cache, Tensor slots_T);

Tensor pack_linear(Tensor weight_OI);

Tensor linear_packed(Tensor x_NI, Tensor panels_PIL, std::optional<Tensor> bias_O, int64_t out_features,
                     std::optional<Tensor> norm_weight_I, double norm_eps, bool gated, std::optional<Tensor> residual_NO);

Tensor embedding_packed(Tensor ids_N, Tensor panels_PIL);

Tensor pack_quantised(int64_t bits, Tensor codes, Tensor scales_OG, std::optional<Tensor> minimums_OG);

Tensor linear_quantised_packed(Tensor x_NI, Tensor panels, std::optional<Tensor> bias_O, int64_t out_features, int64_t bits,
                               int64_t num_groups, bool has_minimums, bool int8_activations, std::optional<Tensor> norm_weight_I,
                               double norm_eps, bool gated, std::optional<Tensor> residual_NO);

Tensor embedding_quantised_packed(Tensor ids_N, Tensor panels, int64_t in_features, int64_t bits, int64_t num_groups, bool has_minimums,
                                  torch::headeronly::ScalarType dtype);

}  // namespace toka
