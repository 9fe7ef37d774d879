// One vector of floats as wide as the CPU has, on GCC/Clang vector extensions; intrinsics only where the extensions have no word.
// Everything is lane-wise except the reductions, whose order is fixed, so that results don't depend on how work is cut.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace toka {

using bfloat16 = c10::BFloat16;
using float16 = c10::Half;

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vfloat __attribute__((vector_size(kLanes * 4)));
typedef int32_t vint __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vuint __attribute__((vector_size(kLanes * 4)));

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kCacheLineBytes = 64;

inline vfloat broadcast(float x) { return x - vfloat{}; }  // x - 0 keeps the sign of zero

inline vfloat load(const float* p) {
  vfloat v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline void store(float* p, vfloat v) { std::memcpy(p, &v, sizeof(v)); }

inline vfloat load(const bfloat16* p) {
#if defined(__AVX512F__)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (vfloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
#else
  typedef uint16_t half_width __attribute__((vector_size(kLanes * 2)));
  half_width bits;
  std::memcpy(&bits, p, sizeof(bits));
  return (vfloat)(__builtin_convertvector(bits, vuint) << 16);
#endif
}

inline vfloat load(const float16* p) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__) && defined(__F16C__)
  return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__ARM_NEON)
  return (vfloat)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
#else
  vfloat v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(p[i]);
  return v;
#endif
}

// Stores round to the nearest, ties to even.
inline void store(bfloat16* p, vfloat v) {
  const vuint bits = (vuint)v;
  const vuint rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const vuint chosen = v == v ? rounded : (bits >> 16) | 0x40;  // a NaN stays one: rounding could carry into its exponent
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)chosen));
#else
  typedef uint16_t half_width __attribute__((vector_size(kLanes * 2)));
  const half_width halves = __builtin_convertvector(chosen, half_width);
  std::memcpy(p, &halves, sizeof(halves));
#endif
}

inline void store(float16* p, vfloat v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__ARM_NEON)
  vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<float16>(v[i]);
#endif
}

// The first `count` lanes of a vector, zeros behind them; count may exceed kLanes.
template <typename T>
inline vfloat load_part(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
  T lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
}

// Stores the first `count` lanes; count may exceed kLanes.
template <typename T>
inline void store_part(T* p, vfloat v, int64_t count) {
  if (count >= kLanes) return store(p, v);
  T lanes[kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

// x as it is, hidden from the compiler, so that a product given to it is rounded before what follows and never fused into an FMA.
inline vfloat rounded(vfloat x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

// a * b + c, rounded once where the CPU can.
inline vfloat fma(vfloat a, vfloat b, vfloat c) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  return (vfloat)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

inline vfloat max(vfloat a, vfloat b) { return a > b ? a : b; }

inline float max_of(vfloat v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
#endif
}

inline float sum_of(vfloat v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// e**x for x <= 0, relative error below 2e-7; 0 below -87.3 (also for -inf), exactly 1 at 0, NaN for NaN.
// Cody-Waite reduction to |r| <= ln(2)/2, the Taylor polynomial of degree 7 (error r**8 / 8! < 6e-9), a shift of the exponent.
inline vfloat exp(vfloat x) {
  const vfloat lowest = broadcast(-87.33654f);
  const vfloat y = x < lowest ? lowest : x;
  const vfloat to_integer = broadcast(12582912.0f);  // 1.5 * 2**23: adding it leaves the nearest integer in the low bits
  const vfloat shifted = fma(y, broadcast(1.44269504f), to_integer);
  const vfloat n = shifted - to_integer;
  vfloat r = fma(n, broadcast(-0.693359375f), y);  // ln(2) in two parts, the first exact in few bits
  r = fma(n, broadcast(2.12194440e-4f), r);
  vfloat p = broadcast(1.0f / 5040);
  p = fma(p, r, broadcast(1.0f / 720));
  p = fma(p, r, broadcast(1.0f / 120));
  p = fma(p, r, broadcast(1.0f / 24));
  p = fma(p, r, broadcast(1.0f / 6));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  const vint exponent = (vint)shifted - (vint)to_integer;
  const vfloat power = (vfloat)((exponent + 127) << 23);
  return x < lowest ? vfloat{} : p * power;
}

// Lane i of the result is i.
inline vint lane_numbers() {
  vint v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// For the pair of rows (a, b) that stand Half apart: swap the upper half of each group of a with the lower half of b's.
template <int Half, std::size_t... Lane>
inline void swap_halves(vfloat& a, vfloat& b, std::index_sequence<Lane...>) {
  const vfloat low = __builtin_shufflevector(a, b, ((Lane & Half) ? kLanes + Lane - Half : Lane)...);
  const vfloat high = __builtin_shufflevector(a, b, ((Lane & Half) ? kLanes + Lane : Lane + Half)...);
  a = low;
  b = high;
}

// Transposes a square of kLanes vectors in log2(kLanes) rounds.
template <int Half = kLanes / 2>
inline void transpose(vfloat (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (!(i & Half)) swap_halves<Half>(rows[i], rows[i + Half], std::make_index_sequence<kLanes>());
  }
  if constexpr (Half > 1) transpose<Half / 2>(rows);
}

}  // namespace toka
