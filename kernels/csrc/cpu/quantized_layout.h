// Packed integer weights: where every value, scale and zero point of a matrix [n, k] lies.
//
// A panel holds 32 output columns, as for floats (gemm.h), and is read once from end to end:
//
//   panel   [groups along k]
//   group   scales float32 [32] | zeros int16 [32][2] (asymmetric only) | steps
//   step    [2 halves][16 columns] words of 32 bits: 4 (int8) or 8 (int4) consecutive k
//
// A word is unpacked as pairs of 16-bit integers. Its low half holds the even k and its high half the
// odd ones, the earliest in the lowest bits, so that shifts alone give pairs in the order of k:
//
//   int8   bits 0-7: k0, 8-15: k2 | 16-23: k1, 24-31: k3
//   int4   bits 0-3: k0, 4-7: k2, 8-11: k4, 12-15: k6 | 16-19: k1, ...
//
// The last group may be shorter than the others; values past K and past N are zero.

#pragma once

#include "kernels.h"

namespace quire {

struct QuantizedLayout {
  int64_t k;
  int64_t group_size;  // k that share a scale
  int32_t bits;        // 4 or 8
  int32_t has_zeros;

  static constexpr int64_t kStepBytes = kPanel * 4;

  int64_t step_size() const { return 32 / bits; }  // k of a step
  int64_t header_bytes() const { return kPanel * (has_zeros ? 8 : 4); }
  int64_t groups() const { return ceil_div(k, group_size); }
  int64_t group_bytes() const {
    return header_bytes() + ceil_div(group_size, step_size()) * kStepBytes;
  }
  int64_t panel_bytes() const {
    const int64_t last = k - (groups() - 1) * group_size;
    return (groups() - 1) * group_bytes() + header_bytes() +
           ceil_div(last, step_size()) * kStepBytes;
  }
  int64_t bytes(int64_t n) const { return ceil_div(n, kPanel) * panel_bytes(); }

  // Offset of the group of `column` that holds `k_at`.
  int64_t group_offset(int64_t column, int64_t k_at) const {
    return column / kPanel * panel_bytes() + k_at / group_size * group_bytes();
  }
  // Byte of a value; an int4 value is half of it, see `is_upper_half`.
  int64_t value_offset(int64_t column, int64_t k_at) const {
    const int64_t in_group = k_at % group_size;
    const int64_t word = in_group / step_size() * kPanel + column % kPanel;
    const int64_t i = in_group % step_size();
    const int64_t place = bits == 8 ? i / 2 : i / 4;
    return group_offset(column, k_at) + header_bytes() + word * 4 + i % 2 * 2 + place;
  }
  bool is_upper_half(int64_t k_at) const { return k_at % group_size % step_size() / 2 % 2 == 1; }
};

}  // namespace quire
