// toka_cpp::pack_quantised and embedding_quantised_packed: into the panels that quantised.h describes, and rows back out of them.
#include <optional>
#include <vector>

#include "kernels.h"
#include "quantised.h"
#include "product.h"

namespace toka {
namespace {

constexpr int64_t kParallelBytes = 1 << 16;  // fewer bytes than this are moved by the calling thread

// Calls move(begin, end) on parts of [0, count), by several threads if there is enough to do.
template <typename Move>
void share(int64_t count, int64_t bytes_each, const Move& move) {
  if (count * bytes_each < kParallelBytes) return move(0, count);
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kParallelBytes / 2 / bytes_each), move);
}

// codes: [O, I * Bits / 8], of 4 bits the even in feature in the low half. One panel, which is zero before.
template <int Bits>
void fill_codes(View<const uint8_t> codes, int64_t p, const PanelShape& shape, uint8_t* panel) {
  const int64_t width = std::min<int64_t>(kPanelWidth, codes.sizes[0] - p * kPanelWidth), group_size = shape.group_size();
  for (int64_t lane = 0; lane < width; ++lane) {
    const uint8_t* row = codes.at(p * kPanelWidth + lane);
    for (int64_t g = 0; g < shape.num_groups; ++g) {
      uint8_t* group = panel + g * shape.group_bytes();
      for (int64_t i = 0; i < group_size; ++i) {
        const int64_t feature = g * group_size + i;
        if constexpr (Bits == 8) {
          group[code_byte<8>(i, lane)] = row[feature];
        } else {
          const uint8_t code = feature % 2 == 0 ? row[feature / 2] & 15 : row[feature / 2] >> 4;
          group[code_byte<4>(i, lane)] |= i / kQuad % 2 == 0 ? code : code << 4;
        }
      }
    }
  }
}

// Puts a column of [O, G] scales (or minimums) where a panel keeps them, `offset` bytes into each group.
template <typename S>
void fill_scales(View<const S> scales, int64_t p, const PanelShape& shape, int64_t offset, uint8_t* panel) {
  const int64_t width = std::min<int64_t>(kPanelWidth, scales.sizes[0] - p * kPanelWidth);
  for (int64_t g = 0; g < shape.num_groups; ++g) {
    uint8_t* to = panel + g * shape.group_bytes() + offset;
    for (int64_t lane = 0; lane < width; ++lane) std::memcpy(to + lane * sizeof(S), scales.at(p * kPanelWidth + lane, g), sizeof(S));
  }
}

template <int Bits, typename S, typename T>
void copy_row(const uint8_t* panel, int64_t lane, const PanelShape& shape, T* to) {
  const int64_t group_size = shape.group_size();
  for (int64_t g = 0; g < shape.num_groups; ++g) {
    const uint8_t* group = panel + g * shape.group_bytes();
    const S* scales = reinterpret_cast<const S*>(group + shape.code_bytes()) + lane;
    const float scale = static_cast<float>(*scales);
    const float minimum = shape.has_minimums ? static_cast<float>(scales[kPanelWidth]) : -static_cast<float>(shape.zero_code()) * scale;
    for (int64_t i = 0; i < group_size; ++i) {
      to[g * group_size + i] = static_cast<T>(static_cast<float>(code_at<Bits>(group, i, lane)) * scale + minimum);
    }
  }
}

ScalarType scale_dtype(const PanelShape& shape) { return shape.num_groups == 1 ? ScalarType::Float : ScalarType::Half; }

}  // namespace

Tensor pack_quantised(int64_t bits, Tensor codes, Tensor scales, std::optional<Tensor> minimums) {
  const auto rows = table<uint8_t>(codes, 2, ScalarType::Byte, "codes");
  STD_TORCH_CHECK(scales.dim() == 2 && scales.size(0) == rows.sizes[0], "scales must be [O, G]");
  const PanelShape shape{rows.sizes[1] * 8 / bits, scales.size(1), bits, minimums.has_value()};
  shape.check();
  const int64_t num_panels = num_panels_of(rows.sizes[0]), panel_bytes = shape.panel_bytes();
  Tensor packed = empty({num_panels, panel_bytes}, ScalarType::Byte);
  uint8_t* panels = static_cast<uint8_t*>(packed.data_ptr());
  const auto fill = [&](auto scale_type) {
    using S = decltype(scale_type);
    const auto scale_rows = table<S>(scales, 2, scale_dtype(shape), "scales");
    const auto minimum_rows = minimums.has_value() ? table<S>(*minimums, 2, scale_dtype(shape), "minimums") : View<const S>{};
    STD_TORCH_CHECK(!minimums.has_value() || (minimum_rows.sizes[0] == scale_rows.sizes[0] && minimum_rows.sizes[1] == scale_rows.sizes[1]),
                    "minimums must have the scales' shape");
    share(num_panels, panel_bytes, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        uint8_t* panel = panels + p * panel_bytes;
        std::fill_n(panel, panel_bytes, uint8_t{0});
        bits == 4 ? fill_codes<4>(rows, p, shape, panel) : fill_codes<8>(rows, p, shape, panel);
        fill_scales(scale_rows, p, shape, shape.code_bytes(), panel);
        if (minimums.has_value()) fill_scales(minimum_rows, p, shape, shape.code_bytes() + shape.scales_bytes(), panel);
      }
    });
  };
  shape.num_groups == 1 ? fill(float{}) : fill(float16{});
  return packed;
}

Tensor embedding_quantised_packed(Tensor ids_N, Tensor panels, int64_t in_features, int64_t bits, int64_t num_groups, bool has_minimums,
                                  ScalarType dtype) {
  const PanelShape shape{in_features, num_groups, bits, has_minimums};
  shape.check();
  const auto packed = table<uint8_t>(panels, 2, ScalarType::Byte, "panels");
  STD_TORCH_CHECK(packed.sizes[1] == shape.panel_bytes(), "the panels must be [P, ", shape.panel_bytes(), "]");
  const Indices ids(ids_N, "ids");
  const int64_t num_rows = packed.sizes[0] * kPanelWidth;
  for (int64_t n = 0; n < ids.size(); ++n) {
    STD_TORCH_CHECK(ids[n] >= 0 && ids[n] < num_rows, "id ", ids[n], " is outside of the ", num_rows, " packed rows");
  }
  Tensor rows = empty({ids.size(), in_features}, dtype);
  with_float_type(dtype, "dtype", [&](auto zero) {
    using T = decltype(zero);
    const auto out = view<T>(rows, 2, "rows");
    const auto copy = [&](auto scale_type) {
      using S = decltype(scale_type);
      share(ids.size(), shape.in_features * kPanelWidth, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
          const uint8_t* panel = packed.at(ids[n] / kPanelWidth);
          const int64_t lane = ids[n] % kPanelWidth;
          bits == 4 ? copy_row<4, S>(panel, lane, shape, out.at(n)) : copy_row<8, S>(panel, lane, shape, out.at(n));
        }
      });
    };
    num_groups == 1 ? copy(float{}) : copy(float16{});
  });
  return rows;
}

}  // namespace toka
