// Matmul of fixed-point activations (fixed_point.h) with integer weights (quantized_layout.h):
//
//   out[m][n] = sum over blocks b of  s_in[m][b] * s_w[n][group of b] * sum over k in b of q_in * q_w
//
// with q_w = value - zero point. The inner sum is exact in 32 bits (128 products of less than 2^15 and
// at most 2^8), so its order is free: the same bits on every instruction set. The outer one is a float32
// accumulator that takes blocks in ascending order, whatever the number of rows.
// Included once per instruction set; see simd.h.

#pragma once

#include "epilogue.h"
#include "gemm.h"
#include "quantized_layout.h"
#include "shorts.h"

namespace quire {
namespace {

// The zero points of a group, or nothing.
template <bool ZEROS>
struct ZeroPoints {
  Shorts of[2];

  explicit ZeroPoints(const char* header)
      : of{load_shorts(header + kPanel * 4), load_shorts(header + kPanel * 4 + 64)} {}
  Shorts remove(Shorts values, int half) const { return values - of[half]; }
};

template <>
struct ZeroPoints<false> {
  explicit ZeroPoints(const char*) {}
  Shorts remove(Shorts values, int) const { return values; }
};

// Pair I of the words of a step.
template <int BITS, int I>
Shorts unpack(Shorts words) {
  return signed_bits<I * BITS, BITS>(words);
}

// sums[row][half] += in[row][2 I, 2 I + 1] * pair I of the step, and the pairs after it.
template <int BITS, int I, int ROWS, class Zeros>
void multiply_pairs(const int16_t* in, int64_t stride, const Shorts (&words)[2], const Zeros& zeros,
                    Words (&sums)[ROWS][2]) {
  if constexpr (I < 16 / BITS) {
    const Shorts low = zeros.remove(unpack<BITS, I>(words[0]), 0);
    const Shorts high = zeros.remove(unpack<BITS, I>(words[1]), 1);
    for (int row = 0; row < ROWS; ++row) {
      const Shorts x = splat_pair(in + row * stride + 2 * I);
      sums[row][0] = dot(x, low, sums[row][0]);
      sums[row][1] = dot(x, high, sums[row][1]);
    }
    multiply_pairs<BITS, I + 1>(in, stride, words, zeros, sums);
  }
}

// One panel, from its first byte to its last, for ROWS rows.
template <int BITS, bool ZEROS, int ROWS>
class PanelProduct {
 public:
  PanelProduct(const QuantizedLinearArgs& args, int64_t row)
      : args_(args),
        in_(row_of<int16_t>(args.linear.in, row)),
        scales_(reinterpret_cast<const float*>(in_ + round_up(args.linear.k, kPanel))) {
    for (auto& halves : acc) halves[0] = halves[1] = splat(0.0f);
  }

  // `cold`: the panel is read for the first time, and the next one should be on its way.
  template <bool COLD>
  void run(const char* panel) {
    const int64_t k = args_.linear.k;
    for (int64_t begin = 0; begin < k; begin += args_.group_size) {
      panel = group<COLD>(panel, begin, std::min(begin + args_.group_size, k));
    }
  }

  Lanes acc[ROWS][2];

 private:
  static constexpr int64_t kStep = 32 / BITS;

  template <bool COLD>
  const char* group(const char* panel, int64_t begin, int64_t end) {
    const Lanes weight_scales[2] = {load(reinterpret_cast<const float*>(panel)),
                                    load(reinterpret_cast<const float*>(panel) + kLanes)};
    const ZeroPoints<ZEROS> zeros(panel);
    constexpr int64_t kHeader = kPanel * (ZEROS ? 8 : 4);
    if (COLD) prefetch_span(panel + kPrefetchBytes, kHeader);
    panel += kHeader;
    for (int64_t k = begin; k < end; k += args_.block, ++scales_) {
      panel = block<COLD>(panel, k, std::min(k + args_.block, end), weight_scales, zeros);
    }
    return panel;
  }

  template <bool COLD>
  const char* block(const char* panel, int64_t begin, int64_t end, const Lanes (&weight_scales)[2],
                    const ZeroPoints<ZEROS>& zeros) {
    Words sums[ROWS][2];
    for (auto& halves : sums) halves[0] = halves[1] = words(0);
    const int64_t stride = args_.linear.in.stride;
    for (int64_t k = begin; k < end; k += kStep, panel += QuantizedLayout::kStepBytes) {
      if (COLD) prefetch_span(panel + kPrefetchBytes, QuantizedLayout::kStepBytes);
      const Shorts step[2] = {load_shorts(panel), load_shorts(panel + 64)};
      multiply_pairs<BITS, 0>(in_ + k, stride, step, zeros, sums);
    }
    for (int row = 0; row < ROWS; ++row) {
      const Lanes scale = splat(scales_[row * (stride / 2)]);
      for (int half = 0; half < 2; ++half) {
        const Lanes part = signed_to_float(sums[row][half]) * scale;
        acc[row][half] = fma(part, weight_scales[half], acc[row][half]);
      }
    }
    return panel;
  }

  const QuantizedLinearArgs& args_;
  const int16_t* in_;
  const float* scales_;
};

// One panel for `rows` <= ROWS rows from `row` on; ROWS counts down to the exact number.
template <int BITS, bool ZEROS, int ROWS, class Finish>
void quantized_rows(const QuantizedLinearArgs& args, Range rows, const char* weights, int64_t panel,
                    const Finish& finish) {
  if constexpr (ROWS > 0) {
    const int64_t row = rows.begin;
    if (rows.end - row < ROWS) {
      return quantized_rows<BITS, ZEROS, ROWS - 1>(args, rows, weights, panel, finish);
    }
    PanelProduct<BITS, ZEROS, ROWS> product(args, row);
    if (row == 0) {
      product.template run<true>(weights);
    } else {
      product.template run<false>(weights);
    }
    for (int i = 0; i < ROWS; ++i) finish(row + i, panel, product.acc[i][0], product.acc[i][1]);
  }
}

// Items are panels.
template <int BITS, bool ZEROS, class Finish>
void quantized_gemm(const QuantizedLinearArgs& args, int64_t rows, Range panels,
                    const Finish& finish) {
  const QuantizedLayout layout{args.linear.k, args.group_size, BITS, ZEROS};
  const char* weights = static_cast<const char*>(args.linear.weights);
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const char* from = weights + panel * layout.panel_bytes();
    for (int64_t row = 0; row < rows; row += kGemmRows) {
      const Range some{row, std::min<int64_t>(row + kGemmRows, rows)};
      quantized_rows<BITS, ZEROS, kGemmRows>(args, some, from, panel, finish);
    }
  }
}

template <class Finish>
void quantized_gemm(const QuantizedLinearArgs& args, int64_t rows, Range panels,
                    const Finish& finish) {
  if (args.bits == 8) {
    return args.has_zeros ? quantized_gemm<8, true>(args, rows, panels, finish)
                          : quantized_gemm<8, false>(args, rows, panels, finish);
  }
  return args.has_zeros ? quantized_gemm<4, true>(args, rows, panels, finish)
                        : quantized_gemm<4, false>(args, rows, panels, finish);
}

template <class Activation>
void quantized_linear(const QuantizedLinearArgs& args, int64_t rows, Range panels) {
  switch (args.linear.epilogue) {
    case Epilogue::kStore:
      return quantized_gemm(args, rows, panels, StoreRows<Activation>{args.linear});
    case Epilogue::kStoreFloat:
      return quantized_gemm(args, rows, panels, StoreRows<float>{args.linear});
    case Epilogue::kAddFloat:
      return quantized_gemm(args, rows, panels, AddRows{args.linear});
    case Epilogue::kSiluMul:
      return quantized_gemm(args, rows, panels, SiluMul<Activation>{args.linear});
  }
}

}  // namespace
}  // namespace quire
