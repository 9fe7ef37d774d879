// toka_cpp::linear_quantised_packed: x . weightᵀ + bias over quantised panels (pack_quantised.cpp makes them).
//
// With float32 activations weights are turned to float32 on their way (float_product.h). Else activations are turned to int8:
// Products of codes are summed in int32 over one group of in features, exactly; the groups' sums are scaled and added in float32, in
// ascending order. So a row's result depends on nothing but the row: any block, any number of threads gives the same bits.
//
// Threads share rows or panels as in linear_packed.cpp. The rows of a pass stay in the L2 cache and meet one panel after another, so a
// panel is read from memory once for all of them.
#include <array>
#include <optional>
#include <vector>

#include "float_product.h"
#include "kernels.h"
#include "quantised_rows.h"

namespace toka {
namespace {

// Rows of a block. Over many groups each row keeps two sets of sums in registers, of the group (int32) and of all (float32): with AVX-512
// 6 x 2 x 2 sums, 2 x 2 codes, 2 scales, 1 mask = 31. Over one group it keeps one: 14 x 2 + 2 codes = 30.
constexpr int kRowsOverGroups = kLanes == 16 ? 6 : 2;
constexpr int kRowsOverOneGroup = kLanes == 16 ? 14 : kLanes == 8 ? 4 : 2;

constexpr int64_t kMaxActivationBytes = 640 << 10;  // of the rows that meet a panel together

inline vfloat load_scales(const uint8_t* p, std::true_type /* of one group */) { return load(reinterpret_cast<const float*>(p)); }
inline vfloat load_scales(const uint8_t* p, std::false_type) { return load(reinterpret_cast<const float16*>(p)); }

// sums[Rows, kPanelWidth] = block . panel. Asks for `prefetch.lines` cache lines from prefetch.next on with each pair of quads.
template <int Rows, int Bits, bool HasMinimums, bool IsOneGroup>
void multiply_quantised(const QuantisedRows& block, const uint8_t* panel, const PanelShape& shape, float* sums, Prefetch prefetch) {
  constexpr int kColumns = kLanes * kBlockVectors;
  constexpr std::bool_constant<IsOneGroup> is_one_group{};
  const int64_t pairs = shape.quads_per_group() / 2, group_bytes = shape.group_bytes(), code_bytes = shape.code_bytes();
  for (int column = 0; column < kPanelWidth; column += kColumns) {
    vfloat sum[Rows][kBlockVectors] = {};
    const int8_t* activations = block.codes;
    for (int64_t g = 0; g < shape.num_groups; ++g) {
      const uint8_t* group = panel + g * group_bytes;
      const uint8_t* codes = group + column * kQuad;
      vint dot[Rows][kBlockVectors];
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        int32_t first = 0;
        if constexpr (!HasMinimums) std::memcpy(&first, &block.code_sums[g * Rows + r], sizeof(first));
        for (int v = 0; v < kBlockVectors; ++v) dot[r][v] = first + vint{};
      }
      const auto add_quad = [&](const vuint (&quad)[kBlockVectors]) __attribute__((always_inline)) {
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
          int32_t activation;
          std::memcpy(&activation, activations + r * kQuad, sizeof(activation));
          for (int v = 0; v < kBlockVectors; ++v) dot[r][v] = add_dot(dot[r][v], quad[v], activation);
        }
        activations += Rows * kQuad;
      };
      for (int64_t pair = 0; pair < pairs; ++pair) {
        for (int64_t i = 0; i < prefetch.lines; ++i, prefetch.next += kCacheLineBytes) __builtin_prefetch(prefetch.next);
        vuint first[kBlockVectors], second[kBlockVectors];
        for (int v = 0; v < kBlockVectors; ++v) {
          const uint8_t* at = codes + v * kLanes * kQuad;
          if constexpr (Bits == 4) {
            const vuint both = load_codes(at);
            first[v] = both & 0x0F0F0F0F;
            second[v] = (both >> 4) & 0x0F0F0F0F;
          } else {
            first[v] = load_codes(at);
            second[v] = load_codes(at + kPanelWidth * kQuad);
          }
        }
        codes += kPanelWidth * kQuad * (Bits == 4 ? 1 : 2);
        add_quad(first);
        add_quad(second);
      }
      const uint8_t* scales = group + code_bytes + column * shape.scale_bytes();
      for (int v = 0; v < kBlockVectors; ++v) {
        const vfloat scale = load_scales(scales + v * kLanes * shape.scale_bytes(), is_one_group);
        vfloat minimum{};
        if constexpr (HasMinimums) {
          minimum = load_scales(scales + shape.scales_bytes() + v * kLanes * shape.scale_bytes(), is_one_group);
        }
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
          const vfloat scaled = to_float(dot[r][v]) * broadcast(block.scales[g * Rows + r]);
          sum[r][v] = IsOneGroup ? rounded(scaled * scale) : fma(scaled, scale, sum[r][v]);
          if constexpr (HasMinimums) sum[r][v] = fma(broadcast(block.code_sums[g * Rows + r]), minimum, sum[r][v]);
        }
      }
    }
    for (int r = 0; r < Rows; ++r) {
      for (int v = 0; v < kBlockVectors; ++v) store(sums + r * kPanelWidth + column + v * kLanes, sum[r][v]);
    }
    prefetch.lines = 0;
  }
}

using Multiply = void (*)(const QuantisedRows&, const uint8_t*, const PanelShape&, float*, Prefetch);

template <int Bits, bool HasMinimums, bool IsOneGroup, int... Below>
constexpr std::array<Multiply, sizeof...(Below)> by_rows(std::integer_sequence<int, Below...>) {
  return {multiply_quantised<Below + 1, Bits, HasMinimums, IsOneGroup>...};
}

// Blocks of symmetric 8-bit codes over one group, the only ones worth it, may be higher.
constexpr int max_rows(int bits, bool has_minimums, bool is_one_group) {
  return bits == 8 && !has_minimums && is_one_group ? kRowsOverOneGroup : kRowsOverGroups;
}

// multiply_quantised of each height; [0] is one row.
template <int Bits, bool HasMinimums, bool IsOneGroup>
constexpr auto kKernels =
    by_rows<Bits, HasMinimums, IsOneGroup>(std::make_integer_sequence<int, max_rows(Bits, HasMinimums, IsOneGroup)>());

template <int Bits, bool HasMinimums>
const Multiply* kernels_for(bool is_one_group) {
  return is_one_group ? kKernels<Bits, HasMinimums, true>.data() : kKernels<Bits, HasMinimums, false>.data();
}

const Multiply* kernels_for(const PanelShape& shape) {
  const bool is_one_group = shape.num_groups == 1;
  if (shape.bits == 4) return shape.has_minimums ? kernels_for<4, true>(is_one_group) : kernels_for<4, false>(is_one_group);
  return shape.has_minimums ? kernels_for<8, true>(is_one_group) : kernels_for<8, false>(is_one_group);
}

// Memory of a thread, kept from call to call.
struct Scratch {
  std::vector<int8_t> codes;
  std::vector<float> rows, scales, code_sums, sums;
};

template <typename T>
class QuantisedProduct {
 public:
  QuantisedProduct(const ProductInput<T>& in, View<const uint8_t> panels, const PanelShape& shape, const ProductOut<T>& out)
      : in_(in), panels_(panels), shape_(shape), out_(out), kernels_(kernels_for(shape)),
        block_rows_(max_rows(static_cast<int>(shape.bits), shape.has_minimums, shape.num_groups == 1)) {}

  void run() const {
    const Range rows{0, in_.num_rows()}, panels{0, panels_.sizes[0]};
    share_product(rows, panels, kPanelWidth * shape_.in_features, 2 * block_rows_, [&](Range own_rows, Range own_panels) {
      thread_local Scratch scratch;
      const int64_t rows_at_once = std::max<int64_t>(block_rows_, kMaxActivationBytes / shape_.in_features);
      const int64_t num_passes = divide_up(own_rows.size(), rows_at_once);
      for (int64_t pass = 0; pass < num_passes; ++pass) pass_rows(own_rows.part(pass, num_passes), own_panels, scratch);
    });
  }

 private:
  void pass_rows(Range rows, Range panels, Scratch& scratch) const {
    const int64_t num_blocks = divide_up(rows.size(), block_rows_), padded = shape_.num_groups * shape_.padded_group_size();
    scratch.codes.resize(rows.size() * padded);
    scratch.scales.resize(rows.size() * shape_.num_groups);
    scratch.code_sums.resize(rows.size() * shape_.num_groups);
    scratch.sums.resize(block_rows_ * kPanelWidth);
    const auto block_at = [&](Range block) {
      const int64_t before = block.begin - rows.begin;
      return QuantisedRows{&scratch.codes[before * padded], &scratch.scales[before * shape_.num_groups],
                           &scratch.code_sums[before * shape_.num_groups]};
    };
    for (int64_t b = 0; b < num_blocks; ++b) {
      const Range block = rows.part(b, num_blocks);
      if (in_.is_plain()) {
        quantise_rows(in_.at(block.begin, 0), in_.stride(), block.size(), shape_, block_at(block));
      } else {
        scratch.rows.resize(block_rows_ * shape_.in_features);
        in_.prepare(block, scratch.rows.data());
        quantise_rows(scratch.rows.data(), shape_.in_features, block.size(), shape_, block_at(block));
      }
    }
    const int64_t panel_bytes = shape_.panel_bytes(), panel_lines = panel_bytes / kCacheLineBytes;
    const int64_t rounds = shape_.num_groups * shape_.quads_per_group() / 2;
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      const uint8_t* panel = panels_.at(p);
      for (int64_t b = 0; b < num_blocks; ++b) {
        const Range block = rows.part(b, num_blocks);
        // One block fetches a little ahead; of several each fetches its share of the next panel.
        const uint8_t* next = num_blocks == 1 ? panel + kPrefetchBytes : panel + panel_bytes + panel_bytes * b / num_blocks;
        const Prefetch prefetch{reinterpret_cast<const char*>(next), divide_up(panel_lines, rounds * num_blocks)};
        kernels_[block.size() - 1](block_at(block), panel, shape_, scratch.sums.data(), prefetch);
        out_.store_panel(scratch.sums.data(), block, p);
      }
    }
  }

  const ProductInput<T>& in_;
  const View<const uint8_t> panels_;
  const PanelShape shape_;
  const ProductOut<T>& out_;
  const Multiply* kernels_;
  const int64_t block_rows_;
};

// Quantised panels for a product in float32.
template <int Bits>
struct QuantisedPanels {
  static constexpr bool kIsFloat = false;

  View<const uint8_t> panels;
  PanelShape shape;

  int64_t num_panels() const { return panels.sizes[0]; }
  int64_t in_features() const { return shape.in_features; }
  int64_t granule() const { return shape.num_groups == 1 ? kPairOfQuads : shape.group_size(); }
  int64_t num_bytes(int64_t depth) const { return depth * shape.group_bytes() / shape.padded_group_size(); }
  const char* at(int64_t p, int64_t k) const { return reinterpret_cast<const char*>(panels.at(p)) + num_bytes(k); }

  void convert(int64_t p, Range chunk, float* to) const {
    const int64_t size = shape.group_size();
    for (int64_t k = chunk.begin; k < chunk.end;) {
      const int64_t g = k / size, end = std::min(chunk.end, (g + 1) * size);
      const uint8_t* group = panels.at(p) + g * shape.group_bytes();
      shape.num_groups == 1 ? convert_group<float>(group, {k - g * size, end - g * size}, to)
                            : convert_group<float16>(group, {k - g * size, end - g * size}, to);
      to += (end - k) * kPanelWidth;
      k = end;
    }
  }

 private:
  // In features [begin, end) of a group, begin a multiple of kPairOfQuads.
  template <typename S>
  void convert_group(const uint8_t* group, Range features, float* to) const {
    const S* scales = reinterpret_cast<const S*>(group + shape.code_bytes());
    for (int lane = 0; lane < kPanelWidth; lane += kLanes) {
      const vfloat scale = load(scales + lane);
      const vfloat minimum = shape.has_minimums ? load(scales + kPanelWidth + lane) : broadcast(-static_cast<float>(shape.zero_code())) * scale;
      for (int64_t i = features.begin; i < features.end; i += kQuad) {
        const vuint bytes = load_codes(group + code_byte<Bits>(i, lane));
        const vuint codes = Bits == 8 ? bytes : (i / kQuad % 2 == 0 ? bytes : bytes >> 4) & 0x0F0F0F0F;
        float* quad = to + (i - features.begin) * kPanelWidth + lane;
        for (int64_t j = 0; j < std::min<int64_t>(kQuad, features.end - i); ++j) {
          store(quad + j * kPanelWidth, fma(to_float((vint)((codes >> (8 * static_cast<uint32_t>(j))) & 0xFF)), scale, minimum));
        }
      }
    }
  }
};

}  // namespace

Tensor linear_quantised_packed(Tensor x_NI, Tensor panels, std::optional<Tensor> bias_O, int64_t out_features, int64_t bits,
                               int64_t num_groups, bool has_minimums, bool int8_activations, std::optional<Tensor> norm_weight_I,
                               double norm_eps, bool gated, std::optional<Tensor> residual_NO) {
  STD_TORCH_CHECK(x_NI.dim() == 2, "x must be [N, I]");
  const Fusions fusions{bias_O, norm_weight_I, residual_NO, norm_eps, gated};
  Tensor out = empty({x_NI.size(0), out_features}, x_NI.scalar_type());
  with_float_type(x_NI.scalar_type(), "x", [&](auto zero) {
    using T = decltype(zero);
    const ProductInput<T> in(x_NI, fusions);
    const PanelShape shape{in.in_features(), num_groups, bits, has_minimums};
    shape.check();
    const auto packed = table<uint8_t>(panels, 2, ScalarType::Byte, "panels");
    STD_TORCH_CHECK(panels.is_contiguous() && packed.sizes[0] == num_panels_of(out_features) && packed.sizes[1] == shape.panel_bytes(),
                    "the panels must be contiguous [", num_panels_of(out_features), ", ", shape.panel_bytes(), "], are [", packed.sizes[0],
                    ", ", packed.sizes[1], "]");
    const ProductOut<T> results(out, fusions);
    if (int8_activations) {
      QuantisedProduct<T>(in, packed, shape, results).run();
    } else if (bits == 4) {
      FloatProduct<T, QuantisedPanels<4>>(in, {packed, shape}, results).run();
    } else {
      FloatProduct<T, QuantisedPanels<8>>(in, {packed, shape}, results).run();
    }
  });
  return out;
}

}  // namespace toka
