// Working memory of the operators, kept from call to call.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <memory>

#include "simd.h"

namespace toka {

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Grows and never shrinks; aligned to cache lines. One for each thread that calls an operator, for the time of the call.
inline float* workspace(int64_t num_floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t capacity = 0;
  if (num_floats > capacity) {
    memory.reset();
    capacity = 0;
    memory.reset(static_cast<float*>(std::aligned_alloc(kCacheLineBytes, round_up(num_floats * 4, kCacheLineBytes))));
    STD_TORCH_CHECK(memory != nullptr, "no memory for ", num_floats * 4, " bytes of a kernel's working space");
    capacity = num_floats;
  }
  return memory.get();
}

}  // namespace toka
