// toka_cpp::paged_attention: plans the step's attention as units of work, shares them out over torch's threads.
//
// A unit is one KV head of one row for a tile of its queries; all query heads of that KV head go together, so keys and values are
// read once. Units that cost more than their share of a thread's time and have few queries (decode over a long context) are cut at
// the splits of attention_tile.h, and whoever finishes the last split merges them.
//
// Where rows share a prefix, a unit is one KV head of many rows: keys are packed and values read once for all of them. The state of
// their softmax, which may stop in the middle of a split, is handed over to the next level's unit and at last to the row's own. How
// the work is cut never changes the result, to the bit: every row meets the same tiles in the same order.
#include "kernels.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "attention_tile.h"
#include "shared_groups.h"
#include "tensors.h"
#include "workspace.h"

namespace toka {
namespace {

constexpr int64_t kPackingCost = 16;       // turning a tile of keys costs about as much as this many query rows
constexpr int64_t kMaxSplitRows = 32;      // units with more query rows than this are not split
constexpr int64_t kTasksPerThread = 4;     // a unit is heavy if it costs more than this share of a thread's work
constexpr int64_t kParallelCost = 1 << 18;  // query rows x keys x head dim below which waking threads costs more than it saves

struct Unit {
  int32_t batch_index;  // which of the step's rows; of several, one that holds the same blocks
  int32_t kv_head;
  int32_t first_token;  // in the step's tokens
  int32_t num_tokens;
  const int32_t* members = nullptr;  // of a shared unit: the places of its rows in the batch, one token each
  int64_t first_position;
  int64_t kv_begin, kv_end;   // positions that its queries see and that no unit before it saw
  int64_t partial = -1;       // where its splits' states lie, in units of one split; -1 = done by one thread
  int32_t remaining_at = -1;  // index of the counter of its unfinished splits

  int64_t first_split() const { return kv_begin / kSplit; }
  int64_t end_split() const { return (kv_end + kSplit - 1) / kSplit; }
  bool is_shared() const { return members != nullptr; }
  bool begins_inside_split() const { return kv_begin % kSplit != 0; }
  bool stops_inside_split() const { return is_shared() && kv_end % kSplit != 0; }
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
  SharedGroups shared;

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

template <typename T>
class Attention {
 public:
  explicit Attention(const Problem<T>& problem) : p_(problem) {}

  void run() {
    const int64_t threads = torch::stable::get_num_threads();
    Phase phases[kMaxSharedLevels + 1];
    for (int level = 0; level < kMaxSharedLevels; ++level) plan_shared_units(p_.shared.at_level(level), threads, phases[level]);
    Phase& own = phases[kMaxSharedLevels];
    plan_own_units(own);
    if (own.units.empty()) return;
    for (Phase& phase : phases) {
      phase.num_threads = phase.cost * p_.head_dim() >= kParallelCost ? threads : 1;
      plan_tasks(phase);
    }
    make_room(phases);
    for (Phase& phase : phases) execute(phase);
    STD_TORCH_CHECK(!bad_block_, "paged_attention: the block table names a block outside of the cache");
  }

 private:
  // What may run at once: the units of one level of shared prefixes, or all rows' own units.
  struct Phase {
    std::vector<Unit> units;
    std::vector<Task> tasks;
    std::vector<int32_t> num_splits;  // of the units that were split
    int64_t cost = 0;
    int64_t num_threads = 1;
    int64_t num_partials = 0;

    int64_t num_workers() const { return std::min<int64_t>(num_threads, static_cast<int64_t>(tasks.size())); }
  };

  // ---------------------------------------------------------------------------------------------------------- planning

  int64_t unit_cost(const Unit& unit) const {
    return (unit.num_tokens * p_.group() + kPackingCost) * (unit.kv_end - unit.kv_begin);
  }

  // Cuts each group into units of about equal size, as large as the working memory or, with many threads, their share allows.
  void plan_shared_units(const std::vector<SharedGroup>& groups, int64_t num_threads, Phase& phase) {
    int64_t num_members = 0;
    for (const SharedGroup& group : groups) num_members += group.num_members;
    const int64_t share = num_members * p_.num_kv_heads() / (num_threads * kTasksPerThread);
    const int64_t most = std::clamp(share, std::min(p_.tokens_per_unit(), kPackingCost), p_.tokens_per_unit());
    for (const SharedGroup& group : groups) {
      const int64_t num_units = (group.num_members + most - 1) / most, size = (group.num_members + num_units - 1) / num_units;
      for (int64_t first = 0; first < group.num_members; first += size) {
        Unit unit;
        unit.members = group.members + first;
        unit.batch_index = *group.members;
        unit.num_tokens = static_cast<int32_t>(std::min(size, group.num_members - first));
        unit.first_position = group.end;  // all of them see the whole of it
        unit.kv_begin = group.begin;
        unit.kv_end = group.end;
        add_for_each_head(unit, phase);
        for (int64_t t = 0; t < unit.num_tokens; ++t) num_handovers_ = std::max<int64_t>(num_handovers_, unit.members[t] + 1);
      }
    }
  }

  void add_for_each_head(Unit unit, Phase& phase) const {
    for (int64_t head = 0; head < p_.num_kv_heads(); ++head) {
      unit.kv_head = static_cast<int32_t>(head);
      phase.units.push_back(unit);
      phase.cost += unit_cost(unit);
    }
  }

  void plan_own_units(Phase& phase) const {
    const int64_t num_rows = p_.rows.sizes[0], num_tokens = p_.query.sizes[0];
    const int64_t capacity = p_.block_table.sizes[1] * p_.block_size();
    for (int64_t i = 0; i < num_rows; ++i) {
      const int64_t row = *p_.rows.at(i), begin = *p_.query_start.at(i), end = *p_.query_start.at(i + 1);
      STD_TORCH_CHECK(0 <= begin && begin <= end && end <= num_tokens, "query_start must ascend from 0 to the number of tokens");
      if (row < 0 || begin == end) continue;
      const int64_t seq_len = *p_.seq_lens.at(i);
      STD_TORCH_CHECK(row < p_.block_table.sizes[0], "row ", row, " is outside of the block table");
      STD_TORCH_CHECK(end - begin <= seq_len && seq_len <= capacity, "seq_lens[", i, "] = ", seq_len,
                      " must hold the row's queries and fit its block table");
      plan_row(i, begin, end, seq_len, phase);
    }
  }

  void plan_row(int64_t batch_index, int64_t begin, int64_t end, int64_t seq_len, Phase& phase) const {
    for (int64_t first = begin; first < end; first += p_.tokens_per_unit()) {
      Unit unit;
      unit.batch_index = static_cast<int32_t>(batch_index);
      unit.first_token = static_cast<int32_t>(first);
      unit.num_tokens = static_cast<int32_t>(std::min(p_.tokens_per_unit(), end - first));
      unit.first_position = seq_len - (end - first);
      unit.kv_begin = p_.window > 0 ? std::max<int64_t>(0, unit.first_position - p_.window + 1) : p_.shared.own_begin(batch_index);
      unit.kv_end = unit.first_position + unit.num_tokens;
      add_for_each_head(unit, phase);
    }
  }

  // Heavy units first, in descending order of cost, split where they can be; then the others as they come.
  void plan_tasks(Phase& phase) const {
    const int64_t share = phase.cost / (phase.num_threads * kTasksPerThread);
    std::vector<Unit>& units = phase.units;
    std::vector<int32_t> heavy;
    phase.tasks.reserve(units.size());
    if (phase.num_threads > 1) {
      for (size_t u = 0; u < units.size(); ++u) {
        if (unit_cost(units[u]) > share) heavy.push_back(static_cast<int32_t>(u));
      }
      std::stable_sort(heavy.begin(), heavy.end(),
                       [&](int32_t a, int32_t b) { return unit_cost(units[a]) > unit_cost(units[b]); });
    }
    for (const int32_t u : heavy) {
      Unit& unit = units[u];
      const int32_t num_splits = static_cast<int32_t>(unit.end_split() - unit.first_split());
      if (num_splits == 1 || unit.is_shared() || unit.num_tokens * p_.group() > kMaxSplitRows) {
        phase.tasks.push_back({u, -1});
        continue;
      }
      unit.partial = phase.num_partials;
      unit.remaining_at = static_cast<int32_t>(phase.num_splits.size());
      phase.num_splits.push_back(num_splits);
      phase.num_partials += num_splits;
      for (int32_t split = 0; split < num_splits; ++split) phase.tasks.push_back({u, split});
    }
    for (size_t u = 0; u < units.size(); ++u) {
      if (phase.num_threads == 1 || unit_cost(units[u]) <= share) phase.tasks.push_back({static_cast<int32_t>(u), -1});
    }
  }

  // One allocation for all phases: the workers' working memory, the splits' states, the states that are handed over.
  void make_room(const Phase (&phases)[kMaxSharedLevels + 1]) {
    int64_t num_workers = 0, num_partials = 0;
    for (const Phase& phase : phases) {
      num_workers = std::max(num_workers, phase.num_workers());
      num_partials = std::max(num_partials, phase.num_partials);
    }
    const int64_t for_workers = scratch_floats() * num_workers, for_partials = partial_floats() * num_partials;
    scratch_ = workspace(for_workers + for_partials + num_handovers_ * p_.num_heads() * handover_floats());
    partials_ = scratch_ + for_workers;
    handovers_ = partials_ + for_partials;
  }

  // --------------------------------------------------------------------------------------------------------- execution

  void execute(Phase& phase) {
    if (phase.tasks.empty()) return;
    next_task_ = 0;
    remaining_ = std::make_unique<std::atomic<int32_t>[]>(phase.num_splits.size());
    std::copy(phase.num_splits.begin(), phase.num_splits.end(), remaining_.get());
    const auto work = [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) {
        Scratch scratch(scratch_ + worker * scratch_floats(), p_.max_rows_per_unit(), p_.head_dim(), p_.padded_dim());
        drain_tasks(phase, scratch);
      }
    };
    if (phase.num_workers() == 1) {
      work(0, 1);
    } else {
      torch::stable::parallel_for(0, phase.num_workers(), 1, work);
    }
  }

  void drain_tasks(const Phase& phase, Scratch& scratch) {
    const int64_t num_tasks = static_cast<int64_t>(phase.tasks.size());
    for (int64_t i = next_task_++; i < num_tasks; i = next_task_++) {
      const Unit& unit = phase.units[phase.tasks[i].unit];
      if (phase.tasks[i].split < 0) {
        run_unit(unit, scratch);
      } else {
        run_split(unit, phase.tasks[i].split, scratch);
      }
    }
  }

  void run_unit(const Unit& unit, Scratch& scratch) {
    load_query(unit, scratch);
    begin_total(unit, scratch.total);
    for (int64_t split = unit.first_split(); split < unit.end_split(); ++split) {
      attend_split(unit, split, scratch);
      if (split + 1 == unit.end_split() && unit.stops_inside_split()) break;
      end_split(unit, scratch);
      merge_split(scratch.split, scratch.total, num_rows(unit), p_.padded_dim());
    }
    if (unit.is_shared()) {
      hand_over(unit, scratch);
    } else {
      store_out(unit, scratch.total);
    }
  }

  void run_split(const Unit& unit, int64_t split, Scratch& scratch) {
    const int64_t rows = num_rows(unit);
    load_query(unit, scratch);
    attend_split(unit, unit.first_split() + split, scratch);
    end_split(unit, scratch);
    const SoftmaxState mine = partial(unit.partial + split);
    std::copy_n(scratch.split.max, rows, mine.max);
    std::copy_n(scratch.split.sum, rows, mine.sum);
    std::copy_n(scratch.split.values, rows * p_.padded_dim(), mine.values);
    if (remaining_[unit.remaining_at].fetch_sub(1, std::memory_order_acq_rel) > 1) return;

    begin_total(unit, scratch.total);
    const int64_t num_splits = unit.end_split() - unit.first_split();
    for (int64_t s = 0; s < num_splits; ++s) merge_split(partial(unit.partial + s), scratch.total, rows, p_.padded_dim());
    store_out(unit, scratch.total);
  }

  int64_t num_rows(const Unit& unit) const { return unit.num_tokens * p_.group(); }

  // Of the unit's row r: its place in the batch (shared units and those that take over), its token, its query head.
  int64_t place_of(const Unit& unit, int64_t r) const { return unit.is_shared() ? unit.members[r / p_.group()] : unit.batch_index; }
  int64_t token_of(const Unit& unit, int64_t r) const {
    return unit.is_shared() ? *p_.query_start.at(place_of(unit, r)) : unit.first_token + r / p_.group();
  }
  int64_t head_of(const Unit& unit, int64_t r) const { return unit.kv_head * p_.group() + r % p_.group(); }

  int64_t scratch_floats() const {
    return round_up(Scratch::num_floats(p_.max_rows_per_unit(), p_.head_dim(), p_.padded_dim()), 16);
  }

  int64_t partial_floats() const { return round_up(kMaxSplitRows * (2 + p_.padded_dim()), 16); }

  SoftmaxState partial(int64_t index) const {
    float* memory = partials_ + index * partial_floats();
    return {memory, memory + kMaxSplitRows, memory + 2 * kMaxSplitRows};
  }

  // ---------------------------------------------------------------------------------------------------------- handover

  // What one query head of one row hands over: its total, and the split that it stopped in.
  struct Handover {
    float *max, *sum, *split_max, *split_sum, *values, *split_values;
  };

  int64_t handover_floats() const { return 16 + kLanes + 2 * p_.padded_dim(); }

  Handover handover(const Unit& unit, int64_t r) const {
    float* memory = handovers_ + (place_of(unit, r) * p_.num_heads() + head_of(unit, r)) * handover_floats();
    float* lanes = memory + 16;
    return {memory, memory + 1, memory + 2, lanes, lanes + kLanes, lanes + kLanes + p_.padded_dim()};
  }

  void hand_over(const Unit& unit, const Scratch& scratch) const {
    for (int64_t r = 0; r < num_rows(unit); ++r) {
      const Handover to = handover(unit, r);
      *to.max = scratch.total.max[r];
      *to.sum = scratch.total.sum[r];
      std::copy_n(scratch.total.values + r * p_.padded_dim(), p_.padded_dim(), to.values);
      if (!unit.stops_inside_split()) continue;
      *to.split_max = scratch.split.max[r];
      std::copy_n(scratch.split.sum + r * kLanes, kLanes, to.split_sum);
      std::copy_n(scratch.split.values + r * p_.padded_dim(), p_.padded_dim(), to.split_values);
    }
  }

  // A unit that does not begin at its rows' first visible position goes on where the one before it stopped.
  bool takes_over(const Unit& unit) const { return p_.window == 0 && unit.kv_begin > 0; }

  void begin_total(const Unit& unit, SoftmaxState total) const {
    if (!takes_over(unit)) return clear(total, unit, 1);
    for (int64_t r = 0; r < num_rows(unit); ++r) {
      const Handover from = handover(unit, r);
      total.max[r] = *from.max;
      total.sum[r] = *from.sum;
      std::copy_n(from.values, p_.padded_dim(), total.values + r * p_.padded_dim());
    }
  }

  void begin_split(const Unit& unit, int64_t split, SoftmaxState state) const {
    if (!takes_over(unit) || !unit.begins_inside_split() || split != unit.first_split()) return clear(state, unit, kLanes);
    for (int64_t r = 0; r < num_rows(unit); ++r) {
      const Handover from = handover(unit, r);
      state.max[r] = *from.split_max;
      std::copy_n(from.split_sum, kLanes, state.sum + r * kLanes);
      std::copy_n(from.split_values, p_.padded_dim(), state.values + r * p_.padded_dim());
    }
  }

  void end_split(const Unit& unit, Scratch& scratch) const {
    for (int64_t r = 0; r < num_rows(unit); ++r) scratch.split.sum[r] = sum_of(load(scratch.split.sum + r * kLanes));
  }

  void clear(SoftmaxState state, const Unit& unit, int64_t sums_per_row) const {
    const int64_t rows = num_rows(unit);
    std::fill_n(state.max, rows, -kInfinity);
    std::fill_n(state.sum, rows * sums_per_row, 0.0f);
    std::fill_n(state.values, rows * p_.padded_dim(), 0.0f);
  }

  // Query rows in the order token, head: the rows that a tile concerns are then a range.
  void load_query(const Unit& unit, Scratch& scratch) const {
    with_float_type(p_.query_dtype, "query", [&](auto zero) {
      const auto query = p_.query.template as<decltype(zero)>();
      float* to = scratch.query;
      for (int64_t r = 0; r < num_rows(unit); ++r) {
        const auto* from = query.at(token_of(unit, r), head_of(unit, r));
        for (int64_t d = 0; d < p_.head_dim(); ++d) *to++ = static_cast<float>(from[d]) * p_.scale;
      }
    });
  }

  void store_out(const Unit& unit, SoftmaxState state) const {
    with_float_type(p_.query_dtype, "query", [&](auto zero) {
      using Q = decltype(zero);
      const auto out = p_.out.template as<Q>();
      for (int64_t r = 0; r < num_rows(unit); ++r) {
        const float scale = 1.0f / state.sum[r];
        const float* from = state.values + r * p_.padded_dim();
        Q* to = out.at(token_of(unit, r), head_of(unit, r));
        for (int64_t d = 0; d < p_.head_dim(); ++d) to[d] = static_cast<Q>(from[d] * scale);
      }
    });
  }

  void attend_split(const Unit& unit, int64_t split, Scratch& scratch) {
    begin_split(unit, split, scratch.split);
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
  int64_t num_handovers_ = 0;  // places in the batch up to the last member of any group
  float *scratch_ = nullptr, *partials_ = nullptr, *handovers_ = nullptr;
  std::unique_ptr<std::atomic<int32_t>[]> remaining_;  // splits of each split unit of the phase
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
                       Tensor query_start, Tensor seq_lens_R, double scale, int64_t sliding_window,
                       std::optional<Tensor> shared_groups, std::optional<Tensor> shared_members, std::optional<Tensor>) {
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
  const auto lens = table<int32_t>(seq_lens_R, 1, ScalarType::Int, "seq_lens");
  STD_TORCH_CHECK(shared_groups.has_value() == shared_members.has_value(), "shared_groups and shared_members come together");
  SharedGroups shared;
  if (shared_groups.has_value() && sliding_window == 0) shared = SharedGroups(*shared_groups, *shared_members, starts, lens);
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
                             lens,
                             static_cast<float>(scale),
                             sliding_window,
                             shared};
    Attention<T>(problem).run();
  });
  with_float_type(query.scalar_type(), "query",
                  [&](auto zero) { clear_unowned(view<decltype(zero)>(out, 3, "out"), out_rows, starts); });
  return out;
}

}  // namespace toka
