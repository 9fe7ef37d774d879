// toka_cpp::sum_tokens: adds the hidden states of each row's tokens to the row's running sum, token by token.
#include "kernels.h"
#include "tensors.h"

namespace toka {
namespace {

constexpr int64_t kParallelValues = 1 << 16;  // fewer values than this are added by the calling thread

template <typename T>
void add_rows(View<T> hidden, View<const int32_t> rows, View<const int32_t> query_start, View<const int32_t> seq_lens,
              View<float> sums) {
  const int64_t num_rows = rows.sizes[0], width = hidden.sizes[1];
  for (int64_t i = 0; i < num_rows; ++i) {
    const int64_t begin = *query_start.at(i), end = *query_start.at(i + 1);
    STD_TORCH_CHECK(0 <= begin && begin <= end && end <= hidden.sizes[0], "query_start must ascend from 0 to the number of tokens");
    STD_TORCH_CHECK(*rows.at(i) < sums.sizes[0], "row ", *rows.at(i), " is outside of the table of sums");
  }
  const auto add = [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = *rows.at(i), begin = *query_start.at(i), end = *query_start.at(i + 1);
      if (row < 0 || begin == end) continue;
      float* sum = sums.at(row);
      if (*seq_lens.at(i) == end - begin) std::fill_n(sum, width, 0.0f);
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t c = 0; c < width; c += kLanes) {
          const int64_t count = width - c;
          store_part(sum + c, load_part(sum + c, count) + load_part(hidden.at(t) + c, count), count);
        }
      }
    }
  };
  if (hidden.sizes[0] * width < kParallelValues) return add(0, num_rows);
  torch::stable::parallel_for(0, num_rows, 1, add);
}

}  // namespace

void sum_tokens(Tensor hidden_TC, Tensor rows_R, Tensor query_start, Tensor seq_lens_R, Tensor sums_MC) {
  const Tensor hidden = dense_last(hidden_TC);
  STD_TORCH_CHECK(hidden.dim() == 2 && sums_MC.dim() == 2 && hidden.size(1) == sums_MC.size(1),
                  "hidden states [T, C] and sums [M, C] must agree in C");
  STD_TORCH_CHECK(query_start.size(0) == rows_R.size(0) + 1 && seq_lens_R.size(0) == rows_R.size(0),
                  "rows, query_start and seq_lens disagree");
  STD_TORCH_CHECK(sums_MC.scalar_type() == ScalarType::Float, "sums must be float32");
  with_float_type(hidden.scalar_type(), "hidden", [&](auto zero) {
    add_rows(view<decltype(zero)>(hidden, 2, "hidden"), table<int32_t>(rows_R, 1, ScalarType::Int, "rows"),
             table<int32_t>(query_start, 1, ScalarType::Int, "query_start"),
             table<int32_t>(seq_lens_R, 1, ScalarType::Int, "seq_lens"), view<float>(sums_MC, 2, "sums"));
  });
}

}  // namespace toka
