// `Words`: sixteen unsigned 32-bit integers beside the sixteen floats of `Lanes`, for the counters
// and bit patterns of sampling. Compiled once per instruction set, like simd.h.

#pragma once

#include "simd.h"

namespace quire {
namespace {

struct Words;
struct Product;

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

struct Words {
  __m512i v;
};

inline Words words(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
inline Words lane_indices() {
  return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
}
inline Words operator+(Words a, Words b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Words operator^(Words a, Words b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline Words operator&(Words a, Words b) { return {_mm512_and_si512(a.v, b.v)}; }
template <int N>
Words shift_right(Words a) {
  return {_mm512_srli_epi32(a.v, N)};
}
template <int N>
Words shift_right_signed(Words a) {
  return {_mm512_srai_epi32(a.v, N)};
}
inline Lanes signed_to_float(Words a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Words float_to_signed(Lanes a) { return {_mm512_cvttps_epi32(a.v)}; }
inline Lanes as_floats(Words a) { return {_mm512_castsi512_ps(a.v)}; }
inline Words as_words(Lanes a) { return {_mm512_castps_si512(a.v)}; }
inline void store(int32_t* p, Words a) { _mm512_storeu_si512(p, a.v); }

struct Product {
  Words high, low;
};

inline Product multiply(Words a, uint32_t b) {
  const __m512i factor = words(b).v;
  const __m512i even = _mm512_mul_epu32(a.v, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), factor);
  return {{_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd)},
          {_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32))}};
}

// Lane i of a, b, c, d becomes elements 4i .. 4i + 3 of the 64 in `out`.
inline void interleave(Words a, Words b, Words c, Words d, Words out[4]) {
  const __m512i ab_low = _mm512_unpacklo_epi32(a.v, b.v), ab_high = _mm512_unpackhi_epi32(a.v, b.v);
  const __m512i cd_low = _mm512_unpacklo_epi32(c.v, d.v), cd_high = _mm512_unpackhi_epi32(c.v, d.v);
  // Groups of four by lane: {0 4 8 12}, {1 5 9 13}, {2 6 10 14}, {3 7 11 15}.
  const __m512i g0 = _mm512_unpacklo_epi64(ab_low, cd_low);
  const __m512i g1 = _mm512_unpackhi_epi64(ab_low, cd_low);
  const __m512i g2 = _mm512_unpacklo_epi64(ab_high, cd_high);
  const __m512i g3 = _mm512_unpackhi_epi64(ab_high, cd_high);
  const __m512i low01 = _mm512_shuffle_i32x4(g0, g1, 0x44);
  const __m512i low23 = _mm512_shuffle_i32x4(g2, g3, 0x44);
  const __m512i high01 = _mm512_shuffle_i32x4(g0, g1, 0xee);
  const __m512i high23 = _mm512_shuffle_i32x4(g2, g3, 0xee);
  out[0] = {_mm512_shuffle_i32x4(low01, low23, 0x88)};
  out[1] = {_mm512_shuffle_i32x4(low01, low23, 0xdd)};
  out[2] = {_mm512_shuffle_i32x4(high01, high23, 0x88)};
  out[3] = {_mm512_shuffle_i32x4(high01, high23, 0xdd)};
}

// Bit i is set where the comparison holds in lane i; comparisons with NaN do not hold.
inline uint32_t greater(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
inline uint32_t equal(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
// x where a >= b, zero elsewhere.
inline Lanes where_at_least(Lanes x, Lanes a, Lanes b) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ), x.v)};
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

struct Words {
  __m256i lo, hi;
};

inline Words words(uint32_t x) {
  const __m256i v = _mm256_set1_epi32(static_cast<int>(x));
  return {v, v};
}
inline Words lane_indices() {
  return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
          _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)};
}
inline Words operator+(Words a, Words b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
inline Words operator^(Words a, Words b) {
  return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)};
}
inline Words operator&(Words a, Words b) {
  return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)};
}
template <int N>
Words shift_right(Words a) {
  return {_mm256_srli_epi32(a.lo, N), _mm256_srli_epi32(a.hi, N)};
}
template <int N>
Words shift_right_signed(Words a) {
  return {_mm256_srai_epi32(a.lo, N), _mm256_srai_epi32(a.hi, N)};
}
inline Lanes signed_to_float(Words a) {
  return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)};
}
inline Words float_to_signed(Lanes a) {
  return {_mm256_cvttps_epi32(a.lo), _mm256_cvttps_epi32(a.hi)};
}
inline Lanes as_floats(Words a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
inline Words as_words(Lanes a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
inline void store(int32_t* p, Words a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), a.hi);
}

struct Product {
  Words high, low;
};

inline Product multiply(Words a, uint32_t b) {
  const __m256i factor = words(b).lo;
  const auto part = [&](__m256i x, __m256i& high, __m256i& low) {
    const __m256i even = _mm256_mul_epu32(x, factor);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), factor);
    high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  };
  Product p;
  part(a.lo, p.high.lo, p.low.lo);
  part(a.hi, p.high.hi, p.low.hi);
  return p;
}

inline void interleave(__m256i a, __m256i b, __m256i c, __m256i d, Words out[2]) {
  const __m256i ab_low = _mm256_unpacklo_epi32(a, b), ab_high = _mm256_unpackhi_epi32(a, b);
  const __m256i cd_low = _mm256_unpacklo_epi32(c, d), cd_high = _mm256_unpackhi_epi32(c, d);
  // Groups of four by lane: {0 4}, {1 5}, {2 6}, {3 7}.
  const __m256i g0 = _mm256_unpacklo_epi64(ab_low, cd_low);
  const __m256i g1 = _mm256_unpackhi_epi64(ab_low, cd_low);
  const __m256i g2 = _mm256_unpacklo_epi64(ab_high, cd_high);
  const __m256i g3 = _mm256_unpackhi_epi64(ab_high, cd_high);
  out[0] = {_mm256_permute2x128_si256(g0, g1, 0x20), _mm256_permute2x128_si256(g2, g3, 0x20)};
  out[1] = {_mm256_permute2x128_si256(g0, g1, 0x31), _mm256_permute2x128_si256(g2, g3, 0x31)};
}

// Lane i of a, b, c, d becomes elements 4i .. 4i + 3 of the 64 in `out`.
inline void interleave(Words a, Words b, Words c, Words d, Words out[4]) {
  interleave(a.lo, b.lo, c.lo, d.lo, out);
  interleave(a.hi, b.hi, c.hi, d.hi, out + 2);
}

inline uint32_t mask_bits(__m256 lo, __m256 hi) {
  return static_cast<uint32_t>(_mm256_movemask_ps(lo)) |
         static_cast<uint32_t>(_mm256_movemask_ps(hi)) << 8;
}
// Bit i is set where the comparison holds in lane i; comparisons with NaN do not hold.
inline uint32_t greater(Lanes a, Lanes b) {
  return mask_bits(_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ));
}
inline uint32_t equal(Lanes a, Lanes b) {
  return mask_bits(_mm256_cmp_ps(a.lo, b.lo, _CMP_EQ_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_EQ_OQ));
}
// x where a >= b, zero elsewhere.
inline Lanes where_at_least(Lanes x, Lanes a, Lanes b) {
  return {_mm256_and_ps(x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ)),
          _mm256_and_ps(x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ))};
}

#else

struct Words {
  Words16 v;
};

inline Words words(uint32_t x) { return {Words16{} + x}; }
inline Words lane_indices() { return {(Words16)lane_numbers()}; }
inline Words operator+(Words a, Words b) { return {a.v + b.v}; }
inline Words operator^(Words a, Words b) { return {a.v ^ b.v}; }
inline Words operator&(Words a, Words b) { return {a.v & b.v}; }
template <int N>
Words shift_right(Words a) {
  return {a.v >> N};
}
template <int N>
Words shift_right_signed(Words a) {
  return {(Words16)((Ints16)a.v >> N)};
}
inline Lanes signed_to_float(Words a) {
  return {__builtin_convertvector((Ints16)a.v, Floats16)};
}
inline Words float_to_signed(Lanes a) {
  return {(Words16)__builtin_convertvector(a.v, Ints16)};
}
inline Lanes as_floats(Words a) { return {(Floats16)a.v}; }
inline Words as_words(Lanes a) { return {(Words16)a.v}; }
inline void store(int32_t* p, Words a) { std::memcpy(p, &a.v, sizeof a.v); }

struct Product {
  Words high, low;
};

inline Product multiply(Words a, uint32_t b) {
  Product p;
  for (int i = 0; i < 16; ++i) {
    const uint64_t product = uint64_t{a.v[i]} * b;
    p.high.v[i] = static_cast<uint32_t>(product >> 32);
    p.low.v[i] = static_cast<uint32_t>(product);
  }
  return p;
}

// Lane i of a, b, c, d becomes elements 4i .. 4i + 3 of the 64 in `out`.
inline void interleave(Words a, Words b, Words c, Words d, Words out[4]) {
  for (int i = 0; i < 16; ++i) {
    Words& to = out[i / 4];
    const int at = i % 4 * 4;
    to.v[at] = a.v[i];
    to.v[at + 1] = b.v[i];
    to.v[at + 2] = c.v[i];
    to.v[at + 3] = d.v[i];
  }
}

inline uint32_t mask_bits(Ints16 mask) {
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
}
// Bit i is set where the comparison holds in lane i; comparisons with NaN do not hold.
inline uint32_t greater(Lanes a, Lanes b) { return mask_bits(a.v > b.v); }
inline uint32_t equal(Lanes a, Lanes b) { return mask_bits(a.v == b.v); }
// x where a >= b, zero elsewhere.
inline Lanes where_at_least(Lanes x, Lanes a, Lanes b) {
  return {select(a.v >= b.v, x.v, Floats16{})};
}

#endif

// log(x) within 2 ulp for normal positive x. Cephes' logf (S. Moshier): x = 2^e (1 + f), 1 + f in
// [sqrt(1/2), sqrt(2)), a polynomial in f.
inline Lanes log(Lanes x) {
  constexpr uint32_t kSqrtHalf = 0x3f3504f3;
  const Words offset = as_words(x) + words(0u - kSqrtHalf);
  const Lanes e = signed_to_float(shift_right_signed<23>(offset));
  const Lanes f = as_floats((offset & words(0x007fffff)) + words(kSqrtHalf)) - splat(1.0f);
  const Lanes square = f * f;
  Lanes p = fma(splat(7.0376836292e-2f), f, splat(-1.1514610310e-1f));
  p = fma(p, f, splat(1.1676998740e-1f));
  p = fma(p, f, splat(-1.2420140846e-1f));
  p = fma(p, f, splat(1.4249322787e-1f));
  p = fma(p, f, splat(-1.6668057665e-1f));
  p = fma(p, f, splat(2.0000714765e-1f));
  p = fma(p, f, splat(-2.4999993993e-1f));
  p = fma(p, f, splat(3.3333331174e-1f));
  Lanes y = p * (f * square);
  y = fma(e, splat(-2.12194440e-4f), y);
  y = fma(splat(-0.5f), square, y);
  return fma(e, splat(0.693359375f), f + y);
}

}  // namespace
}  // namespace quire
