// toka_cpp::linear_packed: x . weightᵀ + bias over weights in panels (pack_linear.cpp makes them); the loops are float_product.h's.
#include <optional>

#include "float_product.h"
#include "kernels.h"

namespace toka {
namespace {

// Panels [P, I, kPanelWidth] of float32 or of a 16-bit type.
template <typename T>
struct StoredPanels {
  static constexpr bool kIsFloat = std::is_same_v<T, float>;

  View<const T> panels_PIL;

  int64_t num_panels() const { return panels_PIL.sizes[0]; }
  int64_t in_features() const { return panels_PIL.sizes[1]; }
  int64_t granule() const { return 1; }
  const char* at(int64_t p, int64_t k) const { return reinterpret_cast<const char*>(panels_PIL.at(p, k)); }
  int64_t num_bytes(int64_t depth) const { return depth * kPanelWidth * static_cast<int64_t>(sizeof(T)); }
  const T* values(int64_t p, int64_t k) const { return panels_PIL.at(p, k); }
  int64_t stride() const { return panels_PIL.strides[0]; }

  void convert(int64_t p, Range chunk, float* to) const {
    const T* from = panels_PIL.at(p, chunk.begin);
    for (int64_t i = 0; i < chunk.size() * kPanelWidth; i += kLanes) store(to + i, load(from + i));
  }
};

}  // namespace

Tensor linear_packed(Tensor x_NI, Tensor panels_PIL, std::optional<Tensor> bias_O, int64_t out_features) {
  const Tensor x = dense_last(x_NI);
  STD_TORCH_CHECK(x.dim() == 2 && panels_PIL.dim() == 3 && panels_PIL.size(2) == kPanelWidth && panels_PIL.is_contiguous(),
                  "x must be [N, I] and the panels contiguous [P, I, ", kPanelWidth, "]");
  STD_TORCH_CHECK(x.size(1) == panels_PIL.size(1), "x has ", x.size(1), " features, the panels have ", panels_PIL.size(1));
  STD_TORCH_CHECK(divide_up(out_features, kPanelWidth) == panels_PIL.size(0), panels_PIL.size(0), " panels don't hold ", out_features,
                  " out features");
  STD_TORCH_CHECK(x.scalar_type() == panels_PIL.scalar_type(), "x and the panels must have one dtype");
  std::optional<Tensor> bias;
  Tensor out = empty({x.size(0), out_features}, x.scalar_type());
  with_float_type(x.scalar_type(), "x", [&](auto zero) {
    using T = decltype(zero);
    const T* bias_values_O = bias_values<T>(bias_O, out_features, x.scalar_type(), bias);
    const StoredPanels<T> panels{view<T>(panels_PIL, 3, "panels").template as<const T>()};
    FloatProduct<T, StoredPanels<T>>(view<T>(x, 2, "x").template as<const T>(), panels, {bias_values_O, view<T>(out, 2, "out")}).run();
  });
  return out;
}

}  // namespace toka
