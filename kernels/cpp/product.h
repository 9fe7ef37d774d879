// What all products with packed weights have in common: how they are shared out among threads, what stands before them and behind.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <optional>

#include "linear_packed.h"
#include "tensors.h"

namespace toka {

constexpr int64_t kParallelProducts = 1 << 17;  // smaller problems are the calling thread's

struct Range {
  int64_t begin, end;

  int64_t size() const { return end - begin; }

  // Part `i` of `count` nearly equal ones.
  Range part(int64_t i, int64_t count) const { return {begin + size() * i / count, begin + size() * (i + 1) / count}; }
};

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Calls work(rows, panels) on rectangles that cover all, one a thread. products_each: multiplications of one row and one panel.
// Dividing rows saves preparing them once per thread, dividing panels saves reading them once per thread: rows are divided as long as each
// thread gets `min_rows`.
template <typename Work>
void share_product(Range rows, Range panels, int64_t products_each, int64_t min_rows, const Work& work) {
  const int64_t num_products = rows.size() * panels.size() * products_each;
  const int64_t num_threads = num_products < kParallelProducts ? 1 : torch::stable::get_num_threads();
  int64_t row_parts = num_threads;
  while (row_parts > 1 && (num_threads % row_parts != 0 || rows.size() / row_parts < min_rows)) --row_parts;
  const int64_t panel_parts = num_threads / row_parts;
  if (num_threads == 1) return work(rows, panels);
  torch::stable::parallel_for(0, num_threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(rows.part(i / panel_parts, row_parts), panels.part(i % panel_parts, panel_parts));
  });
}

// What a product is given beside x and its weight; op_schema.py says what it means. Absent tensors are nullopt.
struct Fusions {
  std::optional<Tensor> bias_O, norm_weight_I, residual_NO;
  double norm_eps;
  bool gated;
};

// The in features of a product, row by row: x as it is, x normed and weighted, or the first half of x gated by the second.
template <typename T>
class ProductInput {
 public:
  ProductInput(const Tensor& x_NI, const Fusions& fusions)
      : gated_(fusions.gated), norm_eps_(static_cast<float>(fusions.norm_eps)), kept_(dense_last(x_NI)), x_(view<T>(kept_, 2, "x").template as<const T>()) {
    STD_TORCH_CHECK(!gated_ || x_.sizes[1] % 2 == 0, "gated rows come in two halves, x has ", x_.sizes[1], " features");
    if (!fusions.norm_weight_I.has_value()) return;
    kept_norm_weight_ = dense_last(*fusions.norm_weight_I);
    STD_TORCH_CHECK(!gated_, "x is either normed or gated");
    STD_TORCH_CHECK(kept_norm_weight_->dim() == 1 && kept_norm_weight_->size(0) == in_features() &&
                        kept_norm_weight_->scalar_type() == x_NI.scalar_type(),
                    "the norm's weight must be [in_features] in x's dtype");
    norm_weight_ = view<T>(*kept_norm_weight_, 1, "norm_weight").data;
  }

  int64_t num_rows() const { return x_.sizes[0]; }
  int64_t in_features() const { return gated_ ? x_.sizes[1] / 2 : x_.sizes[1]; }
  bool is_plain() const { return !gated_ && norm_weight_ == nullptr; }

  // Of plain rows: where in feature k of row r stands, and the distance of two rows.
  const T* at(int64_t r, int64_t k) const { return x_.at(r, k); }
  int64_t stride() const { return x_.strides[0]; }

  // Of others: rows in float32, [rows, in_features].
  void prepare(Range rows, float* to) const {
    for (int64_t r = rows.begin; r < rows.end; ++r, to += in_features()) gated_ ? gate(x_.at(r), to) : norm(x_.at(r), to);
  }

 private:
  // RMSNorm (Zhang and Sennrich, 2019).
  void norm(const T* row, float* to) const {
    const int64_t size = in_features();
    vfloat squares{};
    for (int64_t i = 0; i < size; i += kLanes) {
      const vfloat value = load_part(row + i, size - i);
      squares = fma(value, value, squares);
    }
    const vfloat scale = broadcast(1.0f / std::sqrt(sum_of(squares) / static_cast<float>(size) + norm_eps_));
    for (int64_t i = 0; i < size; i += kLanes) {
      store_part(to + i, load_part(row + i, size - i) * scale * load_part(norm_weight_ + i, size - i), size - i);
    }
  }

  // silu(first half) * second half.
  void gate(const T* row, float* to) const {
    const int64_t size = in_features();
    for (int64_t i = 0; i < size; i += kLanes) {
      const vfloat gate = load_part(row + i, size - i), power = exp(gate < 0.0f ? gate : -gate);  // of -|gate|
      const vfloat sigmoid = (gate < 0.0f ? power : broadcast(1.0f)) / (power + 1.0f);
      store_part(to + i, gate * sigmoid * load_part(row + size + i, size - i), size - i);
    }
  }

  const bool gated_;
  const float norm_eps_;
  const Tensor kept_;
  const View<const T> x_;
  std::optional<Tensor> kept_norm_weight_;
  const T* norm_weight_ = nullptr;
};

// The results of a product: sums, plus bias, plus residual, cast to T.
template <typename T>
class ProductOut {
 public:
  ProductOut(Tensor out_NO, const Fusions& fusions) : out_(view<T>(out_NO, 2, "out")) {
    const int64_t num_rows = out_NO.size(0), out_features = out_NO.size(1);
    if (fusions.bias_O.has_value()) {
      kept_bias_ = dense_last(*fusions.bias_O);
      STD_TORCH_CHECK(kept_bias_->dim() == 1 && kept_bias_->size(0) == out_features && kept_bias_->scalar_type() == out_NO.scalar_type(),
                      "the bias must be [out_features] in x's dtype");
      bias_ = view<T>(*kept_bias_, 1, "bias").data;
    }
    if (fusions.residual_NO.has_value()) {
      kept_residual_ = dense_last(*fusions.residual_NO);
      residual_ = view<T>(*kept_residual_, 2, "residual").template as<const T>();
      STD_TORCH_CHECK(residual_.sizes[0] == num_rows && residual_.sizes[1] == out_features && kept_residual_->scalar_type() == out_NO.scalar_type(),
                      "the residual must be [N, out_features] in x's dtype");
    }
  }

  // The sums of some rows and one panel, [rows, kPanelWidth].
  void store_panel(const float* sums, Range rows, int64_t p) const {
    const int64_t first = p * kPanelWidth, count = std::min<int64_t>(kPanelWidth, out_.sizes[1] - first);
    for (int64_t c = 0; c < count; c += kLanes) {
      const vfloat bias = bias_ == nullptr ? vfloat{} : load_part(bias_ + first + c, count - c);
      for (int64_t r = 0; r < rows.size(); ++r) {
        vfloat sum = load(sums + r * kPanelWidth + c);
        if (bias_ != nullptr) sum += bias;
        if (residual_.data != nullptr) sum += load_part(residual_.at(rows.begin + r, first + c), count - c);
        store_part(out_.at(rows.begin + r, first + c), sum, count - c);
      }
    }
  }

  void prefetch_panel(Range rows, int64_t p) const {
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const char* line = reinterpret_cast<const char*>(out_.at(r, p * kPanelWidth));
      for (int64_t byte = 0; byte < kPanelWidth * static_cast<int64_t>(sizeof(T)); byte += kCacheLineBytes) {
        __builtin_prefetch(line + byte, 1);
      }
    }
  }

 private:
  const View<T> out_;
  std::optional<Tensor> kept_bias_, kept_residual_;
  const T* bias_ = nullptr;
  View<const T> residual_{};
};

}  // namespace toka
