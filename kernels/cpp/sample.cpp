// toka_cpp::sample: one token a row, rows in parallel, without a full sort. The order of the filters, the treatment of NaN and
// infinities and the random number are those of reference/sample.py and reference/counter_hash.py.
#include <algorithm>
#include <atomic>
#include <vector>

#include "kernels.h"
#include "logits.h"
#include "tensors.h"

namespace toka {
namespace {

constexpr float kSmallest = std::numeric_limits<float>::min();
constexpr int64_t kBlock = 64;                // logits looked at together; a multiple of kLanes
constexpr int64_t kParallelLogits = 1 << 16;  // fewer logits than this are handled by the calling thread
typedef double vdouble __attribute__((vector_size(kLanes * 8)));

struct Settings {
  float temperature, top_p, min_p;
  int32_t top_k;
  int64_t seed;
  const int32_t* held_back;  // ids that can't be drawn now
  int64_t num_held_back;
  const int32_t* mask;  // one bit a token: whether it may be drawn; nullptr = all may

  bool in_mask(int64_t id) const { return mask == nullptr || (static_cast<uint32_t>(mask[id / 32]) >> (id % 32) & 1) != 0; }

  bool is_held_back(int64_t id) const { return std::find(held_back, held_back + num_held_back, id) != held_back + num_held_back; }
};

struct Candidate {
  float logit, weight;
  int32_t id;
};

// The order in which top_k and top_p take tokens.
bool before(const Candidate& a, const Candidate& b) { return a.logit != b.logit ? a.logit > b.logit : a.id < b.id; }

uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

double uniform(int64_t seed, int64_t position) {
  const uint64_t bits = mix(mix(static_cast<uint64_t>(seed)) + static_cast<uint64_t>(position + 1) * 0x9E3779B97F4A7C15ull);
  return static_cast<double>(bits >> 11) * 0x1.0p-53;
}

// The lowest id among the largest logits; -1 if all are -inf.
template <typename T>
int32_t argmax(const T* logits, int64_t count) {
  vfloat best = broadcast(-kInfinity);
  vint best_at = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const vfloat x = load_logits(logits, i, count);
    best_at = x > best ? vint{} + static_cast<int32_t>(i) : best_at;
    best = max(x, best);
  }
  const float largest = max_of(best);
  if (largest == -kInfinity) return -1;
  best_at += lane_numbers();
  int32_t lowest = std::numeric_limits<int32_t>::max();
  for (int lane = 0; lane < kLanes; ++lane) {
    if (best[lane] == largest) lowest = std::min<int32_t>(lowest, best_at[lane]);
  }
  return lowest;
}

double sum_block(const float* weights) {
  vdouble sum = {};
  for (int64_t i = 0; i < kBlock; i += kLanes) sum += __builtin_convertvector(load(weights + i), vdouble);
  double total = 0.0;
  for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
  return total;
}

// Inverse CDF: the first place whose cumulated weight exceeds u times the total; weights are padded to whole blocks by zeros.
int64_t draw(const float* weights, int64_t count, double u, std::vector<double>& block_sums) {
  block_sums.clear();
  double total = 0.0;
  for (int64_t i = 0; i < count; i += kBlock) {
    block_sums.push_back(sum_block(weights + i));
    total += block_sums.back();
  }
  const double target = u * total;
  double passed = 0.0;
  int64_t last_possible = 0;  // where rounding leaves no place above the target
  for (size_t block = 0; block < block_sums.size(); ++block) {
    const bool is_last = block + 1 == block_sums.size();
    if (passed + block_sums[block] <= target && !is_last) {
      passed += block_sums[block];
      continue;
    }
    double mass = passed;
    const int64_t begin = static_cast<int64_t>(block) * kBlock, end = std::min<int64_t>(begin + kBlock, count);
    for (int64_t i = begin; i < end; ++i) {
      mass += weights[i];
      if (mass > target) return i;
    }
    passed += block_sums[block];
  }
  for (int64_t i = 0; i < count; ++i) {
    if (weights[i] > 0.0f) last_possible = i;
  }
  return last_possible;
}

// Draws for one row after another, in memory that grows to the vocabulary and stays.
class Sampler {
 public:
  template <typename T>
  int32_t sample(const T* logits, int64_t vocab_size, const Settings& settings, int64_t position) {
    const bool greedy = settings.temperature == 0.0f;
    if (greedy && settings.num_held_back == 0 && settings.mask == nullptr) return std::max(0, argmax(logits, vocab_size));
    const float largest = copy_drawable(logits, vocab_size, settings);
    if (largest == -kInfinity) return lowest_allowed(vocab_size, settings);
    if (greedy) return argmax(logits_.data(), vocab_size);
    weigh(largest, settings.temperature);
    const double u = uniform(settings.seed, position);
    const bool use_top_k = settings.top_k > 0 && settings.top_k < vocab_size, use_top_p = settings.top_p < 1.0f;
    if (!use_top_k && !use_top_p) {
      drop_below(weights_.data(), vocab_size, settings.min_p);
      return static_cast<int32_t>(draw(weights_.data(), vocab_size, u, block_sums_));
    }
    keep_likeliest(largest, settings, use_top_k, use_top_p);
    const int64_t num_kept = static_cast<int64_t>(kept_.size());
    drop_below(weights_.data(), num_kept, settings.min_p);
    return kept_[draw(weights_.data(), num_kept, u, block_sums_)].id;
  }

 private:
  // Fills logits_ (padded to whole blocks with -inf) and returns the largest.
  template <typename T>
  float copy_drawable(const T* logits, int64_t vocab_size, const Settings& settings) {
    const int64_t padded = (vocab_size + kBlock - 1) / kBlock * kBlock;
    logits_.resize(padded);
    weights_.resize(padded);
    for (int64_t i = 0; i < padded; i += kLanes) store(logits_.data() + i, load_logits(logits, i, vocab_size));
    for (int64_t i = 0; i < settings.num_held_back; ++i) {
      const int32_t id = settings.held_back[i];
      if (id >= 0 && id < vocab_size) logits_[id] = -kInfinity;
    }
    if (settings.mask != nullptr) drop_masked(vocab_size, settings.mask);
    vfloat largest = broadcast(-kInfinity);
    for (int64_t i = 0; i < padded; i += kLanes) largest = max(load(logits_.data() + i), largest);
    return max_of(largest);
  }

  // Most words of a mask allow all of their tokens or none.
  void drop_masked(int64_t vocab_size, const int32_t* mask) {
    for (int64_t first = 0; first < vocab_size; first += 32) {
      const uint32_t word = static_cast<uint32_t>(mask[first / 32]);
      if (word == ~0u) continue;
      const int64_t end = std::min<int64_t>(first + 32, vocab_size);
      if (word == 0) {
        std::fill(logits_.begin() + first, logits_.begin() + end, -kInfinity);
        continue;
      }
      for (int64_t id = first; id < end; ++id) {
        if ((word >> (id - first) & 1) == 0) logits_[id] = -kInfinity;
      }
    }
  }

  // For a row in which nothing can be drawn.
  static int32_t lowest_allowed(int64_t vocab_size, const Settings& settings) {
    for (int32_t id = 0; id < vocab_size; ++id) {
      if (settings.in_mask(id) && !settings.is_held_back(id)) return id;
    }
    for (int32_t id = 0; id < vocab_size; ++id) {
      if (settings.in_mask(id)) return id;
    }
    return 0;
  }

  // Probabilities up to a factor: the likeliest token weighs 1.
  void weigh(float largest, float temperature) {
    const float inverse = 1.0f / std::max(temperature, kSmallest);
    for (int64_t i = 0; i < static_cast<int64_t>(logits_.size()); i += kLanes) {
      store(weights_.data() + i, exp((load(logits_.data() + i) - largest) * inverse));
    }
  }

  static void drop_below(float* weights, int64_t count, float min_p) {
    for (int64_t i = 0; i < (count + kBlock - 1) / kBlock * kBlock; i += kLanes) {
      const vfloat weight = load(weights + i);
      store(weights + i, weight < broadcast(min_p) ? vfloat{} : weight);
    }
  }

  // Applies top_k and top_p: kept_ gets the tokens in ascending order of id, weights_ their weights, padded by zeros.
  void keep_likeliest(float largest, const Settings& settings, bool use_top_k, bool use_top_p) {
    const double all_mass = use_top_k ? 0.0 : mass_from(-kLargest).weight;
    const double wanted_mass = static_cast<double>(settings.top_p) * all_mass;
    gather(candidate_cut(largest, settings.temperature, wanted_mass, use_top_k ? settings.top_k : 1));

    ranked_ = kept_;
    int64_t num_kept = static_cast<int64_t>(ranked_.size());
    if (use_top_k && settings.top_k < num_kept) {
      num_kept = settings.top_k;
      std::nth_element(ranked_.begin(), ranked_.begin() + num_kept - 1, ranked_.end(), before);
    }
    if (use_top_p) num_kept = rank_to_mass(num_kept, static_cast<double>(settings.top_p), use_top_k ? -1.0 : all_mass);
    if (num_kept < static_cast<int64_t>(ranked_.size())) {  // else nothing is ranked
      const Candidate last = ranked_[num_kept - 1];
      kept_.erase(std::remove_if(kept_.begin(), kept_.end(), [&](const Candidate& c) { return before(last, c); }), kept_.end());
    }

    std::fill_n(weights_.data(), (kept_.size() + kBlock - 1) / kBlock * kBlock, 0.0f);
    for (size_t i = 0; i < kept_.size(); ++i) weights_[i] = kept_[i].weight;
  }

  // A logit such that the tokens from it upwards hold the wanted mass and count, usually a few of the vocabulary.
  float candidate_cut(float largest, float temperature, double wanted_mass, int64_t wanted_count) const {
    for (const float nats : {3.0f, 6.0f, 10.0f, 16.0f, 24.0f}) {
      const float cut = largest - nats * temperature;
      const Mass mass = mass_from(cut);
      if (mass.weight >= wanted_mass && mass.count >= wanted_count) return cut;
    }
    return -kLargest;
  }

  // What the tokens from logit `cut` upwards weigh and how many they are; -inf never counts.
  struct Mass {
    double weight;
    int64_t count;
  };

  Mass mass_from(float cut) const {
    vdouble sum = {};
    vint reached = {};
    for (int64_t i = 0; i < static_cast<int64_t>(logits_.size()); i += kLanes) {
      const vint above = load(logits_.data() + i) >= broadcast(cut);
      sum += __builtin_convertvector(above ? load(weights_.data() + i) : vfloat{}, vdouble);
      reached -= above;
    }
    Mass mass{0.0, 0};
    for (int lane = 0; lane < kLanes; ++lane) mass.weight += sum[lane], mass.count += reached[lane];
    return mass;
  }

  void gather(float cut) {
    kept_.clear();
    for (int64_t block = 0; block < static_cast<int64_t>(logits_.size()); block += kBlock) {
      vfloat largest = load(logits_.data() + block);
      for (int64_t i = kLanes; i < kBlock; i += kLanes) largest = max(load(logits_.data() + block + i), largest);
      if (max_of(largest) < cut) continue;
      for (int64_t i = block; i < block + kBlock; ++i) {
        if (logits_[i] >= cut) kept_.push_back({logits_[i], weights_[i], static_cast<int32_t>(i)});
      }
    }
  }

  // Reorders ranked_[0:count] so that its first n tokens are the smallest likeliest set that holds top_p of the mass; returns n.
  // total: the mass that top_p is a share of; negative = that of ranked_[0:count].
  int64_t rank_to_mass(int64_t count, double top_p, double total) {
    const auto sum = [&](int64_t begin, int64_t end) {
      double mass = 0.0;
      for (int64_t i = begin; i < end; ++i) mass += ranked_[i].weight;
      return mass;
    };
    const double target = top_p * (total < 0.0 ? sum(0, count) : total);
    int64_t low = 0, high = count;  // low tokens are too few, high are enough
    double low_mass = 0.0;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      std::nth_element(ranked_.begin() + low, ranked_.begin() + middle, ranked_.begin() + high, before);
      const double mass = low_mass + sum(low, middle);
      if (mass >= target) {
        high = middle;
      } else {
        low = middle;
        low_mass = mass;
      }
    }
    return high;
  }

  std::vector<float> logits_, weights_;
  std::vector<Candidate> kept_, ranked_;
  std::vector<double> block_sums_;
};

}  // namespace

Tensor sample(Tensor logits_RV, Tensor rows_R, Tensor seq_lens_R, Tensor temperature, Tensor top_k, Tensor top_p,
              Tensor min_p, Tensor seed, Tensor held_back_ids, Tensor held_back_until, Tensor last_token,
              std::optional<Tensor> masks_KW, std::optional<Tensor> mask_of_R) {
  const Tensor logits_dense = dense_last(logits_RV);
  const auto rows = table<int32_t>(rows_R, 1, ScalarType::Int, "rows");
  const auto seq_lens = table<int32_t>(seq_lens_R, 1, ScalarType::Int, "seq_lens");
  const auto temperatures = table<float>(temperature, 1, ScalarType::Float, "temperature");
  const auto top_ks = table<int32_t>(top_k, 1, ScalarType::Int, "top_k");
  const auto top_ps = table<float>(top_p, 1, ScalarType::Float, "top_p");
  const auto min_ps = table<float>(min_p, 1, ScalarType::Float, "min_p");
  const auto seeds = table<int64_t>(seed, 1, ScalarType::Long, "seed");
  const auto held_back = table<int32_t>(held_back_ids, 2, ScalarType::Int, "held_back_ids");
  const auto until = table<int32_t>(held_back_until, 1, ScalarType::Int, "held_back_until");
  STD_TORCH_CHECK(last_token.scalar_type() == ScalarType::Int, "last_token must be int32");
  const auto last = view<int32_t>(last_token, 1, "last_token");
  const int64_t num_rows = rows.sizes[0], max_rows = last.sizes[0];
  STD_TORCH_CHECK(logits_dense.dim() == 2 && logits_dense.size(0) == num_rows && seq_lens.sizes[0] == num_rows,
                  "logits, rows and seq_lens must agree in their first dimension");
  STD_TORCH_CHECK(logits_dense.size(1) > 0, "the vocabulary must not be empty");
  for (const Tensor& settings : {temperature, top_k, top_p, min_p, seed, held_back_ids, held_back_until}) {
    STD_TORCH_CHECK(settings.size(0) == max_rows, "the tables of sampling settings must have one length");
  }
  for (int64_t i = 0; i < num_rows; ++i) STD_TORCH_CHECK(*rows.at(i) < max_rows, "row ", *rows.at(i), " is outside of the tables");
  STD_TORCH_CHECK(masks_KW.has_value() == mask_of_R.has_value(), "masks and the rows' places among them come together");
  View<const int32_t> masks{}, mask_of{};
  if (masks_KW.has_value()) {
    masks = table<int32_t>(*masks_KW, 2, ScalarType::Int, "masks");
    mask_of = table<int32_t>(*mask_of_R, 1, ScalarType::Int, "mask_of");
    STD_TORCH_CHECK(mask_of.sizes[0] == num_rows && masks.sizes[1] == (logits_dense.size(1) + 31) / 32,
                    "there must be a place for each row, and a bit for each token of the vocabulary");
    for (int64_t i = 0; i < num_rows; ++i) STD_TORCH_CHECK(*mask_of.at(i) < masks.sizes[0], "mask ", *mask_of.at(i), " does not exist");
  }

  Tensor sampled_R = empty({num_rows}, ScalarType::Int);
  const auto sampled = view<int32_t>(sampled_R, 1, "sampled");
  with_float_type(logits_dense.scalar_type(), "logits", [&](auto zero) {
    using T = decltype(zero);
    const auto logits = view<T>(logits_dense, 2, "logits");
    const int64_t vocab_size = logits.sizes[1];
    std::atomic<int64_t> next{0};
    const auto work = [&](int64_t, int64_t) {
      thread_local Sampler sampler;
      for (int64_t i = next++; i < num_rows; i = next++) {
        const int64_t row = *rows.at(i), position = *seq_lens.at(i);
        *sampled.at(i) = 0;
        if (row < 0) continue;
        const bool holding = position < *until.at(row);
        const int64_t mask = masks_KW.has_value() ? *mask_of.at(i) : -1;
        const Settings settings{*temperatures.at(row), *top_ps.at(row),   *min_ps.at(row),   *top_ks.at(row),
                                *seeds.at(row),        held_back.at(row), holding ? held_back.sizes[1] : 0,
                                mask < 0 ? nullptr : masks.at(mask)};
        const int32_t token = sampler.sample(logits.at(i), vocab_size, settings, position);
        *sampled.at(i) = *last.at(row) = token;
      }
    };
    const int64_t num_workers =
        num_rows * vocab_size < kParallelLogits ? 1 : std::min<int64_t>(num_rows, torch::stable::get_num_threads());
    if (num_workers == 1) {
      work(0, 1);
    } else {
      torch::stable::parallel_for(0, num_workers, 1, work);
    }
  });
  return sampled_R;
}

}  // namespace toka
