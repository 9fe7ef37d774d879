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

Tensor linear_packed(Tensor x_NI, Tensor panels_PIL, std::optional<Tensor> bias_O, int64_t out_features,
                     std::optional<Tensor> norm_weight_I, double norm_eps, bool gated, std::optional<Tensor> residual_NO) {
  STD_TORCH_CHECK(x_NI.dim() == 2 && panels_PIL.dim() == 3 && panels_PIL.size(2) == kPanelWidth && panels_PIL.is_contiguous(),
                  "x must be [N, I] and the panels contiguous [P, I, ", kPanelWidth, "]");
  STD_TORCH_CHECK(divide_up(out_features, kPanelWidth) == panels_PIL.size(0), panels_PIL.size(0), " panels don't hold ", out_features,
                  " out features");
  STD_TORCH_CHECK(x_NI.scalar_type() == panels_PIL.scalar_type(), "x and the panels must have one dtype");
  const Fusions fusions{bias_O, norm_weight_I, residual_NO, norm_eps, gated};
  Tensor out = empty({x_NI.size(0), out_features}, x_NI.scalar_type());
  with_float_type(x_NI.scalar_type(), "x", [&](auto zero) {
    using T = decltype(zero);
    const ProductInput<T> in(x_NI, fusions);
    STD_TORCH_CHECK(in.in_features() == panels_PIL.size(1), "x has ", in.in_features(), " features, the panels have ", panels_PIL.size(1));
    const ProductOut<T> results(out, fusions);
    FloatProduct<T, StoredPanels<T>>(in, {view<T>(panels_PIL, 3, "panels").template as<const T>()}, results).run();
  });
  return out;
}

}  // namespace toka
