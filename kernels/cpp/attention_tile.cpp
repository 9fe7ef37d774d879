#include "attention_tile.h"

#include <type_traits>

namespace toka {

void score_tile(const float* query, const float* keys, int64_t head_dim, int64_t begin, int64_t end, float* scores) {
  for_row_blocks(begin, end, [&](int64_t row, auto rows) {
    score_block<rows()>(query + row * head_dim, keys, head_dim, scores + row * kTile);
  });
}

// Sets the scores of unseen columns to -inf and returns the largest score left.
static float mask_row(float* scores, int32_t first_seen, int32_t end_seen) {
  const bool masked = first_seen > 0 || end_seen < kTile;
  vfloat largest = broadcast(-kInfinity);
  for (int c = 0; c < kTile; c += kLanes) {
    vfloat score = load(scores + c);
    if (masked) {
      const vint column = lane_numbers() + c;
      score = (column >= first_seen) & (column < end_seen) ? score : broadcast(-kInfinity);
      store(scores + c, score);
    }
    largest = max(score, largest);
  }
  return max_of(largest);
}

void softmax_tile(float* scores, const int32_t* first_seen, const int32_t* end_seen, int64_t begin, int64_t end,
                  SoftmaxState state, int64_t padded_dim, float* old_scale) {
  for (int64_t r = begin; r < end; ++r) {
    const float tile_max = mask_row(scores + r * kTile, first_seen[r], end_seen[r]);
    const float old_max = state.max[r];
    const float new_max = tile_max > old_max ? tile_max : old_max;
    old_scale[r] = old_max == new_max ? 0.0f : old_max - new_max;  // the difference of two -inf would be NaN
    state.max[r] = new_max;
  }
  for (int64_t r = begin / kLanes * kLanes; r < end; r += kLanes) store(old_scale + r, exp(load(old_scale + r)));
  for (int64_t r = begin; r < end; ++r) {
    const vfloat subtract = broadcast(state.max[r] == -kInfinity ? 0.0f : state.max[r]);
    vfloat sum = load(state.sum + r * kLanes) * old_scale[r];
    for (int c = 0; c < kTile; c += kLanes) {
      const vfloat weight = exp(load(scores + r * kTile + c) - subtract);
      store(scores + r * kTile + c, weight);
      sum += weight;
    }
    store(state.sum + r * kLanes, sum);
    if (old_scale[r] == 1.0f) continue;  // multiplying by one changes nothing
    float* values = state.values + r * padded_dim;
    for (int64_t d = 0; d < padded_dim; d += kLanes) store(values + d, load(values + d) * old_scale[r]);
  }
}

void merge_split(SoftmaxState split, SoftmaxState total, int64_t num_rows, int64_t padded_dim) {
  for (int64_t r = 0; r < num_rows; ++r) {
    if (split.sum[r] == 0.0f) continue;  // this row sees nothing of the split
    const float new_max = split.max[r] > total.max[r] ? split.max[r] : total.max[r];
    const vfloat total_scale = exp(broadcast(total.max[r] - new_max)), split_scale = exp(broadcast(split.max[r] - new_max));
    const vfloat sum = fma(broadcast(split.sum[r]), split_scale, broadcast(total.sum[r]) * total_scale);
    total.max[r] = new_max;
    total.sum[r] = sum[0];
    float* out = total.values + r * padded_dim;
    const float* in = split.values + r * padded_dim;
    for (int64_t d = 0; d < padded_dim; d += kLanes) {
      store(out + d, fma(load(in + d), split_scale, load(out + d) * total_scale));
    }
  }
}

}  // namespace toka
