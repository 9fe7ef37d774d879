// Panels of a quantised weight: kPanelWidth out features, group of in features after group, so that a product reads one stream.
//
//   group := codes, scales, [minimums]      weight[o, i] = scale[o, group of i] * code[o, i] + minimum[o, group of i]
//
// Codes lie in quads of four in features, as the dot product instructions want them: [quad][out feature][4 codes] of 8 bits, or
// [pair of quads][out feature][4 bytes] of 4 bits, whose low halves are the first quad's codes and whose high halves the second's. A weight
// of one group (a scale for a whole row) has float32 scales and is padded with zero codes to whole pairs of quads; else they are float16.
// Without minimums the codes are symmetric: minimum = -zero_code * scale.
#pragma once

#include "linear_packed.h"
#include "tensors.h"

namespace toka {

constexpr int64_t kQuad = 4;  // as QUAD in op_schema.py
constexpr int64_t kPairOfQuads = 2 * kQuad;

struct PanelShape {
  int64_t in_features, num_groups, bits;
  bool has_minimums;

  int64_t group_size() const { return in_features / num_groups; }
  int64_t padded_group_size() const { return (group_size() + kPairOfQuads - 1) / kPairOfQuads * kPairOfQuads; }
  int64_t quads_per_group() const { return padded_group_size() / kQuad; }
  int64_t scale_bytes() const { return num_groups == 1 ? 4 : 2; }
  int64_t code_bytes() const { return padded_group_size() * kPanelWidth * bits / 8; }
  int64_t scales_bytes() const { return kPanelWidth * scale_bytes(); }
  int64_t group_bytes() const { return code_bytes() + scales_bytes() * (has_minimums ? 2 : 1); }
  int64_t panel_bytes() const { return num_groups * group_bytes(); }
  int64_t zero_code() const { return int64_t{1} << (bits - 1); }

  void check() const {
    STD_TORCH_CHECK(bits == 4 || bits == 8, "weights of ", bits, " bits are unknown to these kernels");
    STD_TORCH_CHECK(num_groups >= 1 && in_features % num_groups == 0, in_features, " in features don't divide into ", num_groups, " groups");
    STD_TORCH_CHECK(num_groups == 1 || group_size() % kPairOfQuads == 0, "groups of ", group_size(), " in features are no multiple of ",
                    kPairOfQuads);
  }
};

inline int64_t num_panels_of(int64_t out_features) { return (out_features + kPanelWidth - 1) / kPanelWidth; }

// Where the code of (quad-wise) in feature `i` of a group and out feature `lane` lies: byte, and for 4 bits whether in its high half.
template <int Bits>
inline int64_t code_byte(int64_t i, int64_t lane) {
  const int64_t quad = i / kQuad;
  return ((Bits == 8 ? quad : quad / 2) * kPanelWidth + lane) * kQuad + i % kQuad;
}

template <int Bits>
inline int code_at(const uint8_t* codes, int64_t i, int64_t lane) {
  const uint8_t byte = codes[code_byte<Bits>(i, lane)];
  return Bits == 8 ? byte : (i / kQuad % 2 == 0 ? byte & 15 : byte >> 4);
}

// sums + the dot product of four unsigned codes in each lane of `codes` with four signed ones, the bytes of `activations`.
inline vint add_dot(vint sums, vuint codes, int32_t activations) {
#if defined(__AVX512VNNI__)
  return (vint)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32(activations));
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
  return (vint)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)codes, _mm256_set1_epi32(activations));
#elif defined(__AVX512BW__)
  // By pairs of 16 bits: the shorter _mm512_maddubs_epi16 saturates.
  const __m512i all = _mm512_set1_epi32(activations), low = _mm512_set1_epi16(0x00FF);
  const __m512i even = _mm512_madd_epi16(_mm512_and_si512((__m512i)codes, low), _mm512_srai_epi16(_mm512_slli_epi16(all, 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16((__m512i)codes, 8), _mm512_srai_epi16(all, 8));
  return sums + (vint)even + (vint)odd;
#elif defined(__AVX2__)
  const __m256i all = _mm256_set1_epi32(activations), low = _mm256_set1_epi16(0x00FF);
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256((__m256i)codes, low), _mm256_srai_epi16(_mm256_slli_epi16(all, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16((__m256i)codes, 8), _mm256_srai_epi16(all, 8));
  return sums + (vint)even + (vint)odd;
#else
  for (int byte = 0; byte < 4; ++byte) {
    sums += (vint)((codes >> (8 * byte)) & 0xFF) * static_cast<int32_t>(static_cast<int8_t>(activations >> (8 * byte)));
  }
  return sums;
#endif
}

inline vuint load_codes(const uint8_t* p) {
  vuint v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline vfloat to_float(vint v) { return __builtin_convertvector(v, vfloat); }

}  // namespace toka
