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

// sums[row][half] += in[row][2 I, 2 I + 1] * pair I of the step, and the pairs after it. Inlined by
// force: called, it would move all sums through memory.
template <int BITS, int I, int ROWS, class Zeros>
__attribute__((always_inline)) inline void multiply_pairs(const int16_t* in, int64_t stride,
                                                          const Shorts (&words)[2],
                                                          const Zeros& zeros,
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
        scales_(reinterpret_cast<const float*>(in_ + round_up(args.linear.k, kPanel))) {}

  // `cold`: the panel is read for the first time, and the next one should be on its way.
  void run(const char* panel, bool cold, float (&out)[kPatchRows][kPanel]) {
    const int64_t k = args_.linear.k;
    for (auto& row : out) std::fill_n(row, kPanel, 0.0f);
    for (int64_t begin = 0; begin < k; begin += args_.group_size) {
      panel = group(panel, {begin, std::min(begin + args_.group_size, k)}, cold, out);
    }
  }

 private:
  static constexpr int64_t kStep = 32 / BITS;
  static constexpr int64_t kHeader = kPanel * (ZEROS ? 8 : 4);

  const char* group(const char* panel, Range k, bool cold, float (&out)[kPatchRows][kPanel]) {
    const auto* weight_scales = reinterpret_cast<const float*>(panel);
    const ZeroPoints<ZEROS> zeros(panel);
    if (cold) prefetch_span(panel + kPrefetchBytes, kHeader);
    panel += kHeader;
    for (int64_t begin = k.begin; begin < k.end; begin += args_.block, ++scales_) {
      const Range block{begin, std::min(begin + args_.block, k.end)};
      Words sums[ROWS][2];
      for (auto& halves : sums) halves[0] = halves[1] = words(0);
      panel = cold ? multiply<true>(panel, block, zeros, sums)
                   : multiply<false>(panel, block, zeros, sums);
      add(sums, weight_scales, out);
    }
    return panel;
  }

  template <bool COLD>
  const char* multiply(const char* panel, Range k, const ZeroPoints<ZEROS>& zeros,
                       Words (&sums)[ROWS][2]) const {
    const int64_t stride = args_.linear.in.stride;
    for (int64_t i = k.begin; i < k.end; i += kStep, panel += QuantizedLayout::kStepBytes) {
      if (COLD) prefetch_span(panel + kPrefetchBytes, QuantizedLayout::kStepBytes);
      const Shorts step[2] = {load_shorts(panel), load_shorts(panel + 64)};
      multiply_pairs<BITS, 0>(in_ + i, stride, step, zeros, sums);
    }
    return panel;
  }

  // out += the block's sums, scaled.
  void add(const Words (&sums)[ROWS][2], const float* weight_scales,
           float (&out)[kPatchRows][kPanel]) const {
    for (int row = 0; row < ROWS; ++row) {
      const Lanes scale = splat(scales_[row * (args_.linear.in.stride / 2)]);
      for (int half = 0; half < 2; ++half) {
        float* to = out[row] + half * kLanes;
        const Lanes part = signed_to_float(sums[row][half]) * scale;
        store(to, fma(part, load(weight_scales + half * kLanes), load(to)));
      }
    }
  }

  const QuantizedLinearArgs& args_;
  const int16_t* in_;
  const float* scales_;
};

// One panel for `rows` (at most ROWS) rows; ROWS counts down to the exact number.
template <int BITS, bool ZEROS, int ROWS>
void quantized_panel(const QuantizedLinearArgs& args, Range rows, const char* panel,
                     float (&out)[kPatchRows][kPanel]) {
  if constexpr (ROWS > 0) {
    if (rows.end - rows.begin < ROWS) {
      return quantized_panel<BITS, ZEROS, ROWS - 1>(args, rows, panel, out);
    }
    PanelProduct<BITS, ZEROS, ROWS>(args, rows.begin).run(panel, rows.begin == 0, out);
  }
}

using QuantizedPanel = void (*)(const QuantizedLinearArgs& args, Range rows, const char* panel,
                                float (&out)[kPatchRows][kPanel]);

inline QuantizedPanel panel_function(const QuantizedLinearArgs& args) {
  if (args.bits == 8) {
    return args.has_zeros ? quantized_panel<8, true, kPatchRows>
                          : quantized_panel<8, false, kPatchRows>;
  }
  return args.has_zeros ? quantized_panel<4, true, kPatchRows>
                        : quantized_panel<4, false, kPatchRows>;
}

// Items are panels.
template <class Finish>
void quantized_gemm(const QuantizedLinearArgs& args, int64_t rows, Range panels,
                    const Finish& finish) {
  const QuantizedLayout layout{args.linear.k, args.group_size, args.bits, args.has_zeros};
  const char* weights = static_cast<const char*>(args.linear.weights);
  const QuantizedPanel multiply = panel_function(args);
  alignas(64) float out[kPatchRows][kPanel];
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    for (int64_t row = 0; row < rows; row += kPatchRows) {
      const Range some{row, std::min<int64_t>(row + kPatchRows, rows)};
      multiply(args, some, weights + panel * layout.panel_bytes(), out);
      for (int64_t i = some.begin; i < some.end; ++i) {
        finish(i, panel, load(out[i - row]), load(out[i - row] + kLanes));
      }
    }
  }
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
