// What all products with packed weights have in common: how they are shared out among threads, and where sums become results.
#pragma once

#include <torch/csrc/stable/ops.h>

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

// The results of a product: sums plus the bias (nullptr = none), cast to T.
template <typename T>
class ProductOut {
 public:
  ProductOut(const T* bias, View<T> out) : bias_(bias), out_(out) {}

  // The sums of some rows and one panel, [rows, kPanelWidth].
  void store_panel(const float* sums, Range rows, int64_t p) const {
    const int64_t first = p * kPanelWidth, count = std::min<int64_t>(kPanelWidth, out_.sizes[1] - first);
    for (int64_t c = 0; c < count; c += kLanes) {
      const vfloat bias = bias_ == nullptr ? vfloat{} : load_part(bias_ + first + c, count - c);
      for (int64_t r = 0; r < rows.size(); ++r) {
        const vfloat sum = load(sums + r * kPanelWidth + c);
        store_part(out_.at(rows.begin + r, first + c), bias_ == nullptr ? sum : sum + bias, count - c);
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
  const T* bias_;
  const View<T> out_;
};

// The bias of a product as it may be given: none, or [out_features] in x's dtype. Returns its values, which `kept` keeps alive.
template <typename T>
const T* bias_values(const std::optional<Tensor>& bias_O, int64_t out_features, ScalarType dtype, std::optional<Tensor>& kept) {
  if (!bias_O.has_value()) return nullptr;
  kept = dense_last(*bias_O);
  STD_TORCH_CHECK(kept->dim() == 1 && kept->size(0) == out_features && kept->scalar_type() == dtype,
                  "the bias must be [out_features] in x's dtype");
  return view<T>(*kept, 1, "bias").data;
}

}  // namespace toka
