// toka_cpp::paged_attention: plans the step's attention as units of work, shares them out over torch's threads.
//
// A unit is one KV head of one row for a tile of its queries; all query heads of that KV head go together, so keys and values are
// read once. Units that cost more than their share of a thread's time and have few queries (decode over a long context) are cut at
// the splits of attention_tile.h, and whoever finishes the last split merges them. How the work is cut never changes the result.
#include "kernels.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "attention_tile.h"
#include "tensors.h"

namespace toka {
namespace {

constexpr int64_t kPackingCost = 16;       // turning a tile of keys costs about as much as this many query rows
constexpr int64_t kMaxSplitRows = 32;      // units with more query rows than this are not split
constexpr int64_t kTasksPerThread = 4;     // a unit is heavy if it costs more than this share of a thread's work
constexpr int64_t kParallelCost = 1 << 18;  // query rows x keys x head dim below which waking threads costs more than it saves

struct Unit {
  int32_t batch_index;  // which of the step's rows
  int32_t kv_head;
  int32_t first_token;  // in the step's tokens
  int32_t num_tokens;
  int64_t first_position;
  int64_t kv_begin, kv_end;   // positions that its queries see
  int64_t partial = -1;       // where its splits' states lie, in units of one split; -1 = done by one thread
  int32_t remaining_at = -1;  // index of the counter of its unfinished splits

  int64_t first_split() const { return kv_begin / kSplit; }
  int64_t end_split() const { return (kv_end + kSplit - 1) / kSplit; }
};

struct Task {
  int32_t unit;
  int32_t split;  // relative to the unit's first; -1 = the whole unit
};

// Everything that one call of the operator reads and writes; T stores the cache.
template <typename T>
struct Problem {
  View<void> query, out;
  ScalarType query_dtype;
  View<T> key_cache, value_cache;
  View<const int32_t> block_table, rows, query_start, seq_lens;
  float scale;
  int64_t window;  // 0 = off

  int64_t num_heads() const { return query.sizes[1]; }
  int64_t head_dim() const { return query.sizes[2]; }
  int64_t num_kv_heads() const { return key_cache.sizes[1]; }
  int64_t block_size() const { return key_cache.sizes[2]; }
  int64_t group() const { return num_heads() / num_kv_heads(); }
  int64_t padded_dim() const { return round_up(head_dim(), kLanes); }
  int64_t tokens_per_unit() const { return std::max<int64_t>(1, (head_dim() <= 128 ? 128 : 64) / group()); }
  int64_t max_rows_per_unit() const { return tokens_per_unit() * group(); }
};

// One thread's working memory, cut from one allocation.
struct Scratch {
  float *query, *keys, *values, *scores, *old_scale;
  int32_t *first_seen, *end_seen;
  SoftmaxState split, total;

  static int64_t num_floats(int64_t rows, int64_t head_dim, int64_t padded_dim) {
    const int64_t rows_up = round_up(rows, kLanes);
    return rows_up * (head_dim + kTile + 3 + 2 + kLanes + 1 + 2 * padded_dim) + kTile * (head_dim + padded_dim) + 16 * 16;
  }

  Scratch(float* memory, int64_t rows, int64_t head_dim, int64_t padded_dim) {
    const int64_t rows_up = round_up(rows, kLanes);
    const auto take = [&](int64_t count) { return std::exchange(memory, memory + round_up(count, 16)); };
    query = take(rows_up * head_dim);
    keys = take(kTile * head_dim);
    values = take(kTile * padded_dim);
    scores = take(rows_up * kTile);
    old_scale = take(rows_up);
    first_seen = reinterpret_cast<int32_t*>(take(rows_up));
    end_seen = reinterpret_cast<int32_t*>(take(rows_up));
    split = {take(rows_up), take(rows_up * kLanes), take(rows_up * padded_dim)};
    total = {take(rows_up), take(rows_up), take(rows_up * padded_dim)};
  }
};

// Grows and never shrinks; aligned to cache lines. One for each thread that calls the operator.
float* workspace(int64_t num_floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t capacity = 0;
  if (num_floats > capacity) {
    memory.reset();
    capacity = 0;
    memory.reset(static_cast<float*>(std::aligned_alloc(kCacheLineBytes, round_up(num_floats * 4, kCacheLineBytes))));
    STD_TORCH_CHECK(memory != nullptr, "paged_attention: no memory for ", num_floats * 4, " bytes of working space");
    capacity = num_floats;
  }
  return memory.get();
}

template <typename T>
class Attention {
 public:
  explicit Attention(const Problem<T>& problem) : p_(problem) {}

  void run() {
    const int64_t cost = plan_units();
    if (units_.empty()) return;
    const bool worth_threads = cost * p_.head_dim() >= kParallelCost;
    const int64_t num_threads = worth_threads ? torch::stable::get_num_threads() : 1;
    plan_tasks(cost, num_threads);

    const int64_t num_workers = std::min<int64_t>(num_threads, static_cast<int64_t>(tasks_.size()));
    const int64_t rows = p_.max_rows_per_unit();
    const int64_t per_worker = round_up(Scratch::num_floats(rows, p_.head_dim(), p_.padded_dim()), 16);
    float* memory = workspace(per_worker * num_workers + num_partials_ * partial_floats());
    partials_ = memory + per_worker * num_workers;
    const auto work = [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) {
        Scratch scratch(memory + worker * per_worker, rows, p_.head_dim(), p_.padded_dim());
        drain_tasks(scratch);
      }
    };
    if (num_workers == 1) {
      work(0, 1);
    } else {
      torch::stable::parallel_for(0, num_workers, 1, work);
    }
    STD_TORCH_CHECK(!bad_block_, "paged_attention: the block table names a block outside of the cache");
  }

 private:
  // ---------------------------------------------------------------------------------------------------------- planning

  int64_t unit_cost(const Unit& unit) const {
    return (unit.num_tokens * p_.group() + kPackingCost) * (unit.kv_end - unit.kv_begin);
  }

  int64_t plan_units() {
    const int64_t num_rows = p_.rows.sizes[0], num_tokens = p_.query.sizes[0];
    const int64_t capacity = p_.block_table.sizes[1] * p_.block_size();
    int64_t cost = 0;
    for (int64_t i = 0; i < num_rows; ++i) {
      const int64_t row = *p_.rows.at(i), begin = *p_.query_start.at(i), end = *p_.query_start.at(i + 1);
      STD_TORCH_CHECK(0 <= begin && begin <= end && end <= num_tokens, "query_start must ascend from 0 to the number of tokens");
      if (row < 0 || begin == end) continue;
      const int64_t seq_len = *p_.seq_lens.at(i);
      STD_TORCH_CHECK(row < p_.block_table.sizes[0], "row ", row, " is outside of the block table");
      STD_TORCH_CHECK(end - begin <= seq_len && seq_len <= capacity, "seq_lens[", i, "] = ", seq_len,
                      " must hold the row's queries and fit its block table");
      cost += plan_row(i, begin, end, seq_len);
    }
    return cost;
  }

  int64_t plan_row(int64_t batch_index, int64_t begin, int64_t end, int64_t seq_len) {
    int64_t cost = 0;
    for (int64_t first = begin; first < end; first += p_.tokens_per_unit()) {
      Unit unit;
      unit.batch_index = static_cast<int32_t>(batch_index);
      unit.first_token = static_cast<int32_t>(first);
      unit.num_tokens = static_cast<int32_t>(std::min(p_.tokens_per_unit(), end - first));
      unit.first_position = seq_len - (end - first);
      unit.kv_begin = p_.window > 0 ? std::max<int64_t>(0, unit.first_position - p_.window + 1) : 0;
      unit.kv_end = unit.first_position + unit.num_tokens;
      for (int64_t head = 0; head < p_.num_kv_heads(); ++head) {
        unit.kv_head = static_cast<int32_t>(head);
        units_.push_back(unit);
        cost += unit_cost(unit);
      }
    }
    return cost;
  }

  // Heavy units first, in descending order of cost, split where they can be; then the others as they come.
  void plan_tasks(int64_t cost, int64_t num_threads) {
    const int64_t share = cost / (num_threads * kTasksPerThread);
    std::vector<int32_t> heavy;
    tasks_.reserve(units_.size());
    if (num_threads > 1) {
      for (size_t u = 0; u < units_.size(); ++u) {
        if (unit_cost(units_[u]) > share) heavy.push_back(static_cast<int32_t>(u));
      }
      std::stable_sort(heavy.begin(), heavy.end(),
                       [&](int32_t a, int32_t b) { return unit_cost(units_[a]) > unit_cost(units_[b]); });
    }
    int32_t num_split_units = 0;
    for (const int32_t u : heavy) {
      Unit& unit = units_[u];
      const int64_t num_splits = unit.end_split() - unit.first_split();
      if (num_splits == 1 || unit.num_tokens * p_.group() > kMaxSplitRows) {
        tasks_.push_back({u, -1});
        continue;
      }
      unit.partial = num_partials_;
      unit.remaining_at = num_split_units++;
      num_partials_ += num_splits;
      for (int32_t split = 0; split < num_splits; ++split) tasks_.push_back({u, split});
    }
    remaining_ = std::make_unique<std::atomic<int32_t>[]>(num_split_units);
    for (const int32_t u : heavy) {
      const Unit& unit = units_[u];
      if (unit.remaining_at >= 0) remaining_[unit.remaining_at] = static_cast<int32_t>(unit.end_split() - unit.first_split());
    }
    for (size_t u = 0; u < units_.size(); ++u) {
      if (num_threads == 1 || unit_cost(units_[u]) <= share) tasks_.push_back({static_cast<int32_t>(u), -1});
    }
  }

  // --------------------------------------------------------------------------------------------------------- execution

  void drain_tasks(Scratch& scratch) {
    const int64_t num_tasks = static_cast<int64_t>(tasks_.size());
    for (int64_t i = next_task_++; i < num_tasks; i = next_task_++) {
      const Unit& unit = units_[tasks_[i].unit];
      if (tasks_[i].split < 0) {
        run_unit(unit, scratch);
      } else {
        run_split(unit, tasks_[i].split, scratch);
      }
    }
  }

  void run_unit(const Unit& unit, Scratch& scratch) {
    load_query(unit, scratch);
    clear(scratch.total, unit, 1);
    for (int64_t split = unit.first_split(); split < unit.end_split(); ++split) {
      attend_split(unit, split, scratch);
      merge_split(scratch.split, scratch.total, unit.num_tokens * p_.group(), p_.padded_dim());
    }
    store_out(unit, scratch.total);
  }

  void run_split(const Unit& unit, int64_t split, Scratch& scratch) {
    const int64_t rows = unit.num_tokens * p_.group();
    load_query(unit, scratch);
    attend_split(unit, unit.first_split() + split, scratch);
    const SoftmaxState mine = partial(unit.partial + split);
    std::copy_n(scratch.split.max, rows, mine.max);
    std::copy_n(scratch.split.sum, rows, mine.sum);
    std::copy_n(scratch.split.values, rows * p_.padded_dim(), mine.values);
    if (remaining_[unit.remaining_at].fetch_sub(1, std::memory_order_acq_rel) > 1) return;

    clear(scratch.total, unit, 1);
    const int64_t num_splits = unit.end_split() - unit.first_split();
    for (int64_t s = 0; s < num_splits; ++s) merge_split(partial(unit.partial + s), scratch.total, rows, p_.padded_dim());
    store_out(unit, scratch.total);
  }

  int64_t partial_floats() const { return round_up(kMaxSplitRows * (2 + p_.padded_dim()), 16); }

  SoftmaxState partial(int64_t index) const {
    float* memory = partials_ + index * partial_floats();
    return {memory, memory + kMaxSplitRows, memory + 2 * kMaxSplitRows};
  }

  void clear(SoftmaxState state, const Unit& unit, int64_t sums_per_row) const {
    const int64_t rows = unit.num_tokens * p_.group();
    std::fill_n(state.max, rows, -kInfinity);
    std::fill_n(state.sum, rows * sums_per_row, 0.0f);
    std::fill_n(state.values, rows * p_.padded_dim(), 0.0f);
  }

  // Query rows in the order token, head: the rows that a tile concerns are then a range.
  void load_query(const Unit& unit, Scratch& scratch) const {
    with_float_type(p_.query_dtype, "query", [&](auto zero) {
      const auto query = p_.query.template as<decltype(zero)>();
      float* to = scratch.query;
      for (int64_t r = 0; r < unit.num_tokens * p_.group(); ++r) {
        const auto* from = query.at(unit.first_token + r / p_.group(), unit.kv_head * p_.group() + r % p_.group());
        for (int64_t d = 0; d < p_.head_dim(); ++d) *to++ = static_cast<float>(from[d]) * p_.scale;
      }
    });
  }

  void store_out(const Unit& unit, SoftmaxState state) const {
    with_float_type(p_.query_dtype, "query", [&](auto zero) {
      using Q = decltype(zero);
      const auto out = p_.out.template as<Q>();
      for (int64_t r = 0; r < unit.num_tokens * p_.group(); ++r) {
        const float scale = 1.0f / state.sum[r];
        const float* from = state.values + r * p_.padded_dim();
        Q* to = out.at(unit.first_token + r / p_.group(), unit.kv_head * p_.group() + r % p_.group());
        for (int64_t d = 0; d < p_.head_dim(); ++d) to[d] = static_cast<Q>(from[d] * scale);
      }
    });
  }

  void attend_split(const Unit& unit, int64_t split, Scratch& scratch) {
    clear(scratch.split, unit, kLanes);
    const int64_t begin = std::max(split * kSplit, unit.kv_begin), end = std::min((split + 1) * kSplit, unit.kv_end);
    TileRows<T> tiles[2];
    int current = 0;
    int64_t tile_begin = begin / kTile * kTile;
    locate(unit, tile_begin, begin, end, tiles[current]);
    for (; tile_begin < end; tile_begin += kTile, current = 1 - current) {
      const bool more = tile_begin + kTile < end;
      if (more) locate(unit, tile_begin + kTile, begin, end, tiles[1 - current]);
      const int from = static_cast<int>(std::max<int64_t>(0, begin - tile_begin));
      const int to = static_cast<int>(std::min<int64_t>(kTile, end - tile_begin));
      attend_tile(unit, tile_begin, from, to, tiles[current], more ? &tiles[1 - current] : nullptr, scratch);
    }
    const int64_t rows = unit.num_tokens * p_.group();
    for (int64_t r = 0; r < rows; ++r) scratch.split.sum[r] = sum_of(load(scratch.split.sum + r * kLanes));
  }

  void attend_tile(const Unit& unit, int64_t tile_begin, int from, int to, const TileRows<T>& tile,
                   const TileRows<T>* next, Scratch& scratch) const {
    // Tokens before the tile see nothing of it, nor do tokens whose window lies behind it.
    const int64_t first = std::max<int64_t>(0, tile_begin - unit.first_position);
    int64_t last = unit.num_tokens;
    if (p_.window > 0) last = std::min(last, tile_begin + kTile - 1 + p_.window - unit.first_position);
    for (int64_t t = first; t < last; ++t) {
      const int64_t position = unit.first_position + t;
      const int64_t seen_from = p_.window > 0 ? std::max<int64_t>(0, position - p_.window + 1 - tile_begin) : 0;
      const int64_t seen_to = std::min<int64_t>(kTile, position + 1 - tile_begin);
      for (int64_t r = t * p_.group(); r < (t + 1) * p_.group(); ++r) {
        scratch.first_seen[r] = static_cast<int32_t>(seen_from);
        scratch.end_seen[r] = static_cast<int32_t>(seen_to);
      }
    }
    const int64_t row_begin = first * p_.group(), row_end = last * p_.group();
    pack_keys(tile, next, p_.head_dim(), scratch.keys);
    score_tile(scratch.query, scratch.keys, p_.head_dim(), row_begin, row_end, scratch.scores);
    softmax_tile(scratch.scores, scratch.first_seen, scratch.end_seen, row_begin, row_end, scratch.split, p_.padded_dim(),
                 scratch.old_scale);
    // Read values where they lie, unless their rows are not whole vectors or would be converted again and again.
    const bool in_place = p_.head_dim() == p_.padded_dim() && (std::is_same_v<T, float> || row_end - row_begin <= kRowBlock);
    if (in_place) {
      accumulate_tile(scratch.scores, tile.value, from, to, row_begin, row_end, scratch.split, p_.padded_dim());
      return;
    }
    const float* values[kTile];
    pack_values(tile, from, to, p_.head_dim(), p_.padded_dim(), scratch.values);
    for (int j = from; j < to; ++j) values[j] = scratch.values + j * p_.padded_dim();
    accumulate_tile(scratch.scores, values, from, to, row_begin, row_end, scratch.split, p_.padded_dim());
  }

  // Finds the tile's keys and values through the block table. What lies outside of [begin, end) may be another request's: it is
  // never read, zeros stand in.
  void locate(const Unit& unit, int64_t tile_begin, int64_t begin, int64_t end, TileRows<T>& tile) {
    alignas(kCacheLineBytes) static const T zeros[kMaxHeadDim] = {};
    const int32_t* blocks = p_.block_table.at(*p_.rows.at(unit.batch_index));
    const int64_t block_size = p_.block_size(), key_stride = p_.key_cache.strides[2], value_stride = p_.value_cache.strides[2];
    const int64_t first = std::max(begin, tile_begin) - tile_begin, last = std::min(end - tile_begin, int64_t{kTile});
    std::fill_n(tile.key, first, zeros);
    std::fill_n(tile.value, first, zeros);
    int64_t column = (tile_begin + first) / block_size, offset = (tile_begin + first) % block_size;
    for (int64_t j = first; j < last; ++column, offset = 0) {
      const int64_t block = blocks[column], run_end = std::min(last, j + block_size - offset);
      const bool inside = block >= 0 && block < p_.key_cache.sizes[0];
      if (!inside) bad_block_ = true;
      const T* key = inside ? p_.key_cache.at(block, unit.kv_head, offset) : zeros;
      const T* value = inside ? p_.value_cache.at(block, unit.kv_head, offset) : zeros;
      for (; j < run_end; ++j, key += inside ? key_stride : 0, value += inside ? value_stride : 0) {
        tile.key[j] = key;
        tile.value[j] = value;
      }
    }
    std::fill(tile.key + last, tile.key + kTile, zeros);
    std::fill(tile.value + last, tile.value + kTile, zeros);
  }

  const Problem<T>& p_;
  std::vector<Unit> units_;
  std::vector<Task> tasks_;
  std::unique_ptr<std::atomic<int32_t>[]> remaining_;
  int64_t num_partials_ = 0;
  float* partials_ = nullptr;
  std::atomic<int64_t> next_task_{0};
  std::atomic<bool> bad_block_{false};
};

template <typename Q>
void clear_unowned(View<Q> out, View<const int32_t> rows, View<const int32_t> query_start) {
  const int64_t num_rows = rows.sizes[0], num_tokens = out.sizes[0], width = out.sizes[1] * out.sizes[2];
  const int64_t owned = num_rows > 0 ? *query_start.at(num_rows) : 0;
  const auto zero = [&](int64_t begin, int64_t end) { std::fill(out.at(begin), out.at(begin) + (end - begin) * width, Q(0.0f)); };
  zero(std::min(owned, num_tokens), num_tokens);
  for (int64_t i = 0; i < num_rows; ++i) {
    if (*rows.at(i) < 0) zero(*query_start.at(i), *query_start.at(i + 1));
  }
}

}  // namespace

Tensor paged_attention(Tensor query_THD, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor rows_R,
                       Tensor query_start, Tensor seq_lens_R, double scale, int64_t sliding_window) {
  const Tensor query = dense_last(query_THD);
  STD_TORCH_CHECK(query.dim() == 3 && key_cache.dim() == 4, "query must be [T, H, D] and the cache [blocks, H, block_size, D]");
  const int64_t head_dim = query.size(2), num_kv_heads = key_cache.size(1), num_rows = rows_R.size(0);
  STD_TORCH_CHECK(head_dim <= kMaxHeadDim && key_cache.size(3) == head_dim && value_cache.size(3) == head_dim,
                  "query, keys and values must have one head dim of at most ", kMaxHeadDim);
  STD_TORCH_CHECK(num_kv_heads > 0 && query.size(1) % num_kv_heads == 0, "query heads must be a multiple of KV heads");
  STD_TORCH_CHECK(value_cache.size(0) == key_cache.size(0) && value_cache.size(1) == num_kv_heads &&
                      value_cache.size(2) == key_cache.size(2) && value_cache.scalar_type() == key_cache.scalar_type(),
                  "key and value cache must agree in shape and dtype");
  STD_TORCH_CHECK(query_start.size(0) == num_rows + 1 && seq_lens_R.size(0) == num_rows, "rows, query_start and seq_lens disagree");
  Tensor out = empty({query.size(0), query.size(1), head_dim}, query.scalar_type());
  const auto out_rows = table<int32_t>(rows_R, 1, ScalarType::Int, "rows");
  const auto starts = table<int32_t>(query_start, 1, ScalarType::Int, "query_start");
  with_float_type(key_cache.scalar_type(), "key_cache", [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> problem{view<void>(query, 3, "query"),
                             view<void>(out, 3, "out"),
                             query.scalar_type(),
                             view<T>(key_cache, 4, "key_cache"),
                             view<T>(value_cache, 4, "value_cache"),
                             table<int32_t>(block_table, 2, ScalarType::Int, "block_table"),
                             out_rows,
                             starts,
                             table<int32_t>(seq_lens_R, 1, ScalarType::Int, "seq_lens"),
                             static_cast<float>(scale),
                             sliding_window};
    Attention<T>(problem).run();
  });
  with_float_type(query.scalar_type(), "query",
                  [&](auto zero) { clear_unowned(view<decltype(zero)>(out, 3, "out"), out_rows, starts); });
  return out;
}

}  // namespace toka
