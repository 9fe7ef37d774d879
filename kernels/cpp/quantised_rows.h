// Activations on their way into a product with quantised weights: int8 codes with a scale for each row and group of in features.
#pragma once

#include "quantised.h"

namespace toka {

constexpr float kMaxActivationCode = 127.0f;
constexpr float kSmallestMagnitude = 1e-30f;  // rows below are taken for zeros: the inverse of their scale would be infinite

// A block of rows side by side, as multiply_quantised reads it.
//
//   codes [quads of all groups][row][4 in features]      x[row, i] = scale[row, group of i] * code[row, i]
//   scales [group][row]
//   code_sums [group][row]: what minimums (times the scale, in float32) or the zero code (negated, in int32) are multiplied with
struct QuantisedRows {
  int8_t* codes;
  float* scales;
  float* code_sums;  // of a symmetric weight: int32
};

// The largest magnitude among `count` values; NaN if one of them is not finite.
template <typename T>
inline float largest_magnitude(const T* values, int64_t count) {
  vfloat largest{};
  vint is_finite = vint{} == vint{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const vfloat value = load_part(values + i, count - i), magnitude = value < 0.0f ? -value : value;
    is_finite &= magnitude < kInfinity;
    largest = max(largest, magnitude);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!is_finite[lane]) return std::numeric_limits<float>::quiet_NaN();
  }
  return max_of(largest);
}

// Turns `num_rows` rows of values, `stride` apart, into a block.
template <typename T>
void quantise_rows(const T* values, int64_t stride, int64_t num_rows, const PanelShape& shape, const QuantisedRows& to) {
  typedef int8_t bytes __attribute__((vector_size(kLanes)));
  const int64_t group_size = shape.group_size(), quads = shape.quads_per_group();
  const int32_t zero_code = static_cast<int32_t>(shape.zero_code());
  for (int64_t r = 0; r < num_rows; ++r) {
    for (int64_t g = 0; g < shape.num_groups; ++g) {
      const T* from = values + r * stride + g * group_size;
      int8_t* codes = to.codes + (g * quads * num_rows + r) * kQuad;
      const float largest = largest_magnitude(from, group_size);
      const vfloat inverse = broadcast(largest > kSmallestMagnitude ? kMaxActivationCode / largest : 0.0f);  // a NaN is told by the scale
      const vfloat to_integer = broadcast(12582912.0f);  // 1.5 * 2**23: adding it rounds to the nearest integer, ties to even
      vint sums{};
      for (int64_t i = 0; i < shape.padded_group_size(); i += kLanes) {
        const vfloat scaled = rounded(load_part(from + i, group_size - i) * inverse);
        const vint rounded_codes = (vint)(scaled + to_integer) - (vint)to_integer;
        sums += rounded_codes;
        const bytes narrow = __builtin_convertvector(rounded_codes, bytes);
        int8_t lanes[kLanes];
        std::memcpy(lanes, &narrow, kLanes);
        for (int64_t q = 0; q * kQuad < std::min<int64_t>(kLanes, shape.padded_group_size() - i); ++q) {
          std::memcpy(codes + (i / kQuad + q) * num_rows * kQuad, lanes + q * kQuad, kQuad);
        }
      }
      int32_t sum = 0;
      for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
      const float scale = largest / kMaxActivationCode;
      to.scales[g * num_rows + r] = scale;
      if (shape.has_minimums) {
        to.code_sums[g * num_rows + r] = scale * static_cast<float>(sum);
      } else {
        const int32_t offset = -zero_code * sum;
        std::memcpy(&to.code_sums[g * num_rows + r], &offset, sizeof(offset));
      }
    }
  }
}

}  // namespace toka
