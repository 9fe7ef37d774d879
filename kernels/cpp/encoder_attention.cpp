// toka_cpp::encoder_attention: every token of a row sees all of the row. Keys and values come from the step itself, not from a cache.
//
// A unit is one head of one row for a tile of its queries; units are shared out over torch's threads as they come. As in
// paged_attention.cpp keys are walked in tiles from the row's first one, so a row's result depends on nothing but the row.
#include "kernels.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "attention_tile.h"
#include "tensors.h"
#include "workspace.h"

namespace toka {
namespace {

constexpr int64_t kQueriesPerUnit = 128;
constexpr int64_t kParallelCost = 1 << 18;  // queries x keys x head dim below which waking threads costs more than it saves

struct Unit {
  int64_t row_begin, row_end;    // the row's tokens, all of which are keys
  int64_t query_begin, query_end;  // those of them that ask
  int64_t head;
};

// One thread's working memory, cut from one allocation.
struct Scratch {
  float *query, *keys, *values, *scores, *old_scale;
  int32_t *first_seen, *end_seen;
  SoftmaxState state;

  static int64_t num_floats(int64_t head_dim, int64_t padded_dim) {
    return kQueriesPerUnit * (head_dim + kTile + 3 + 1 + kLanes + padded_dim) + kTile * (head_dim + padded_dim) + 10 * 16;
  }

  Scratch(float* memory, int64_t head_dim, int64_t padded_dim) {
    const auto take = [&](int64_t count) { return std::exchange(memory, memory + round_up(count, 16)); };
    query = take(kQueriesPerUnit * head_dim);
    keys = take(kTile * head_dim);
    values = take(kTile * padded_dim);
    scores = take(kQueriesPerUnit * kTile);
    old_scale = take(kQueriesPerUnit);
    first_seen = reinterpret_cast<int32_t*>(take(kQueriesPerUnit));
    end_seen = reinterpret_cast<int32_t*>(take(kQueriesPerUnit));
    state = {take(kQueriesPerUnit), take(kQueriesPerUnit * kLanes), take(kQueriesPerUnit * padded_dim)};
  }
};

template <typename T>
class EncoderAttention {
 public:
  EncoderAttention(View<T> query, View<T> key, View<T> value, View<T> out, float scale)
      : query_(query), key_(key), value_(value), out_(out), scale_(scale), padded_dim_(round_up(head_dim(), kLanes)) {}

  void run(View<const int32_t> query_start) {
    int64_t cost = 0;
    for (int64_t i = 0; i + 1 < query_start.sizes[0]; ++i) {
      const int64_t begin = *query_start.at(i), end = *query_start.at(i + 1);
      STD_TORCH_CHECK(0 <= begin && begin <= end && end <= query_.sizes[0],
                      "query_start must ascend from 0 to the number of tokens");
      cost += (end - begin) * (end - begin) * num_heads();
      plan_row(begin, end);
    }
    clear_unowned(*query_start.at(query_start.sizes[0] - 1));
    const int64_t threads = cost * head_dim() >= kParallelCost ? torch::stable::get_num_threads() : 1;
    const int64_t num_workers = std::min<int64_t>(threads, static_cast<int64_t>(units_.size()));
    if (num_workers == 0) return;
    const int64_t per_worker = round_up(Scratch::num_floats(head_dim(), padded_dim_), 16);
    float* memory = workspace(per_worker * num_workers);
    const auto work = [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) {
        drain_units(Scratch(memory + worker * per_worker, head_dim(), padded_dim_));
      }
    };
    if (num_workers == 1) {
      work(0, 1);
    } else {
      torch::stable::parallel_for(0, num_workers, 1, work);
    }
  }

 private:
  int64_t num_heads() const { return query_.sizes[1]; }
  int64_t head_dim() const { return query_.sizes[2]; }

  void plan_row(int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kQueriesPerUnit) {
      for (int64_t head = 0; head < num_heads(); ++head) {
        units_.push_back({begin, end, first, std::min(first + kQueriesPerUnit, end), head});
      }
    }
  }

  void clear_unowned(int64_t num_owned) const {
    const int64_t width = num_heads() * head_dim();
    std::fill_n(out_.data + num_owned * width, (out_.sizes[0] - num_owned) * width, T(0.0f));
  }

  void drain_units(const Scratch& scratch) {
    const int64_t num_units = static_cast<int64_t>(units_.size());
    for (int64_t i = next_unit_++; i < num_units; i = next_unit_++) run_unit(units_[i], scratch);
  }

  void run_unit(const Unit& unit, const Scratch& scratch) const {
    const int64_t num_queries = unit.query_end - unit.query_begin;
    load_query(unit, scratch);
    std::fill_n(scratch.state.max, num_queries, -kInfinity);
    std::fill_n(scratch.state.sum, num_queries * kLanes, 0.0f);
    std::fill_n(scratch.state.values, num_queries * padded_dim_, 0.0f);
    std::fill_n(scratch.first_seen, num_queries, 0);
    TileRows<T> tiles[2];
    int current = 0;
    locate(unit, unit.row_begin, tiles[current]);
    for (int64_t tile = unit.row_begin; tile < unit.row_end; tile += kTile, current = 1 - current) {
      const bool more = tile + kTile < unit.row_end;
      if (more) locate(unit, tile + kTile, tiles[1 - current]);
      const int num_keys = static_cast<int>(std::min<int64_t>(kTile, unit.row_end - tile));
      attend_tile(num_queries, num_keys, tiles[current], more ? &tiles[1 - current] : nullptr, scratch);
    }
    store_out(unit, scratch);
  }

  void load_query(const Unit& unit, const Scratch& scratch) const {
    float* to = scratch.query;
    for (int64_t t = unit.query_begin; t < unit.query_end; ++t) {
      const T* from = query_.at(t, unit.head);
      for (int64_t d = 0; d < head_dim(); ++d) *to++ = static_cast<float>(from[d]) * scale_;
    }
  }

  // Finds the keys and values of a tile; beyond the row zeros stand in.
  void locate(const Unit& unit, int64_t tile_begin, TileRows<T>& tile) const {
    alignas(kCacheLineBytes) static const T zeros[kMaxHeadDim] = {};
    for (int j = 0; j < kTile; ++j) {
      const bool inside = tile_begin + j < unit.row_end;
      tile.key[j] = inside ? key_.at(tile_begin + j, unit.head) : zeros;
      tile.value[j] = inside ? value_.at(tile_begin + j, unit.head) : zeros;
    }
  }

  void attend_tile(int64_t num_queries, int num_keys, const TileRows<T>& tile, const TileRows<T>* next,
                   const Scratch& scratch) const {
    std::fill_n(scratch.end_seen, num_queries, num_keys);
    pack_keys(tile, next, head_dim(), scratch.keys);
    score_tile(scratch.query, scratch.keys, head_dim(), 0, num_queries, scratch.scores);
    softmax_tile(scratch.scores, scratch.first_seen, scratch.end_seen, 0, num_queries, scratch.state, padded_dim_,
                 scratch.old_scale);
    if constexpr (std::is_same_v<T, float>) {
      if (head_dim() == padded_dim_) {  // whole vectors: values are read where they lie
        accumulate_tile(scratch.scores, tile.value, 0, num_keys, 0, num_queries, scratch.state, padded_dim_);
        return;
      }
    }
    const float* values[kTile];
    pack_values(tile, 0, num_keys, head_dim(), padded_dim_, scratch.values);
    for (int j = 0; j < num_keys; ++j) values[j] = scratch.values + j * padded_dim_;
    accumulate_tile(scratch.scores, values, 0, num_keys, 0, num_queries, scratch.state, padded_dim_);
  }

  void store_out(const Unit& unit, const Scratch& scratch) const {
    for (int64_t t = unit.query_begin; t < unit.query_end; ++t) {
      const int64_t r = t - unit.query_begin;
      const float scale = 1.0f / sum_of(load(scratch.state.sum + r * kLanes));
      const float* from = scratch.state.values + r * padded_dim_;
      T* to = out_.at(t, unit.head);
      for (int64_t d = 0; d < head_dim(); ++d) to[d] = static_cast<T>(from[d] * scale);
    }
  }

  View<T> query_, key_, value_, out_;
  float scale_;
  int64_t padded_dim_;
  std::vector<Unit> units_;
  std::atomic<int64_t> next_unit_{0};
};

}  // namespace

Tensor encoder_attention(Tensor query_THD, Tensor key_THD, Tensor value_THD, Tensor query_start, double scale) {
  const Tensor query = dense_last(query_THD), key = dense_last(key_THD), value = dense_last(value_THD);
  STD_TORCH_CHECK(query.dim() == 3 && query.size(2) <= kMaxHeadDim, "query must be [T, H, D], D at most ", kMaxHeadDim);
  for (const Tensor& other : {key, value}) {
    STD_TORCH_CHECK(other.dim() == 3 && other.scalar_type() == query.scalar_type(),
                    "query, keys and values must all be [T, H, D] and of one dtype");
    for (int64_t d = 0; d < 3; ++d) STD_TORCH_CHECK(other.size(d) == query.size(d), "query, keys and values differ in shape");
  }
  STD_TORCH_CHECK(query_start.size(0) > 0, "query_start must have an entry");
  const auto starts = table<int32_t>(query_start, 1, ScalarType::Int, "query_start");
  Tensor out = empty({query.size(0), query.size(1), query.size(2)}, query.scalar_type());
  with_float_type(query.scalar_type(), "query", [&](auto zero) {
    using T = decltype(zero);
    EncoderAttention<T>(view<T>(query, 3, "query"), view<T>(key, 3, "key"), view<T>(value, 3, "value"),
                        view<T>(out, 3, "out"), static_cast<float>(scale))
        .run(starts);
  });
  return out;
}

}  // namespace toka
