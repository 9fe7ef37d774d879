// toka_cpp::adjust_logits: rows in parallel, each in two passes over its tokens. Meaning as in op_schema.py and reference/adjust_logits.py.
#include <atomic>
#include <limits>
#include <vector>

#include "kernels.h"
#include "tensors.h"

namespace toka {
namespace {

constexpr int64_t kParallelLogits = 1 << 16;  // fewer logits than this are handled by the calling thread

// The tables of all rows.
struct Tables {
  View<const int32_t> token_of_slot, block_table, num_prompt_tokens, bias_ids, bad_words;
  View<const float> penalties, biases;
  int64_t block_size;
};

// The tokens of one row, by their positions.
class Tokens {
 public:
  Tokens(const Tables& tables, int64_t row)
      : slots_(tables.token_of_slot.data), blocks_(tables.block_table.at(row)), block_size_(tables.block_size) {}

  int32_t operator[](int64_t position) const {
    return slots_[blocks_[position / block_size_] * block_size_ + position % block_size_];
  }

 private:
  const int32_t* slots_;
  const int32_t* blocks_;
  int64_t block_size_;
};

// counts: one a token of the vocabulary, all zero before and after. A count is 2 for each time that the token was generated, plus 1.
void penalise(float* logits, const Tokens& tokens, int64_t num_prompt_tokens, int64_t length, const float* penalties,
              int32_t* counts) {
  const float presence = penalties[0], frequency = penalties[1], repetition = penalties[2];
  if (presence == 0.0f && frequency == 0.0f && repetition == 1.0f) return;
  const int64_t first = repetition == 1.0f ? std::min(num_prompt_tokens, length) : 0;
  for (int64_t position = first; position < length; ++position) {
    int32_t& count = counts[tokens[position]];
    count = (count | 1) + (position >= num_prompt_tokens ? 2 : 0);
  }
  for (int64_t position = first; position < length; ++position) {
    const int32_t token = tokens[position];
    if (counts[token] == 0) continue;  // done already
    const int32_t generated = counts[token] >> 1;
    counts[token] = 0;
    float logit = logits[token];
    logit = logit > 0.0f ? logit / repetition : logit * repetition;
    logits[token] = logit - (frequency * static_cast<float>(generated) + (generated > 0 ? presence : 0.0f));
  }
}

// Forbid the last token of a word if the others have just been said. word: filled up with -1 in front.
void forbid(float* logits, const Tokens& tokens, int64_t length, const int32_t* word, int64_t size) {
  if (word[size - 1] < 0) return;
  for (int64_t i = 0; i + 1 < size; ++i) {
    const int64_t position = length - (size - 1) + i;
    if (word[i] >= 0 && (position < 0 || tokens[position] != word[i])) return;
  }
  logits[word[size - 1]] = -std::numeric_limits<float>::infinity();
}

void adjust(float* logits, const Tables& tables, int64_t row, int64_t length, int32_t* counts) {
  const Tokens tokens(tables, row);
  penalise(logits, tokens, tables.num_prompt_tokens.data[row], length, tables.penalties.at(row), counts);
  for (int64_t i = 0; i < tables.bias_ids.sizes[1]; ++i) {
    if (const int32_t id = tables.bias_ids.at(row)[i]; id >= 0) logits[id] += tables.biases.at(row)[i];
  }
  for (int64_t i = 0; i < tables.bad_words.sizes[1]; ++i) {
    forbid(logits, tokens, length, tables.bad_words.at(row, i), tables.bad_words.sizes[2]);
  }
}

}  // namespace

Tensor adjust_logits(Tensor logits_SV, Tensor rows_S, Tensor seq_lens_S, Tensor token_of_slot, Tensor block_table,
                     Tensor num_prompt_tokens, Tensor penalties, Tensor bias_ids, Tensor biases, Tensor bad_words,
                     int64_t block_size) {
  const Tensor logits_dense = dense_last(logits_SV);
  const auto rows = table<int32_t>(rows_S, 1, ScalarType::Int, "rows");
  const auto seq_lens = table<int32_t>(seq_lens_S, 1, ScalarType::Int, "seq_lens");
  const Tables tables{table<int32_t>(token_of_slot, 1, ScalarType::Int, "token_of_slot"),
                      table<int32_t>(block_table, 2, ScalarType::Int, "block_table"),
                      table<int32_t>(num_prompt_tokens, 1, ScalarType::Int, "num_prompt_tokens"),
                      table<int32_t>(bias_ids, 2, ScalarType::Int, "bias_ids"),
                      table<int32_t>(bad_words, 3, ScalarType::Int, "bad_words"),
                      table<float>(penalties, 2, ScalarType::Float, "penalties"),
                      table<float>(biases, 2, ScalarType::Float, "biases"),
                      block_size};
  const int64_t num_places = rows.sizes[0], vocab_size = logits_dense.size(1);
  STD_TORCH_CHECK(logits_dense.dim() == 2 && logits_dense.size(0) == num_places && seq_lens.sizes[0] == num_places,
                  "logits, rows and seq_lens must agree in their first dimension");
  STD_TORCH_CHECK(block_size > 0, "block_size must be positive, is ", block_size);

  Tensor adjusted_SV = empty({num_places, vocab_size}, ScalarType::Float);
  const auto adjusted = view<float>(adjusted_SV, 2, "adjusted");
  with_float_type(logits_dense.scalar_type(), "logits", [&](auto zero) {
    const auto logits = view<decltype(zero)>(logits_dense, 2, "logits");
    std::atomic<int64_t> next{0};
    const auto work = [&](int64_t, int64_t) {
      std::vector<int32_t> counts(vocab_size);
      for (int64_t i = next++; i < num_places; i = next++) {
        float* out = adjusted.at(i);
        for (int64_t v = 0; v < vocab_size; ++v) out[v] = static_cast<float>(logits.at(i)[v]);
        if (rows.data[i] >= 0) adjust(out, tables, rows.data[i], seq_lens.data[i], counts.data());
      }
    };
    const int64_t num_workers = num_places * vocab_size < kParallelLogits
                                    ? 1
                                    : std::min<int64_t>(num_places, torch::stable::get_num_threads());
    if (num_workers == 1) {
      work(0, 1);
    } else {
      torch::stable::parallel_for(0, num_workers, 1, work);
    }
  });
  return adjusted_SV;
}

}  // namespace toka
