// `Lanes` and `Pairs` on AVX-512 (F, BW, VL, DQ; BF16 where the target has it). See simd.h.

#pragma once

#include <immintrin.h>

#include "numbers.h"

namespace quire {
namespace {

struct Lanes {
  __m512 v;
};

inline Lanes splat(float x) { return {_mm512_set1_ps(x)}; }
inline Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes operator/(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
// Within 2^-23 or so; x finite and not 0.
inline Lanes reciprocal(Lanes x) {
  const __m512 guess = _mm512_rcp14_ps(x.v);
  return {_mm512_mul_ps(guess, _mm512_fnmadd_ps(x.v, guess, _mm512_set1_ps(2.0f)))};
}
inline Lanes max(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Lanes min(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline float first(Lanes x) { return _mm512_cvtss_f32(x.v); }

inline Lanes round_even(Lanes x) {
  return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Lanes scale_by_power_of_two(Lanes x, Lanes n) { return {_mm512_scalef_ps(x.v, n.v)}; }

// Lanes [begin, end) of x; `other` elsewhere. 0 <= begin, end <= 16; empty when begin >= end.
inline Lanes keep(Lanes x, int begin, int end, Lanes other) {
  const auto mask = static_cast<__mmask16>(((1u << end) - 1u) & ~((1u << begin) - 1u));
  return {_mm512_mask_blend_ps(mask, other.v, x.v)};
}

inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Lanes load_partial(const float* p, int n) {
  return {_mm512_maskz_loadu_ps(first_lanes(n), p)};
}
inline void store(float* p, Lanes x) { _mm512_storeu_ps(p, x.v); }
inline void store_partial(float* p, Lanes x, int n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), x.v);
}

inline __m512 widen_bf16(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
inline __m256i narrow_bf16(__m512 x) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16));
#endif
}

inline Lanes load(const BFloat16* p) {
  return {widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Lanes load_partial(const BFloat16* p, int n) {
  return {widen_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p))};
}
inline void store(BFloat16* p, Lanes x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(x.v));
}
inline void store_partial(BFloat16* p, Lanes x, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), narrow_bf16(x.v));
}

inline Lanes load(const Half* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Lanes load_partial(const Half* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p))};
}
inline void store(Half* p, Lanes x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, 0));
}
inline void store_partial(Half* p, Lanes x, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph(x.v, 0));
}

// Folds in halves: 16 -> 8 -> 4 -> 2 -> 1, the same order on every instruction set.
template <class Fold>
inline float fold(Lanes x, Fold f) {
  const __m512 v = x.v;
  const Lanes half = f(x, Lanes{_mm512_shuffle_f32x4(v, v, 0x4e)});
  const Lanes quarter = f(half, Lanes{_mm512_shuffle_f32x4(half.v, half.v, 0xb1)});
  const Lanes eighth = f(quarter, Lanes{_mm512_permute_ps(quarter.v, 0x4e)});
  return first(f(eighth, Lanes{_mm512_permute_ps(eighth.v, 0xb1)}));
}
inline float sum(Lanes x) {
  return fold(x, [](Lanes a, Lanes b) { return a + b; });
}
inline float largest(Lanes x) {
  return fold(x, [](Lanes a, Lanes b) { return max(a, b); });
}

struct Pairs {
  __m512i v;
};

inline Pairs load_pairs(const BFloat16* p) { return {_mm512_loadu_si512(p)}; }
inline Pairs load_pairs_partial(const BFloat16* p, int n) {
  return {_mm512_maskz_loadu_epi32(first_lanes(n), p)};
}
inline Pairs splat_pair(const BFloat16* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return {_mm512_set1_epi32(pair)};
}
inline Lanes dot(Pairs a, Pairs b, Lanes sum) {
#if defined(__AVX512BF16__)
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
#else
  const auto low = [](__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); };
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const auto high = [&](__m512i x) { return _mm512_castsi512_ps(_mm512_and_si512(x, mask)); };
  return {_mm512_fmadd_ps(high(a.v), high(b.v), _mm512_fmadd_ps(low(a.v), low(b.v), sum.v))};
#endif
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

// Rows that one pass of the matmul keeps in registers: 11 x 32 columns = 22 of 32 registers.
constexpr int kGemmRows = 11;
// The same of attention and of quantized matmuls, which need registers for more than sums.
constexpr int kPatchRows = 8;

}  // namespace
}  // namespace quire
