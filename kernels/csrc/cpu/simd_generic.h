// `Lanes` and `Pairs` in the compiler's vector extension (GCC, Clang), for any target: SSE2 on plain
// x86-64, NEON on aarch64. See simd.h.

#pragma once

#include "numbers.h"

namespace quire {
namespace {

using Floats16 = float __attribute__((vector_size(64)));
using Ints16 = int32_t __attribute__((vector_size(64)));
using Words16 = uint32_t __attribute__((vector_size(64)));
using Shorts16 = uint16_t __attribute__((vector_size(32)));

struct Lanes {
  Floats16 v;
};

inline Lanes splat(float x) { return {x - Floats16{}}; }
inline Lanes operator+(Lanes a, Lanes b) { return {a.v + b.v}; }
inline Lanes operator-(Lanes a, Lanes b) { return {a.v - b.v}; }
inline Lanes operator*(Lanes a, Lanes b) { return {a.v * b.v}; }
inline Lanes operator/(Lanes a, Lanes b) { return {a.v / b.v}; }
inline Lanes reciprocal(Lanes x) { return splat(1.0f) / x; }
inline Floats16 select(Ints16 mask, Floats16 yes, Floats16 no) {
  return (Floats16)((mask & (Ints16)yes) | (~mask & (Ints16)no));
}
inline Lanes max(Lanes a, Lanes b) { return {select(a.v > b.v, a.v, b.v)}; }
inline Lanes min(Lanes a, Lanes b) { return {select(a.v < b.v, a.v, b.v)}; }

inline Lanes fma(Lanes a, Lanes b, Lanes c) {
#if defined(__FP_FAST_FMAF)
  Lanes r;
  for (int i = 0; i < 16; ++i) r.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return r;
#else
  return {a.v * b.v + c.v};
#endif
}

inline float first(Lanes x) { return x.v[0]; }

// Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the mantissa (|x| < 2^22).
inline Lanes round_even(Lanes x) {
  const Lanes magic = splat(12582912.0f);
  return (x + magic) - magic;
}
inline Lanes scale_by_power_of_two(Lanes x, Lanes n) {
  const Ints16 power = (__builtin_convertvector(n.v, Ints16) + 127) << 23;
  return {x.v * (Floats16)power};
}

inline Ints16 lane_numbers() { return Ints16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

// Lanes [begin, end) of x; `other` elsewhere. 0 <= begin, end <= 16; empty when begin >= end.
inline Lanes keep(Lanes x, int begin, int end, Lanes other) {
  const Ints16 mask = (lane_numbers() >= begin) & (lane_numbers() < end);
  return {select(mask, x.v, other.v)};
}

template <class V>
inline V load_vector(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Lanes load(const float* p) { return {load_vector<Floats16>(p)}; }
inline void store(float* p, Lanes x) { std::memcpy(p, &x.v, sizeof x.v); }

inline Words16 widen(const void* p) {
  return __builtin_convertvector(load_vector<Shorts16>(p), Words16);
}
inline void store_shorts(void* p, Words16 x) {
  const Shorts16 shorts = __builtin_convertvector(x, Shorts16);
  std::memcpy(p, &shorts, sizeof shorts);
}

inline Lanes load(const BFloat16* p) { return {(Floats16)(widen(p) << 16)}; }
inline void store(BFloat16* p, Lanes x) {
  const Words16 bits = (Words16)x.v;
  const Words16 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Words16 nan = (Words16)(x.v != x.v);
  store_shorts(p, ((nan & (bits | 0x400000u)) | (~nan & rounded)) >> 16);
}
inline Lanes load(const Half* p) {
  // The same steps as to_float(Half), with the choice made by masks.
  const Words16 half = widen(p);
  const Words16 sign = (half & 0x8000u) << 16;
  const Words16 rest = (half & 0x7fffu) << 13;
  const Words16 finite = (Words16)((Floats16)rest * 0x1p112f);
  const Words16 special = (Words16)(rest >= 0x0f800000u);
  return {(Floats16)(sign | (special & (rest | 0x70000000u)) | (~special & finite))};
}
inline void store(Half* p, Lanes x) {
  for (int i = 0; i < 16; ++i) p[i] = from_float<Half>(x.v[i]);
}
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
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) x.v[i] = f(x.v[i], x.v[i + width]);
  }
  return x.v[0];
}
inline float sum(Lanes x) {
  return fold(x, [](float a, float b) { return a + b; });
}
inline float largest(Lanes x) {
  return fold(x, [](float a, float b) { return a > b ? a : b; });
}

struct Pairs {
  Words16 v;
};

inline Pairs load_pairs(const BFloat16* p) { return {load_vector<Words16>(p)}; }
inline Pairs load_pairs_partial(const BFloat16* p, int n) {
  Pairs pairs{};
  std::memcpy(&pairs.v, p, n * 4);
  return pairs;
}
inline Pairs splat_pair(const BFloat16* p) {
  uint32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return {Words16{} + pair};
}
inline Lanes dot(Pairs a, Pairs b, Lanes sum) {
  const auto low = [](Words16 x) { return Lanes{(Floats16)(x << 16)}; };
  const auto high = [](Words16 x) { return Lanes{(Floats16)(x & 0xffff0000u)}; };
  return fma(high(a.v), high(b.v), fma(low(a.v), low(b.v), sum));
}

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// Rows that one pass of the matmul keeps in registers.
constexpr int kGemmRows = 2;
// The same of attention and of quantized matmuls.
constexpr int kPatchRows = 2;

}  // namespace
}  // namespace quire
