// A product with float32 arithmetic over panels of any storage: the loops of linear_packed.cpp and linear_quantised.cpp.
//
// A thread takes a rectangle of rows and panels. It turns up to kMaxRows rows into float32 blocks that stay in the L2 cache, and
// leads them past one panel after another, so that a panel is read from memory once for all of them; meanwhile the next panel is
// fetched. Long rows are cut into chunks, so that activations and panel fit the cache together; the sums wait in between.
#pragma once

#include <array>
#include <vector>

#include "product.h"

namespace toka {

constexpr int64_t kMaxRows = 20 * kBlockRows;             // rows that pass a panel together
constexpr int64_t kMaxActivations = kMaxRows * 704;     // of those rows, held at once; 770 KiB with AVX-512
constexpr int64_t kMaxReusedDepth = 2048;                // of a panel that several blocks read: 256 KiB
constexpr int64_t kPanelsPerGroup = 16;                  // whose sums wait while rows are cut into chunks
constexpr int64_t kRowsPerThread = 2 * kBlockRows;       // with fewer rows a thread, threads share rows and divide panels
constexpr int64_t kMaxConvertedDepth = 128;              // of a panel that one block reads: 16 KiB, in the L1 cache
constexpr int64_t kPrefetchBytes = 8192;                 // ahead of a panel that is read once

// Memory of a thread, kept from call to call; at most about 2 MiB.
struct FloatScratch {
  std::vector<float> rows;         // that are not plain, in float32
  std::vector<float> activations;  // blocks one after another, each [depth, its rows]
  std::vector<float> panel;        // a panel of another storage in float32
  std::vector<float> sums;         // [panels of the group, rows, kPanelWidth]

  static float* grown(std::vector<float>& memory, int64_t size) {
    if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
    return memory.data();
  }
};

using MultiplyFloats = void (*)(const float*, Panels, int64_t, bool, float*, Prefetch);

// multiply_block of each height with one panel, and with panels_at_once; [0] is one row. In float_blocks.cpp.
extern const std::array<MultiplyFloats, kBlockRows> kMultiplyOne, kMultiplySeveral;

// T: of activations and results. Panels tells how weights are stored:
//
//   in_features(), num_panels()
//   granule()          chunks begin at multiples of so many in features
//   at(p, k)           where in feature k of panel p begins, as const char*, for prefetching; num_bytes(depth): of so many in features
//   kIsFloat           whether panels are float32 as multiply_block wants them; then values(p, k) and stride(), in floats. If not:
//   convert(p, chunk, to)   the chunk's in features of panel p in float32, [depth, kPanelWidth]
template <typename T, typename Panels>
class FloatProduct {
 public:
  FloatProduct(const ProductInput<T>& in, Panels panels, const ProductOut<T>& out) : in_(in), panels_(panels), out_(out) {}

  void run() const {
    const Range rows{0, in_.num_rows()}, panels{0, panels_.num_panels()};
    share_product(rows, panels, kPanelWidth * in_features(), kRowsPerThread, [&](Range own_rows, Range own_panels) {
      thread_local FloatScratch scratch;
      multiply(own_rows, own_panels, scratch);
    });
  }

 private:
  int64_t in_features() const { return panels_.in_features(); }

  // Part `i` of `count` of a panel's in features.
  Range chunk_of(int64_t i, int64_t count) const {
    const Range granules = Range{0, divide_up(in_features(), panels_.granule())}.part(i, count);
    return {granules.begin * panels_.granule(), std::min(granules.end * panels_.granule(), in_features())};
  }

  void multiply(Range rows, Range panels, FloatScratch& scratch) const {
    const int64_t num_passes = divide_up(rows.size(), kMaxRows);
    for (int64_t pass = 0; pass < num_passes; ++pass) pass_rows(rows.part(pass, num_passes), panels, scratch);
  }

  // Leads up to kMaxRows rows past the panels.
  void pass_rows(Range rows, Range panels, FloatScratch& scratch) const {
    const int64_t num_blocks = divide_up(rows.size(), kBlockRows);
    int64_t max_depth = kMaxActivations / rows.size();
    if (num_blocks > 1) max_depth = std::min(max_depth, kMaxReusedDepth);
    const int64_t num_chunks = std::max<int64_t>(1, divide_up(in_features(), max_depth));
    const int64_t num_groups = num_chunks == 1 ? 1 : divide_up(panels.size(), kPanelsPerGroup);
    const int64_t at_once = Panels::kIsFloat && num_blocks == 1 ? panels_at_once(static_cast<int>(rows.size())) : 1;
    const int64_t sums_per_panel = rows.size() * kPanelWidth;
    if (!in_.is_plain()) in_.prepare(rows, FloatScratch::grown(scratch.rows, rows.size() * in_features()));
    for (int64_t g = 0; g < num_groups; ++g) {
      const Range group = panels.part(g, num_groups);
      float* sums = FloatScratch::grown(scratch.sums, (num_chunks == 1 ? at_once : group.size()) * sums_per_panel);
      for (int64_t c = 0; c < num_chunks; ++c) {
        const Pass pass{rows, num_blocks, chunk_of(c, num_chunks), c == num_chunks - 1};
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

  void pack(const Pass& pass, FloatScratch& scratch) const {
    const int64_t depth = pass.chunk.size();
    float* to = FloatScratch::grown(scratch.activations, pass.rows.size() * depth + kLanes);
    for (int64_t b = 0; b < pass.num_blocks; ++b) {
      const Range block = pass.rows.part(b, pass.num_blocks);
      const int num_rows = static_cast<int>(block.size());
      if (in_.is_plain()) {
        pack_rows(in_.at(block.begin, pass.chunk.begin), in_.stride(), num_rows, depth, to);
      } else {
        const int64_t before = (block.begin - pass.rows.begin) * in_features() + pass.chunk.begin;
        pack_rows(scratch.rows.data() + before, in_features(), num_rows, depth, to);
      }
      to += block.size() * depth;
    }
  }

  // Panels first, first + step, ...
  struct Selection {
    int64_t first, step, count;
  };

  void multiply(const Pass& pass, Selection panels, float* sums, FloatScratch& scratch) const {
    if constexpr (Panels::kIsFloat) {
      if (pass.num_blocks == 1) return multiply_once(pass, panels, sums, scratch);
      multiply_blocks(pass, panels.first, panels_.values(panels.first, pass.chunk.begin), sums, scratch);
    } else {
      if (pass.num_blocks == 1) return multiply_converted(pass, panels.first, sums, scratch);
      float* panel = FloatScratch::grown(scratch.panel, pass.chunk.size() * kPanelWidth);
      panels_.convert(panels.first, pass.chunk, panel);
      multiply_blocks(pass, panels.first, panel, sums, scratch);
    }
  }

  // One block of float32: panels are read once, and fetched a little ahead.
  void multiply_once(const Pass& pass, Selection panels, float* sums, const FloatScratch& scratch) const {
    const int64_t num_rows = pass.rows.size();
    const auto multiply_block = (panels.count == 1 ? kMultiplyOne : kMultiplySeveral)[num_rows - 1];
    const Prefetch prefetch{panels_.at(panels.first, pass.chunk.begin) + kPrefetchBytes, lines_per_round(1)};
    multiply_block(scratch.activations.data(), {panels_.values(panels.first, pass.chunk.begin), panels.step * panels_.stride()},
                   pass.chunk.size(), pass.chunk.begin == 0, sums, prefetch);
    if (!pass.is_last) return;
    for (int64_t i = 0; i < panels.count; ++i) {
      out_.store_panel(sums + i * num_rows * kPanelWidth, pass.rows, panels.first + i * panels.step);
    }
  }

  // One block of another storage: piece by piece through the L1 cache, even for one row. Turning 16 weights takes two cycles, reading
  // them from memory four (8 bits) or eight (16 bits).
  void multiply_converted(const Pass& pass, int64_t p, float* sums, FloatScratch& scratch) const {
    const int64_t num_rows = pass.rows.size(), granule = panels_.granule();
    const int64_t max_depth = std::max<int64_t>(1, kMaxConvertedDepth / granule) * granule;
    float* piece = FloatScratch::grown(scratch.panel, max_depth * kPanelWidth);
    for (int64_t k = pass.chunk.begin; k < pass.chunk.end; k += max_depth) {
      const Range range{k, std::min(k + max_depth, pass.chunk.end)};
      panels_.convert(p, range, piece);
      const Prefetch prefetch{panels_.at(p, k) + kPrefetchBytes, lines_per_round(1)};
      kMultiplyOne[num_rows - 1](scratch.activations.data() + (k - pass.chunk.begin) * num_rows, {piece, 0}, range.size(), k == 0, sums,
                                 prefetch);
    }
    if (pass.is_last) out_.store_panel(sums, pass.rows, p);
  }

  // Several blocks: each fetches its share of the next panel, and the lines that its results go to.
  void multiply_blocks(const Pass& pass, int64_t p, const float* panel, float* sums, const FloatScratch& scratch) const {
    const int64_t depth = pass.chunk.size(), chunk_bytes = panels_.num_bytes(depth);
    const char* next = panels_.at(p + 1, pass.chunk.begin);
    const float* activations = scratch.activations.data();
    for (int64_t b = 0; b < pass.num_blocks; ++b) {
      const Range block = pass.rows.part(b, pass.num_blocks);
      if (pass.is_last) out_.prefetch_panel(block, p);
      const Prefetch prefetch{next + chunk_bytes * b / pass.num_blocks, lines_per_round(pass.num_blocks)};
      kMultiplyOne[block.size() - 1](activations, {panel, 0}, depth, pass.chunk.begin == 0, sums, prefetch);
      if (pass.is_last) out_.store_panel(sums, block, p);
      activations += block.size() * depth;
      sums += block.size() * kPanelWidth;
    }
  }

  // So that num_blocks blocks together ask for one panel while they read another.
  int64_t lines_per_round(int64_t num_blocks) const { return divide_up(panels_.num_bytes(kDepthStep), kCacheLineBytes * num_blocks); }

  const ProductInput<T>& in_;
  const Panels panels_;
  const ProductOut<T>& out_;
};

}  // namespace toka
