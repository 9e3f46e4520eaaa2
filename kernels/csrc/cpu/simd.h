// `Lanes`: sixteen floats that every kernel computes in, on every instruction set.
//
//   generic  the compiler's vector extension (SSE2, NEON, ... whatever the target has)
//   AVX2     two 256-bit registers
//   AVX-512  one 512-bit register
//
// The width is the same everywhere, so a kernel is written once and sums in one order: lane i adds
// elements i, i + 16, ..., then the lanes fold in halves. Products are fused with their sum on all
// but generic targets without FMA, so results differ between instruction sets in the last bits but
// never within one.
//
// `Pairs`: thirty-two bf16 as sixteen pairs; `dot` adds both products of each pair to its lane.
//
// This header, and those that include it, are compiled once per instruction set with that set's
// flags (kernels_<isa>.cpp). Everything in them is in an unnamed namespace: with external linkage
// the linker would keep one copy of each inline function, and a machine without AVX-512 might run
// the copy that needs it.

#pragma once

#include "numbers.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "simd_avx2.h"
#else
#include "simd_generic.h"
#endif

namespace quire {
namespace {

constexpr int kLanes = 16;

// exp(x) within 2 ulp for x in [-87, 88], clamped outside. Cephes' expf (S. Moshier): x = n ln 2 + r
// with |r| <= ln 2 / 2, a polynomial in r, and n added to the exponent.
inline Lanes exp(Lanes x) {
  x = max(splat(-87.0f), min(splat(88.0f), x));  // in this order a NaN stays one
  const Lanes n = round_even(x * splat(1.44269504f));
  Lanes r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  Lanes p = fma(splat(1.9875691500e-4f), r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r + splat(1.0f));
  return scale_by_power_of_two(p, n);
}

inline Lanes silu(Lanes x) { return x / (splat(1.0f) + exp(splat(0.0f) - x)); }

// 2^x within 3e-6 of its value for x in [-126, 127], clamped below: for results that are rounded to
// bf16, at half the cost of `exp`. The polynomial is the minimax one of degree 4 on [-1/2, 1/2].
inline Lanes rough_exp2(Lanes x) {
  x = max(splat(-126.0f), x);
  const Lanes n = round_even(x);
  const Lanes r = x - n;
  Lanes p = fma(splat(9.570101434e-3f), r, splat(5.591786028e-2f));
  p = fma(p, r, splat(2.402474484e-1f));
  p = fma(p, r, splat(6.931218147e-1f));
  p = fma(p, r, splat(9.999992614e-1f));
  return scale_by_power_of_two(p, n);
}

constexpr float kLog2E = 1.44269504f;

inline Lanes rough_silu(Lanes x) {
  const Lanes power = min(splat(126.0f), x * splat(-kLog2E));
  return x * reciprocal(splat(1.0f) + rough_exp2(power));
}

// The first `n` (0..16) lanes from memory or to it; absent lanes read as zero.
template <class T>
Lanes load_some(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load_partial(p, static_cast<int>(n));
}

template <class T>
void store_some(T* p, Lanes x, int64_t n) {
  if (n >= kLanes) {
    store(p, x);
  } else {
    store_partial(p, x, static_cast<int>(n));
  }
}

}  // namespace
}  // namespace quire
