// Activations as block fixed point: what quantized matmuls multiply (gemm_quantized.h).
//
// A row is cut into blocks of up to 128 along K; within one, x = q * s with 16-bit integers q and a
// power of two s, chosen so that the largest |q| is in [2^14, 2^15). Elements of at least 1/128 of a
// block's largest are exact when they come from bf16; smaller ones are rounded to nearest even, by at
// most 2^-16 of the largest. A block with an infinity or a NaN has a NaN for its scale.
//
//   row of the result   q [k rounded up to 32] | s float32 [blocks]
//
// Zeros follow the last q of a row up to the end of its block, and of its step (quantized_layout.h).
// Included once per instruction set; see simd.h.

#pragma once

#include "formats.h"
#include "shorts.h"

namespace quire {
namespace {

// The scale of a block and its inverse, powers of two.
struct BlockScale {
  float scale, inverse;

  // `largest` of the absolute values; blocks of less than 2^-100 become zeros.
  explicit BlockScale(float largest) {
    const uint32_t exponent = float_bits(std::max(largest, 0x1p-100f)) >> 23;  // biased by 127
    scale = bits_float((exponent - 14) << 23);
    inverse = bits_float((254 - exponent + 14) << 23);
  }
};

// The block's elements, gathered by `order` if there is one; zeros from `count` to the next 16.
template <class T>
void gather_block(const T* in, const int32_t* order, int64_t begin, int64_t count, float* out) {
  if (order == nullptr) {
    for (int64_t i = 0; i < count; i += kLanes) {
      store(out + i, load_some(in + begin + i, count - i));
    }
    return;
  }
  for (int64_t i = 0; i < round_up(count, kLanes); ++i) {
    out[i] = i < count ? to_float(in[order[begin + i]]) : 0.0f;
  }
}

// Rounds `count` elements to multiples of a scale of their own, which is returned.
inline float fix_block(const float* in, int64_t count, int16_t* out) {
  Lanes top = splat(0.0f);
  Lanes finite = splat(0.0f);  // NaN where an element is not
  for (int64_t i = 0; i < count; i += kLanes) {
    const Lanes x = load(in + i);
    top = max(top, max(x, splat(0.0f) - x));
    finite = fma(x, splat(0.0f), finite);
  }
  const float not_finite = sum(finite);
  if (not_finite != 0.0f) {
    std::fill_n(out, round_up(count, kLanes), int16_t{0});
    return not_finite;
  }
  const BlockScale block(largest(top));
  for (int64_t i = 0; i < count; i += kLanes) {
    const Lanes q = round_even(load(in + i) * splat(block.inverse));
    store_shorts(out + i, float_to_signed(q));
  }
  return block.scale;
}

template <class Format>
void fixed_point(const FixedPointArgs& args, Range rows) {
  using T = typename Format::Activation;
  alignas(64) float block[kMaxFixedBlock];
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const T* in = row_of<T>(args.in, row);
    auto* out = row_of<int16_t>(args.out, row);
    auto* scales = reinterpret_cast<float*>(out + round_up(args.k, kPanel));
    for (int64_t begin = 0; begin < args.k; begin += args.block) {
      const int64_t count = std::min(args.block, args.k - begin);
      gather_block(in, args.order, begin, count, block);
      *scales++ = fix_block(block, count, out + begin);
    }
  }
}

}  // namespace
}  // namespace quire
