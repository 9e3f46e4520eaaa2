// Matmul of activations with packed weights: out[m][n] = sum over k of in[m][k] * w[n][k].
//
// Packed weights are panels of 32 output columns (rows of the checkpoint's [N, K] matrix), one
// after the other, so that a thread streams its share once:
//
//   float32, float16   panel [K][32]
//   bfloat16           panel [K / 32][2 halves][16 pairs of k][16 columns][2]
//
// N and K are padded with zeros to whole panels and (bf16) to multiples of 32. A 1 KiB unit
// [16][16][2] of the bf16 form is one AMX tile.
//
// Each result element is one float32 accumulator that takes k in ascending order, whatever the
// number of rows: the same bits for a row alone or among others. The AMX form has another (equally
// fixed) order; see gemm_amx.h.
// Included once per instruction set; see simd.h.

#pragma once

#include "epilogue.h"
#include "formats.h"

namespace quire {
namespace {

// How far ahead of its use a weight is fetched: covers memory latency at ~15 GB/s per core.
constexpr int64_t kPrefetchBytes = 8192;

template <class Format>
int64_t panel_elements(int64_t k) {
  return kPanel * (Format::kPairs ? round_up(k, kPanel) : k);
}

inline void prefetch_span(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) prefetch(static_cast<const char*>(from) + i);
}

// acc[row][half] += in[row][0..k) * panel, for ROWS rows. `cold`: the panel is read for the first
// time, and the next one should be on its way.
template <int ROWS, class T>
void multiply_panel(const float* in, int64_t stride, const T* panel, int64_t k, bool cold,
                    Lanes (&acc)[ROWS][2]) {
  for (int64_t i = 0; i < k; ++i, panel += kPanel) {
    if (cold && i % 8 == 0) {
      prefetch_span(panel + kPrefetchBytes / sizeof(T), 8 * kPanel * sizeof(T));
    }
    const Lanes low = load(panel);
    const Lanes high = load(panel + kLanes);
    for (int row = 0; row < ROWS; ++row) {
      const Lanes x = splat(in[row * stride + i]);
      acc[row][0] = fma(x, low, acc[row][0]);
      acc[row][1] = fma(x, high, acc[row][1]);
    }
  }
}

template <int ROWS>
void multiply_panel(const BFloat16* in, int64_t stride, const BFloat16* panel, int64_t k,
                    bool cold, Lanes (&acc)[ROWS][2]) {
  constexpr int kHalf = 16 * kLanes * 2;
  for (int64_t block = 0; block < k; block += kPanel, panel += 2 * kHalf) {
    if (cold) {
      prefetch_span(panel + kPrefetchBytes / sizeof(BFloat16), 2 * kHalf * sizeof(BFloat16));
    }
    for (int pair = 0; pair < 16; ++pair) {
      const Pairs low = load_pairs(panel + pair * 2 * kLanes);
      const Pairs high = load_pairs(panel + kHalf + pair * 2 * kLanes);
      for (int row = 0; row < ROWS; ++row) {
        const Pairs x = splat_pair(in + row * stride + block + 2 * pair);
        acc[row][0] = dot(x, low, acc[row][0]);
        acc[row][1] = dot(x, high, acc[row][1]);
      }
    }
  }
}

// One panel for `rows` <= ROWS rows from `row` on; ROWS counts down to the exact number.
template <class Format, int ROWS, class Finish>
void panel_rows(const LinearArgs& args, int64_t row, int64_t rows, int64_t panel,
                const Finish& finish) {
  if constexpr (ROWS > 0) {
    if (rows < ROWS) return panel_rows<Format, ROWS - 1>(args, row, rows, panel, finish);
    Lanes acc[ROWS][2];
    for (auto& halves : acc) halves[0] = halves[1] = splat(0.0f);
    const auto* weights = static_cast<const typename Format::Weight*>(args.weights);
    multiply_panel<ROWS>(row_of<typename Format::Activation>(args.in, row), args.in.stride,
                         weights + panel * panel_elements<Format>(args.k), args.k, row == 0, acc);
    for (int i = 0; i < ROWS; ++i) finish(row + i, panel, acc[i][0], acc[i][1]);
  }
}

// Items are panels.
inline int64_t num_panels(const LinearArgs& args) { return ceil_div(args.n, kPanel); }

template <class Format, class Finish>
void gemm(const LinearArgs& args, int64_t rows, Range panels, const Finish& finish) {
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    for (int64_t row = 0; row < rows; row += kGemmRows) {
      const int64_t count = std::min<int64_t>(kGemmRows, rows - row);
      panel_rows<Format, kGemmRows>(args, row, count, panel, finish);
    }
  }
}

}  // namespace
}  // namespace quire

#if defined(__AMX_BF16__)
#include "gemm_amx.h"
#endif

namespace quire {
namespace {

#if !defined(__AMX_BF16__)
template <class Format>
int64_t best_gemm_items(const LinearArgs& args, int64_t /*rows*/) {
  return num_panels(args);
}

template <class Format, class Finish>
void best_gemm(const LinearArgs& args, int64_t rows, Range items, const Finish& finish) {
  gemm<Format>(args, rows, items, finish);
}
#endif

template <class Format>
void linear(const LinearArgs& args, int64_t rows, Range items) {
  using Activation = typename Format::Activation;
  switch (args.epilogue) {
    case Epilogue::kStore:
      return best_gemm<Format>(args, rows, items, StoreRows<Activation>{args});
    case Epilogue::kStoreFloat:
      return best_gemm<Format>(args, rows, items, StoreRows<float>{args});
    case Epilogue::kAddFloat:
      return best_gemm<Format>(args, rows, items, AddRows{args});
    case Epilogue::kSiluMul:
      return best_gemm<Format>(args, rows, items, SiluMul<Activation>{args});
  }
}

}  // namespace
}  // namespace quire
