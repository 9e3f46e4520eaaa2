// The number formats of weights, activations and cache, and their scalar conversions.

#pragma once

#include <cstdint>
#include <cstring>

namespace quire {

// Values are part of the C ABI (kernels/cpu/library.py).
enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

inline int64_t dtype_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

inline int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return bits_float(uint32_t{x.bits} << 16); }

inline float to_float(Half x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t rest = uint32_t{x.bits & 0x7fffu} << 13;
  if (rest >= 0x0f800000u) return bits_float(sign | 0x70000000u | rest);  // Inf, NaN
  // Scaling by 2^112 rebias the exponent and normalises halves below 2^-14 in one step.
  return bits_float(sign | float_bits(bits_float(rest) * 0x1p112f));
}

// Round to nearest, ties to even; NaN stays NaN.
template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
inline Half from_float<Half>(float x) {
  const uint32_t bits = float_bits(x);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to Inf
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 leaves the half's subnormal mantissa in the low bits, rounded.
    const float shifted = bits_float(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (float_bits(shifted) - float_bits(0.5f)))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

}  // namespace quire
