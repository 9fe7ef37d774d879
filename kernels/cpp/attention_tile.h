// The arithmetic of attention over one tile of keys and values, in float32 whatever the storage is.
//
// One order of operations for every batch: keys are walked in tiles of kTile positions and splits of kSplit positions that are
// aligned to absolute positions, a score is a sum over the head dim in order, an output a sum over positions in order. Neither the
// number of queries handled together nor who computes which split changes a bit, so a token's result depends only on its own
// request: not on its neighbours, the thread count, the chunk of prefill it came in, or whether it came by prefill or decode.
#pragma once

#include "simd.h"
#include "workspace.h"

namespace toka {

constexpr int kTile = 64;                 // key positions a tile
constexpr int kSplit = 256;               // key positions a split: what decode hands to different threads
constexpr int kMaxHeadDim = 256;
constexpr int kRowBlock = 6;              // query rows a micro-kernel call
constexpr int kColumnBlock = kLanes == 8 ? 2 : 4;  // vectors a micro-kernel call: 6 x 2 fills 16 registers, 6 x 4 fills 32
static_assert(kTile % (kLanes * kColumnBlock) == 0 && kSplit % kTile == 0);

// State of a softmax over part of the keys, for up to num_rows query rows (a query row is one token under one query head).
struct SoftmaxState {
  float* max;     // [num_rows], -inf where nothing was seen yet
  float* sum;     // [num_rows] of sums, or [num_rows, kLanes] while a split is running
  float* values;  // [num_rows, padded head dim], not yet divided by sum
};

// Where one tile's keys and values lie; positions outside of what the queries see point to a row of zeros.
template <typename T>
struct TileRows {
  const T* key[kTile];
  const T* value[kTile];
};

// Turns a tile's keys into [head_dim, kTile] so that a vector holds one coordinate of kLanes keys, and asks for the next tile.
template <typename T>
inline void pack_keys(const TileRows<T>& tile, const TileRows<T>* next, int64_t head_dim, float* keys) {
  for (int group = 0; group < kTile; group += kLanes) {
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      vfloat square[kLanes];
      const int64_t count = head_dim - d;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const T* key = tile.key[group + i] + d;
        square[i] = load_part(key, count);
      }
      constexpr int64_t kPerLine = kCacheLineBytes / static_cast<int64_t>(sizeof(T));
      if (next != nullptr && d % kPerLine == 0) {
        for (int i = 0; i < kLanes; ++i) {
          __builtin_prefetch(next->key[group + i] + d);
          __builtin_prefetch(next->value[group + i] + d);
        }
      }
      transpose(square);
      for (int64_t i = 0; i < kLanes && i < count; ++i) store(keys + (d + i) * kTile + group, square[i]);
    }
  }
}

// Copies values [begin, end) of the tile to float32 rows of padded_dim.
template <typename T>
inline void pack_values(const TileRows<T>& tile, int begin, int end, int64_t head_dim, int64_t padded_dim, float* values) {
  for (int j = begin; j < end; ++j) {
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      store(values + j * padded_dim + d, load_part(tile.value[j] + d, head_dim - d));
    }
  }
}

template <int Rows>
inline void score_block(const float* query, const float* keys, int64_t head_dim, float* scores) {
  for (int column = 0; column < kTile; column += kLanes * kColumnBlock) {
    vfloat sum[Rows][kColumnBlock] = {};
    for (int64_t d = 0; d < head_dim; ++d) {
      vfloat key[kColumnBlock];
      for (int c = 0; c < kColumnBlock; ++c) key[c] = load(keys + d * kTile + column + c * kLanes);
      for (int r = 0; r < Rows; ++r) {
        const vfloat q = broadcast(query[r * head_dim + d]);
        for (int c = 0; c < kColumnBlock; ++c) sum[r][c] = fma(q, key[c], sum[r][c]);
      }
    }
    for (int r = 0; r < Rows; ++r) {
      for (int c = 0; c < kColumnBlock; ++c) store(scores + r * kTile + column + c * kLanes, sum[r][c]);
    }
  }
}

template <int Rows, int Columns, typename T>
inline void value_block(const float* weights, const T* const* values, int begin, int end, int64_t d, float* out,
                        int64_t padded_dim) {
  vfloat sum[Rows][Columns];
  for (int r = 0; r < Rows; ++r) {
    for (int c = 0; c < Columns; ++c) sum[r][c] = load(out + r * padded_dim + d + c * kLanes);
  }
  for (int j = begin; j < end; ++j) {
    vfloat value[Columns];
    for (int c = 0; c < Columns; ++c) value[c] = load(values[j] + d + c * kLanes);
    for (int r = 0; r < Rows; ++r) {
      const vfloat w = broadcast(weights[r * kTile + j]);
      for (int c = 0; c < Columns; ++c) sum[r][c] = fma(w, value[c], sum[r][c]);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int c = 0; c < Columns; ++c) store(out + r * padded_dim + d + c * kLanes, sum[r][c]);
  }
}

template <int Rows, typename T>
inline void value_rows(const float* weights, const T* const* values, int begin, int end, float* out,
                       int64_t padded_dim) {
  int64_t d = 0;
  for (; d + kColumnBlock * kLanes <= padded_dim; d += kColumnBlock * kLanes) {
    value_block<Rows, kColumnBlock>(weights, values, begin, end, d, out, padded_dim);
  }
  for (; d < padded_dim; d += kLanes) value_block<Rows, 1>(weights, values, begin, end, d, out, padded_dim);
}

// Calls body with the number of rows of each block of [begin, end) as a compile-time constant.
template <typename Body>
inline void for_row_blocks(int64_t begin, int64_t end, Body&& body) {
  int64_t row = begin;
  for (; row + kRowBlock <= end; row += kRowBlock) body(row, std::integral_constant<int, kRowBlock>());
  switch (end - row) {
    case 5:
      return body(row, std::integral_constant<int, 5>());
    case 4:
      return body(row, std::integral_constant<int, 4>());
    case 3:
      return body(row, std::integral_constant<int, 3>());
    case 2:
      return body(row, std::integral_constant<int, 2>());
    case 1:
      return body(row, std::integral_constant<int, 1>());
  }
}

// scores[begin:end, kTile] = query . keys (the query is already scaled).
void score_tile(const float* query, const float* keys, int64_t head_dim, int64_t begin, int64_t end, float* scores);

// Turns scores of rows [begin, end) into weights and moves the running softmax on. Row r sees the tile's columns
// [first_seen[r], end_seen[r]); old_scale is room for one float a row, rounded up to whole vectors.
void softmax_tile(float* scores, const int32_t* first_seen, const int32_t* end_seen, int64_t begin, int64_t end,
                  SoftmaxState state, int64_t padded_dim, float* old_scale);

// state.values[begin:end] += weights[:, from:to] . values[from:to]; each value row is padded_dim long.
template <typename T>
void accumulate_tile(const float* weights, const T* const* values, int from, int to, int64_t begin, int64_t end,
                     SoftmaxState state, int64_t padded_dim) {
  for_row_blocks(begin, end, [&](int64_t row, auto rows) {
    value_rows<rows()>(weights + row * kTile, values, from, to, state.values + row * padded_dim, padded_dim);
  });
}

// Adds a finished split to the total; splits must come in ascending order of position.
void merge_split(SoftmaxState split, SoftmaxState total, int64_t num_rows, int64_t padded_dim);

}  // namespace toka
