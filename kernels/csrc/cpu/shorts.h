// `Shorts`: thirty-two signed 16-bit integers as sixteen pairs, beside the sixteen `Words`; `dot` adds
// both products of each pair to its lane. Integer sums are exact, so their order is free and every
// instruction set gets the same bits. Compiled once per instruction set, like simd.h.

#pragma once

#include "words.h"

namespace quire {
namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

struct Shorts {
  __m512i v;
};

inline Shorts load_shorts(const void* p) { return {_mm512_loadu_si512(p)}; }
inline Shorts splat_pair(const int16_t* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return {_mm512_set1_epi32(pair)};
}
inline Shorts operator-(Shorts a, Shorts b) { return {_mm512_sub_epi16(a.v, b.v)}; }
// Bits [LOW, LOW + COUNT) of each short, sign-extended.
template <int LOW, int COUNT>
Shorts signed_bits(Shorts a) {
  const __m512i top = LOW + COUNT < 16 ? _mm512_slli_epi16(a.v, 16 - LOW - COUNT) : a.v;
  return {_mm512_srai_epi16(top, 16 - COUNT)};
}
inline Words dot(Shorts a, Shorts b, Words sum) {
#if defined(__AVX512VNNI__)
  return {_mm512_dpwssd_epi32(sum.v, a.v, b.v)};
#else
  return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(a.v, b.v))};
#endif
}
// Each lane as a short, saturated.
inline void store_shorts(int16_t* p, Words a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(a.v));
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

struct Shorts {
  __m256i lo, hi;
};

inline Shorts load_shorts(const void* p) {
  const auto* from = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
}
inline Shorts splat_pair(const int16_t* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  const __m256i v = _mm256_set1_epi32(pair);
  return {v, v};
}
inline Shorts operator-(Shorts a, Shorts b) {
  return {_mm256_sub_epi16(a.lo, b.lo), _mm256_sub_epi16(a.hi, b.hi)};
}
template <int LOW, int COUNT>
Shorts signed_bits(Shorts a) {
  const auto part = [](__m256i x) {
    const __m256i top = LOW + COUNT < 16 ? _mm256_slli_epi16(x, 16 - LOW - COUNT) : x;
    return _mm256_srai_epi16(top, 16 - COUNT);
  };
  return {part(a.lo), part(a.hi)};
}
inline Words dot(Shorts a, Shorts b, Words sum) {
  return {_mm256_add_epi32(sum.lo, _mm256_madd_epi16(a.lo, b.lo)),
          _mm256_add_epi32(sum.hi, _mm256_madd_epi16(a.hi, b.hi))};
}
inline void store_shorts(int16_t* p, Words a) {
  const __m256i packed = _mm256_packs_epi32(a.lo, a.hi);  // quarters 0 2 1 3
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}

#else

using SignedShorts32 = int16_t __attribute__((vector_size(64)));

struct Shorts {
  SignedShorts32 v;
};

inline Shorts load_shorts(const void* p) { return {load_vector<SignedShorts32>(p)}; }
inline Shorts splat_pair(const int16_t* p) {
  uint32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return {(SignedShorts32)(Words16{} + pair)};
}
inline Shorts operator-(Shorts a, Shorts b) { return {a.v - b.v}; }
template <int LOW, int COUNT>
Shorts signed_bits(Shorts a) {
  return {(a.v << (16 - LOW - COUNT)) >> (16 - COUNT)};
}
inline Words dot(Shorts a, Shorts b, Words sum) {
  const auto low = [](Shorts x) { return ((Ints16)x.v << 16) >> 16; };
  const auto high = [](Shorts x) { return (Ints16)x.v >> 16; };
  return {sum.v + (Words16)(low(a) * low(b) + high(a) * high(b))};
}
inline void store_shorts(int16_t* p, Words a) {
  for (int i = 0; i < 16; ++i) {
    p[i] = static_cast<int16_t>(std::clamp<int32_t>(static_cast<int32_t>(a.v[i]), -32768, 32767));
  }
}

#endif

}  // namespace
}  // namespace quire
