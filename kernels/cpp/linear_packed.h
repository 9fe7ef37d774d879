// The arithmetic of a product with packed weights: one block of rows times one panel, in float32.
//
// One order of operations for every batch: an output is a chain of FMAs over the in features, ascending from zero, one chain for each
// lane. Blocks of any height, chunks of any depth (the chain goes on where it stood) and any number of threads give the same bits,
// so a row's result depends on nothing but the row.
//
// Shapes: a block of `Rows` rows keeps Rows x kBlockVectors sums in registers, each k loads kBlockVectors vectors of weights and
// broadcasts Rows activations. AVX-512 has 32 registers: 14 x 2 sums, 2 weights, 1 activation = 31; 28 FMAs (14 cycles on two ports)
// beside 16 loads (8 cycles). AVX2 has 16: 6 x 2 + 2 + 1 = 15.
#pragma once

#include "simd.h"

namespace toka {

constexpr int kPanelWidth = 32;  // as PANEL_WIDTH in op_schema.py
constexpr int kBlockRows = kLanes == 16 ? 14 : kLanes == 8 ? 6 : 4;
constexpr int kBlockVectors = kLanes == 4 ? 4 : 2;
constexpr int kDepthStep = 4;  // in features between two rounds of prefetching
static_assert(kBlockRows <= kLanes, "pack_rows turns one square of lanes");
static_assert(kPanelWidth % (kLanes * kBlockVectors) == 0);

// Panels that a block of so many rows meets at once: with few rows the sums of several fit the registers, and several streams of
// weights come faster from memory than one.
constexpr int panels_at_once(int num_rows) { return num_rows * 4 <= kBlockRows ? 4 : num_rows * 2 <= kBlockRows ? 2 : 1; }

// Weights that will be wanted soon: in each round of kDepthStep in features, `lines` cache lines from `next` on are asked for.
struct Prefetch {
  const char* next;
  int64_t lines;
};

// One or more panels, `stride` weights apart.
struct Panels {
  const float* first;
  int64_t stride;
};

// sums[NumPanels, Rows, kPanelWidth] (+)= activations[depth, Rows]ᵀ . panels[depth, kPanelWidth]; they start from zero if `fresh`.
template <int Rows, int NumPanels>
void multiply_block(const float* activations, Panels panels, int64_t depth, bool fresh, float* sums, Prefetch prefetch) {
  constexpr int kColumns = kLanes * kBlockVectors;
  for (int column = 0; column < kPanelWidth; column += kColumns) {
    const auto sums_at = [&](int p, int r, int v) { return sums + (p * Rows + r) * kPanelWidth + column + v * kLanes; };
    vfloat sum[NumPanels][Rows][kBlockVectors] = {};
    if (!fresh) {
      for (int p = 0; p < NumPanels; ++p) {
        for (int r = 0; r < Rows; ++r) {
          for (int v = 0; v < kBlockVectors; ++v) sum[p][r][v] = load(sums_at(p, r, v));
        }
      }
    }
    const auto step = [&](int64_t k) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int p = 0; p < NumPanels; ++p) {
        vfloat weight[kBlockVectors];
        for (int v = 0; v < kBlockVectors; ++v) {
          weight[v] = load(panels.first + p * panels.stride + k * kPanelWidth + column + v * kLanes);
        }
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
          const vfloat activation = broadcast(activations[k * Rows + r]);
          for (int v = 0; v < kBlockVectors; ++v) sum[p][r][v] = fma(activation, weight[v], sum[p][r][v]);
        }
      }
    };
    int64_t k = 0;
    for (; k + kDepthStep <= depth; k += kDepthStep) {
      for (int64_t i = 0; i < prefetch.lines; ++i, prefetch.next += kCacheLineBytes) {
        for (int p = 0; p < NumPanels; ++p) __builtin_prefetch(prefetch.next + p * panels.stride * sizeof(float));
      }
#pragma GCC unroll 4
      for (int i = 0; i < kDepthStep; ++i) step(k + i);
    }
    for (; k < depth; ++k) step(k);
    for (int p = 0; p < NumPanels; ++p) {
      for (int r = 0; r < Rows; ++r) {
        for (int v = 0; v < kBlockVectors; ++v) store(sums_at(p, r, v), sum[p][r][v]);
      }
    }
    prefetch.lines = 0;
  }
}

// to[depth, num_rows] = the rows' values, turned; row r stands at from + r * stride. Writes up to kLanes floats beyond the end.
template <typename T>
inline void pack_rows(const T* from, int64_t stride, int num_rows, int64_t depth, float* to) {
  for (int64_t k = 0; k < depth; k += kLanes) {
    if (num_rows == 1) {
      store(to + k, load_part(from + k, depth - k));
      continue;
    }
    vfloat square[kLanes] = {};
    for (int r = 0; r < num_rows; ++r) square[r] = load_part(from + r * stride + k, depth - k);
    transpose(square);
    // Whole vectors in ascending order: the next store covers the lanes behind the last row.
    for (int64_t i = 0; i < kLanes && k + i < depth; ++i) store(to + (k + i) * num_rows, square[i]);
  }
}

}  // namespace toka
