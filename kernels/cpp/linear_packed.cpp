// toka_cpp::linear_packed: x . weightᵀ + bias over weights in panels (pack_linear.cpp makes them).
//
// A thread takes a rectangle of rows and panels. It turns up to kMaxRows rows into float32 blocks that stay in the L2 cache, and
// leads them past one panel after another, so that a panel is read from memory once for all of them; meanwhile the next panel is
// fetched. Long rows are cut into chunks, so that activations and panel fit the cache together; the sums wait in between.
#include "linear_packed.h"

#include <array>
#include <optional>
#include <vector>

#include "kernels.h"
#include "tensors.h"

namespace toka {
namespace {

constexpr int64_t kMaxRows = 20 * kBlockRows;             // rows that pass a panel together
constexpr int64_t kMaxActivations = kMaxRows * 704;     // of those rows, held at once; 770 KiB with AVX-512
constexpr int64_t kMaxReusedDepth = 2048;                // of a panel that several blocks read: 256 KiB
constexpr int64_t kPanelsPerGroup = 16;                  // whose sums wait while rows are cut into chunks
constexpr int64_t kRowsPerThread = 2 * kBlockRows;       // with fewer rows a thread, threads share rows and divide panels
constexpr int64_t kParallelProducts = 1 << 17;           // smaller problems are the calling thread's
constexpr int64_t kPrefetchBytes = 8192;                 // ahead of a panel that is read once

struct Range {
  int64_t begin, end;

  int64_t size() const { return end - begin; }

  // Part `i` of `count` nearly equal ones.
  Range part(int64_t i, int64_t count) const { return {begin + size() * i / count, begin + size() * (i + 1) / count}; }
};

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Memory of a thread, kept from call to call; at most about 2 MiB.
struct Scratch {
  std::vector<float> activations;  // blocks one after another, each [depth, its rows]
  std::vector<float> panel;        // a 16-bit panel in float32
  std::vector<float> sums;         // [panels of the group, rows, kPanelWidth]

  static float* grown(std::vector<float>& memory, int64_t size) {
    if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
    return memory.data();
  }
};

using Multiply = void (*)(const float*, Panels, int64_t, bool, float*, Prefetch);

template <int... Below>
constexpr std::array<Multiply, kBlockRows> by_rows(std::integer_sequence<int, Below...>) {
  return {multiply_block<Below + 1, 1>...};
}

template <int... Below>
constexpr std::array<Multiply, kBlockRows> by_rows_several_panels(std::integer_sequence<int, Below...>) {
  return {multiply_block<Below + 1, panels_at_once(Below + 1)>...};
}

// multiply_block of each height with one panel, and with panels_at_once; [0] is one row.
constexpr auto kMultiplyOne = by_rows(std::make_integer_sequence<int, kBlockRows>());
constexpr auto kMultiplySeveral = by_rows_several_panels(std::make_integer_sequence<int, kBlockRows>());

template <typename T>
class Product {
 public:
  Product(View<const T> x, View<const T> panels, const T* bias, View<T> out) : x_(x), panels_(panels), bias_(bias), out_(out) {}

  void run() const {
    const Range rows{0, x_.sizes[0]}, panels{0, panels_.sizes[0]};
    const int64_t num_products = rows.size() * panels.size() * kPanelWidth * in_features();
    const int64_t num_threads = num_products < kParallelProducts ? 1 : torch::stable::get_num_threads();
    const int64_t row_parts = num_row_parts(rows.size(), num_threads), panel_parts = num_threads / row_parts;
    const auto work = [&](int64_t begin, int64_t end) {
      thread_local Scratch scratch;
      for (int64_t i = begin; i < end; ++i) {
        multiply(rows.part(i / panel_parts, row_parts), panels.part(i % panel_parts, panel_parts), scratch);
      }
    };
    if (num_threads == 1) return work(0, 1);
    torch::stable::parallel_for(0, num_threads, 1, work);
  }

 private:
  static constexpr bool kIsFloat = std::is_same_v<T, float>;

  int64_t in_features() const { return panels_.sizes[1]; }
  int64_t out_features() const { return out_.sizes[1]; }

  // Dividing rows saves turning them once per thread, dividing panels saves reading them once per thread.
  static int64_t num_row_parts(int64_t num_rows, int64_t num_threads) {
    int64_t parts = num_threads;
    while (parts > 1 && (num_threads % parts != 0 || num_rows / parts < kRowsPerThread)) --parts;
    return parts;
  }

  void multiply(Range rows, Range panels, Scratch& scratch) const {
    const int64_t num_passes = divide_up(rows.size(), kMaxRows);
    for (int64_t pass = 0; pass < num_passes; ++pass) pass_rows(rows.part(pass, num_passes), panels, scratch);
  }

  // Leads up to kMaxRows rows past the panels.
  void pass_rows(Range rows, Range panels, Scratch& scratch) const {
    const int64_t num_blocks = divide_up(rows.size(), kBlockRows);
    int64_t max_depth = kMaxActivations / rows.size();
    if (num_blocks > 1) max_depth = std::min(max_depth, kMaxReusedDepth);
    const int64_t num_chunks = std::max<int64_t>(1, divide_up(in_features(), max_depth));
    const int64_t num_groups = num_chunks == 1 ? 1 : divide_up(panels.size(), kPanelsPerGroup);
    const int64_t at_once = kIsFloat && num_blocks == 1 ? panels_at_once(static_cast<int>(rows.size())) : 1;
    const int64_t sums_per_panel = rows.size() * kPanelWidth;
    for (int64_t g = 0; g < num_groups; ++g) {
      const Range group = panels.part(g, num_groups);
      float* sums = Scratch::grown(scratch.sums, (num_chunks == 1 ? at_once : group.size()) * sums_per_panel);
      for (int64_t c = 0; c < num_chunks; ++c) {
        const Pass pass{rows, num_blocks, Range{0, in_features()}.part(c, num_chunks), c == num_chunks - 1};
        pack(pass, scratch);
        // Panels met at once are one from each run of neighbours: every run is a stream through memory without a jump.
        const int64_t run = group.size() / at_once, in_runs = run * at_once;
        const auto waiting = [&](int64_t num_before) { return sums + (num_chunks == 1 ? 0 : num_before * sums_per_panel); };
        for (int64_t i = 0; i < run; ++i) multiply(pass, {group.begin + i, run, at_once}, waiting(i * at_once), scratch);
        for (int64_t i = in_runs; i < group.size(); ++i) multiply(pass, {group.begin + i, 0, 1}, waiting(i), scratch);
      }
    }
  }

  // What panels meet: these rows in so many blocks, and this chunk of their in features, which may be the last one.
  struct Pass {
    Range rows;
    int64_t num_blocks;
    Range chunk;
    bool is_last;
  };

  void pack(const Pass& pass, Scratch& scratch) const {
    const int64_t depth = pass.chunk.size();
    float* to = Scratch::grown(scratch.activations, pass.rows.size() * depth + kLanes);
    for (int64_t b = 0; b < pass.num_blocks; ++b) {
      const Range block = pass.rows.part(b, pass.num_blocks);
      pack_rows(x_.at(block.begin, pass.chunk.begin), x_.strides[0], static_cast<int>(block.size()), depth, to);
      to += block.size() * depth;
    }
  }

  // Panels first, first + step, ...
  struct Selection {
    int64_t first, step, count;
  };

  void multiply(const Pass& pass, Selection panels, float* sums, Scratch& scratch) const {
    const T* panel = panels_.at(panels.first, pass.chunk.begin);
    if constexpr (kIsFloat) {
      if (pass.num_blocks == 1) return multiply_once(pass, panels, sums, scratch);
      multiply_blocks(pass, panels.first, panel, sums, scratch);
    } else {
      // Through the cache, even for one row: turning 16 weights takes two cycles, reading them from memory eight.
      multiply_blocks(pass, panels.first, converted(panel, pass.chunk.size(), scratch), sums, scratch);
    }
  }

  // One block of float32: panels are read once, and fetched a little ahead.
  void multiply_once(const Pass& pass, Selection panels, float* sums, const Scratch& scratch) const {
    const float* weights = panels_.at(panels.first, pass.chunk.begin);
    const int64_t num_rows = pass.rows.size();
    const auto multiply_block = (panels.count == 1 ? kMultiplyOne : kMultiplySeveral)[num_rows - 1];
    const Prefetch prefetch{reinterpret_cast<const char*>(weights) + kPrefetchBytes, lines_per_round(1)};
    multiply_block(scratch.activations.data(), {weights, panels.step * panels_.strides[0]}, pass.chunk.size(),
                   pass.chunk.begin == 0, sums, prefetch);
    if (!pass.is_last) return;
    for (int64_t i = 0; i < panels.count; ++i) {
      finish(sums + i * num_rows * kPanelWidth, pass.rows, panels.first + i * panels.step);
    }
  }

  // Several blocks: each fetches its share of the next panel, and the lines that its results go to.
  void multiply_blocks(const Pass& pass, int64_t p, const float* panel, float* sums, const Scratch& scratch) const {
    const int64_t depth = pass.chunk.size();
    const int64_t chunk_bytes = depth * kPanelWidth * static_cast<int64_t>(sizeof(T));
    const char* next = reinterpret_cast<const char*>(panels_.at(p, pass.chunk.begin) + panels_.strides[0]);
    const float* activations = scratch.activations.data();
    for (int64_t b = 0; b < pass.num_blocks; ++b) {
      const Range block = pass.rows.part(b, pass.num_blocks);
      if (pass.is_last) prefetch_out(block, p);
      const Prefetch prefetch{next + chunk_bytes * b / pass.num_blocks, lines_per_round(pass.num_blocks)};
      kMultiplyOne[block.size() - 1](activations, {panel, 0}, depth, pass.chunk.begin == 0, sums, prefetch);
      if (pass.is_last) finish(sums, block, p);
      activations += block.size() * depth;
      sums += block.size() * kPanelWidth;
    }
  }

  // So that num_blocks blocks together ask for one panel while they read another.
  static int64_t lines_per_round(int64_t num_blocks) {
    return divide_up(kDepthStep * kPanelWidth * static_cast<int64_t>(sizeof(T)), kCacheLineBytes * num_blocks);
  }

  static const float* converted(const T* panel, int64_t depth, Scratch& scratch) {
    float* to = Scratch::grown(scratch.panel, depth * kPanelWidth);
    for (int64_t i = 0; i < depth * kPanelWidth; i += kLanes) store(to + i, load(panel + i));
    return to;
  }

  void prefetch_out(Range rows, int64_t p) const {
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const char* line = reinterpret_cast<const char*>(out_.at(r, p * kPanelWidth));
      for (int64_t byte = 0; byte < kPanelWidth * static_cast<int64_t>(sizeof(T)); byte += kCacheLineBytes) {
        __builtin_prefetch(line + byte, 1);
      }
    }
  }

  // Adds the bias to the sums of some rows and one panel, and stores them.
  void finish(const float* sums, Range rows, int64_t p) const {
    const int64_t first = p * kPanelWidth, count = std::min<int64_t>(kPanelWidth, out_features() - first);
    for (int64_t c = 0; c < count; c += kLanes) {
      const vfloat bias = bias_ == nullptr ? vfloat{} : load_part(bias_ + first + c, count - c);
      for (int64_t r = 0; r < rows.size(); ++r) {
        const vfloat sum = load(sums + r * kPanelWidth + c);
        store_part(out_.at(rows.begin + r, first + c), bias_ == nullptr ? sum : sum + bias, count - c);
      }
    }
  }

  const View<const T> x_, panels_;
  const T* bias_;
  const View<T> out_;
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
  Tensor bias;
  if (bias_O.has_value()) {
    bias = dense_last(*bias_O);
    STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == out_features && bias.scalar_type() == x.scalar_type(),
                    "the bias must be [out_features] in x's dtype");
  }
  Tensor out = empty({x.size(0), out_features}, x.scalar_type());
  with_float_type(x.scalar_type(), "x", [&](auto zero) {
    using T = decltype(zero);
    Product<T>(view<T>(x, 2, "x").template as<const T>(), view<T>(panels_PIL, 3, "panels").template as<const T>(),
               bias_O.has_value() ? view<T>(bias, 1, "bias").data : nullptr, view<T>(out, 2, "out"))
        .run();
  });
  return out;
}

}  // namespace toka
