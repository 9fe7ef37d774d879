// toka_cpp::pack_linear and embedding_packed: into panels of kPanelWidth out features, and rows back out of them.
#include "kernels.h"
#include "linear_packed.h"
#include "tensors.h"

namespace toka {
namespace {

constexpr int64_t kStripe = 16;                 // in features that a panel is filled by: a cache line of each weight row
constexpr int64_t kParallelValues = 1 << 16;    // fewer values than this are moved by the calling thread

// Calls move(begin, end) on parts of [0, count), by several threads if there is enough to do.
template <typename Move>
void share(int64_t count, int64_t values_each, const Move& move) {
  if (count * values_each < kParallelValues) return move(0, count);
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kParallelValues / 2 / values_each), move);
}

template <typename T>
void fill_panel(View<const T> weight, int64_t p, T* panel) {
  const int64_t in_features = weight.sizes[1], first = p * kPanelWidth;
  const int64_t width = std::min<int64_t>(kPanelWidth, weight.sizes[0] - first);
  if (width < kPanelWidth) std::fill_n(panel, in_features * kPanelWidth, T{0});
  for (int64_t stripe = 0; stripe < in_features; stripe += kStripe) {
    const int64_t end = std::min(in_features, stripe + kStripe);
    for (int64_t l = 0; l < width; ++l) {
      const T* row = weight.at(first + l);
      for (int64_t i = stripe; i < end; ++i) panel[i * kPanelWidth + l] = row[i];
    }
  }
}

template <typename T>
void gather(const Indices& ids, View<const T> panels, View<T> out) {
  const int64_t num_ids = ids.size(), in_features = panels.sizes[1], num_rows = panels.sizes[0] * kPanelWidth;
  for (int64_t n = 0; n < num_ids; ++n) {
    STD_TORCH_CHECK(ids[n] >= 0 && ids[n] < num_rows, "id ", ids[n], " is outside of the ", num_rows, " packed rows");
  }
  share(num_ids, std::max<int64_t>(1, in_features) * kPanelWidth / 4, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t id = ids[n];
      const T* from = panels.at(id / kPanelWidth) + id % kPanelWidth;
      T* to = out.at(n);
      for (int64_t i = 0; i < in_features; ++i) to[i] = from[i * kPanelWidth];
    }
  });
}

}  // namespace

Tensor pack_linear(Tensor weight_OI) {
  STD_TORCH_CHECK(weight_OI.dim() == 2, "weight must be [O, I]");
  const Tensor dense = dense_last(weight_OI);
  const int64_t num_panels = (dense.size(0) + kPanelWidth - 1) / kPanelWidth, in_features = dense.size(1);
  Tensor packed = empty({num_panels, in_features, kPanelWidth}, dense.scalar_type());
  with_storage_type(dense.scalar_type(), "weight", [&](auto zero) {
    using T = decltype(zero);
    const auto weight = view<T>(dense, 2, "weight").template as<const T>();
    const auto panels = view<T>(packed, 3, "panels");
    share(num_panels, std::max<int64_t>(1, in_features) * kPanelWidth, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) fill_panel(weight, p, panels.at(p));
    });
  });
  return packed;
}

Tensor embedding_packed(Tensor ids_N, Tensor panels_PIL) {
  STD_TORCH_CHECK(panels_PIL.dim() == 3 && panels_PIL.size(2) == kPanelWidth, "panels must be [P, I, ", kPanelWidth, "]");
  STD_TORCH_CHECK(ids_N.dim() == 1, "ids must be [N]");
  Tensor rows = empty({ids_N.size(0), panels_PIL.size(1)}, panels_PIL.scalar_type());
  with_storage_type(panels_PIL.scalar_type(), "panels", [&](auto zero) {
    using T = decltype(zero);
    const auto panels = view<T>(panels_PIL, 3, "panels").template as<const T>();
    const auto out = view<T>(rows, 2, "rows");
    gather(Indices(ids_N, "ids"), panels, out);
  });
  return rows;
}

}  // namespace toka
