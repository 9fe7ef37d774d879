// How every kernel reads logits: as float32, NaN as -inf, +inf as the largest finite number.
#pragma once

#include "simd.h"

namespace toka {

constexpr float kLargest = std::numeric_limits<float>::max();

// NaN becomes -inf (it compares false), +inf the largest finite number.
inline vfloat drawable(vfloat x) {
  x = x > broadcast(-kInfinity) ? x : broadcast(-kInfinity);
  return x < broadcast(kLargest) ? x : broadcast(kLargest);
}

// Lane-wise load of logits[i : i + kLanes], -inf past the end.
template <typename T>
vfloat load_logits(const T* logits, int64_t i, int64_t count) {
  if (i + kLanes <= count) return drawable(load(logits + i));
  vfloat x = broadcast(-kInfinity);
  for (int64_t lane = 0; i + lane < count; ++lane) x[lane] = static_cast<float>(logits[i + lane]);
  return drawable(x);
}

}  // namespace toka
