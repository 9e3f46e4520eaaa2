// `Lanes` and `Pairs` on AVX2 with FMA and F16C: two registers of eight. See simd.h.

#pragma once

#include <immintrin.h>

#include "numbers.h"

namespace quire {
namespace {

struct Lanes {
  __m256 lo, hi;
};

inline Lanes splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Lanes operator+(Lanes a, Lanes b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
inline Lanes operator-(Lanes a, Lanes b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
inline Lanes operator*(Lanes a, Lanes b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
inline Lanes operator/(Lanes a, Lanes b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
inline Lanes reciprocal(Lanes x) { return splat(1.0f) / x; }
inline Lanes max(Lanes a, Lanes b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
inline Lanes min(Lanes a, Lanes b) {
  return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline float first(Lanes x) { return _mm256_cvtss_f32(x.lo); }

inline Lanes round_even(Lanes x) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.lo, kMode), _mm256_round_ps(x.hi, kMode)};
}
inline __m256 scale_by_power_of_two(__m256 x, __m256 n) {
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), bias), 23);
  return _mm256_mul_ps(x, _mm256_castsi256_ps(power));
}
inline Lanes scale_by_power_of_two(Lanes x, Lanes n) {
  return {scale_by_power_of_two(x.lo, n.lo), scale_by_power_of_two(x.hi, n.hi)};
}

inline __m256i lane_numbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
// All ones in lanes below n (which may be negative or above 8).
inline __m256i below(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane_numbers()); }

// Lanes [begin, end) of x; `other` elsewhere. 0 <= begin, end <= 16; empty when begin >= end.
inline Lanes keep(Lanes x, int begin, int end, Lanes other) {
  const auto part = [&](__m256 kept, __m256 rest, int offset) {
    const __m256i mask = _mm256_andnot_si256(below(begin - offset), below(end - offset));
    return _mm256_blendv_ps(rest, kept, _mm256_castsi256_ps(mask));
  };
  return {part(x.lo, other.lo, 0), part(x.hi, other.hi, 8)};
}

inline Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Lanes load_partial(const float* p, int n) {
  return {_mm256_maskload_ps(p, below(n)), _mm256_maskload_ps(p + 8, below(n - 8))};
}
inline void store(float* p, Lanes x) {
  _mm256_storeu_ps(p, x.lo);
  _mm256_storeu_ps(p + 8, x.hi);
}
inline void store_partial(float* p, Lanes x, int n) {
  _mm256_maskstore_ps(p, below(n), x.lo);
  _mm256_maskstore_ps(p + 8, below(n - 8), x.hi);
}

inline __m256 widen_bf16(__m128i x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
inline __m256i narrow_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
}

inline Lanes load(const BFloat16* p) {
  const auto* q = reinterpret_cast<const __m128i*>(p);
  return {widen_bf16(_mm_loadu_si128(q)), widen_bf16(_mm_loadu_si128(q + 1))};
}
inline void store(BFloat16* p, Lanes x) {
  // packus works within 128-bit halves; the permute puts the quarters back in order.
  const __m256i packed = _mm256_packus_epi32(narrow_bf16(x.lo), narrow_bf16(x.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
inline Lanes load(const Half* p) {
  const auto* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
inline void store(Half* p, Lanes x) {
  auto* q = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(q, _mm256_cvtps_ph(x.lo, 0));
  _mm_storeu_si128(q + 1, _mm256_cvtps_ph(x.hi, 0));
}
// AVX2 has no masked access to 16-bit elements: go through a copy.
template <class T>
Lanes load_partial(const T* p, int n) {
  T copy[16] = {};
  std::memcpy(copy, p, n * sizeof(T));
  return load(copy);
}
template <class T>
void store_partial(T* p, Lanes x, int n) {
  T copy[16];
  store(copy, x);
  std::memcpy(p, copy, n * sizeof(T));
}

// Folds in halves: 16 -> 8 -> 4 -> 2 -> 1, the same order on every instruction set.
template <class Fold>
inline float fold(Lanes x, Fold f) {
  const __m256 half = f(x.lo, x.hi);
  const __m256 quarter = f(half, _mm256_permute2f128_ps(half, half, 1));
  const __m256 eighth = f(quarter, _mm256_permute_ps(quarter, 0x4e));
  return _mm256_cvtss_f32(f(eighth, _mm256_permute_ps(eighth, 0xb1)));
}
inline float sum(Lanes x) {
  return fold(x, [](__m256 a, __m256 b) { return _mm256_add_ps(a, b); });
}
inline float largest(Lanes x) {
  return fold(x, [](__m256 a, __m256 b) { return _mm256_max_ps(a, b); });
}

struct Pairs {
  __m256i lo, hi;
};

inline Pairs load_pairs(const BFloat16* p) {
  const auto* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline Pairs load_pairs_partial(const BFloat16* p, int n) {
  const auto* q = reinterpret_cast<const int*>(p);
  return {_mm256_maskload_epi32(q, below(n)), _mm256_maskload_epi32(q + 8, below(n - 8))};
}
inline Pairs splat_pair(const BFloat16* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return {_mm256_set1_epi32(pair), _mm256_set1_epi32(pair)};
}
inline __m256 dot(__m256i a, __m256i b, __m256 sum) {
  const auto low = [](__m256i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); };
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  const auto high = [&](__m256i x) { return _mm256_castsi256_ps(_mm256_and_si256(x, mask)); };
  return _mm256_fmadd_ps(high(a), high(b), _mm256_fmadd_ps(low(a), low(b), sum));
}
inline Lanes dot(Pairs a, Pairs b, Lanes sum) {
  return {dot(a.lo, b.lo, sum.lo), dot(a.hi, b.hi, sum.hi)};
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

// Rows that one pass of the matmul keeps in registers: 3 x 32 columns = 12 of 16 registers.
constexpr int kGemmRows = 3;
// The same of attention and of quantized matmuls.
constexpr int kPatchRows = 3;

}  // namespace
}  // namespace quire
