// toka_cpp::token_logprobs: one pass over each row of logits, rows in parallel. Meaning as in op_schema.py and reference/token_logprobs.py.
#include <atomic>
#include <cmath>
#include <tuple>

#include "kernels.h"
#include "logits.h"
#include "tensors.h"

namespace toka {
namespace {

constexpr int64_t kBlock = 64;                // logits looked at together; a multiple of kLanes
constexpr int64_t kMaxTop = 64;               // likeliest tokens that can be asked for
constexpr int64_t kParallelLogits = 1 << 16;  // fewer logits than this are handled by the calling thread

// The likeliest tokens so far, in order. Ids come in ascending order, so a token goes behind those that equal it.
class Top {
 public:
  explicit Top(int64_t capacity) : capacity_(capacity) {}

  // Whether a logit of this size would be taken.
  bool takes(float logit) const { return count_ < capacity_ || (count_ > 0 && logit > logits_[count_ - 1]); }

  void add(float logit, int32_t id) {
    int64_t place = count_ < capacity_ ? count_++ : capacity_ - 1;
    for (; place > 0 && logits_[place - 1] < logit; --place) {
      logits_[place] = logits_[place - 1];
      ids_[place] = ids_[place - 1];
    }
    logits_[place] = logit;
    ids_[place] = id;
  }

  int64_t count() const { return count_; }
  float logit(int64_t i) const { return logits_[i]; }
  int32_t id(int64_t i) const { return ids_[i]; }

 private:
  int64_t capacity_, count_ = 0;
  float logits_[kMaxTop];
  int32_t ids_[kMaxTop];
};

// Sum of exp(logit - largest) over logits that come block by block, in float64.
class Softmax {
 public:
  void add(const float* block, float largest_of_block) {
    if (largest_of_block > largest_) {
      if (largest_ > -kInfinity) sum_ *= std::exp(static_cast<double>(largest_) - largest_of_block);
      largest_ = largest_of_block;
    }
    if (largest_ == -kInfinity) return;
    vfloat sum = {};
    for (int64_t i = 0; i < kBlock; i += kLanes) sum += exp(load(block + i) - largest_);
    sum_ += sum_of(sum);
  }

  void finish() {
    log_sum_ = sum_ == 0.0 ? 0.0f : static_cast<float>(std::log(sum_));
    if (largest_ == -kInfinity) largest_ = 0.0f;
  }

  // The only place where a logprob is computed, so that one token's is one number.
  float logprob(float logit) const { return (logit - largest_) - log_sum_; }

 private:
  float largest_ = -kInfinity, log_sum_ = 0.0f;
  double sum_ = 0.0;
};

// How many of the block's logits come before the token (`logit`, `id`) in the order of likelihood.
int64_t num_before(const float* block, int64_t first_id, float logit, int64_t id) {
  vint count = {};
  for (int64_t i = 0; i < kBlock; i += kLanes) {
    const vfloat x = load(block + i);
    const vint has_lower_id = lane_numbers() + static_cast<int32_t>(first_id + i) < vint{} + static_cast<int32_t>(id);
    count -= (x > broadcast(logit)) | ((x == broadcast(logit)) & has_lower_id);
  }
  int64_t total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += count[lane];
  return total;
}

template <typename T>
void score(const T* logits, int64_t vocab_size, int64_t id, int64_t k, float* logprob, int32_t* rank, int32_t* top_ids,
           float* top_logprobs) {
  Top top(k);
  Softmax softmax;
  const int64_t start = id / kLanes * kLanes;
  const float wanted = load_logits(logits, start, vocab_size)[id - start];
  int64_t before = 0;
  for (int64_t first = 0; first < vocab_size; first += kBlock) {
    float block[kBlock];
    vfloat largest_lanes = broadcast(-kInfinity);
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      const vfloat x = first + i < vocab_size ? load_logits(logits, first + i, vocab_size) : broadcast(-kInfinity);
      store(block + i, x);
      largest_lanes = max(x, largest_lanes);
    }
    const float largest = max_of(largest_lanes);
    softmax.add(block, largest);
    if (largest >= wanted) before += num_before(block, first, wanted, id);
    if (!top.takes(largest)) continue;
    for (int64_t i = 0; i < std::min(kBlock, vocab_size - first); ++i) {
      if (top.takes(block[i])) top.add(block[i], static_cast<int32_t>(first + i));
    }
  }
  softmax.finish();
  *logprob = softmax.logprob(wanted);
  *rank = static_cast<int32_t>(1 + before);
  for (int64_t i = 0; i < top.count(); ++i) {
    top_ids[i] = top.id(i);
    top_logprobs[i] = softmax.logprob(top.logit(i));
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> token_logprobs(Tensor logits_SV, Tensor ids_S, int64_t k) {
  const Tensor logits_dense = dense_last(logits_SV);
  const auto ids = table<int32_t>(ids_S, 1, ScalarType::Int, "ids");
  const int64_t num_places = ids.sizes[0];
  STD_TORCH_CHECK(logits_dense.dim() == 2 && logits_dense.size(0) == num_places,
                  "logits and ids must agree in their first dimension");
  STD_TORCH_CHECK(k >= 0 && k <= kMaxTop, "k must be from 0 to ", kMaxTop, ", is ", k);
  const int64_t vocab_size = logits_dense.size(1);
  int64_t num_wanted = 0;
  for (int64_t i = 0; i < num_places; ++i) {
    STD_TORCH_CHECK(ids.data[i] < vocab_size, "id ", ids.data[i], " is outside of the vocabulary");
    num_wanted += ids.data[i] >= 0;
  }

  Tensor logprob_S = empty({num_places}, ScalarType::Float), rank_S = empty({num_places}, ScalarType::Int);
  Tensor top_ids_SK = empty({num_places, k}, ScalarType::Int), top_logprobs_SK = empty({num_places, k}, ScalarType::Float);
  const auto logprobs = view<float>(logprob_S, 1, "logprob"), top_logprobs = view<float>(top_logprobs_SK, 2, "top_logprobs");
  const auto ranks = view<int32_t>(rank_S, 1, "rank"), top_ids = view<int32_t>(top_ids_SK, 2, "top_ids");
  with_float_type(logits_dense.scalar_type(), "logits", [&](auto zero) {
    const auto logits = view<decltype(zero)>(logits_dense, 2, "logits");
    std::atomic<int64_t> next{0};
    const auto work = [&](int64_t, int64_t) {
      for (int64_t i = next++; i < num_places; i = next++) {
        *logprobs.at(i) = -kInfinity;
        *ranks.at(i) = 0;
        std::fill_n(top_ids.at(i), k, -1);
        std::fill_n(top_logprobs.at(i), k, -kInfinity);
        if (ids.data[i] < 0) continue;
        score(logits.at(i), vocab_size, ids.data[i], k, logprobs.at(i), ranks.at(i), top_ids.at(i), top_logprobs.at(i));
      }
    };
    const int64_t num_workers =
        num_wanted * vocab_size < kParallelLogits ? 1 : std::min<int64_t>(num_wanted, torch::stable::get_num_threads());
    if (num_workers == 1) {
      work(0, 1);
    } else {
      torch::stable::parallel_for(0, num_workers, 1, work);
    }
  });
  return {logprob_S, rank_S, top_ids_SK, top_logprobs_SK};
}

}  // namespace toka
