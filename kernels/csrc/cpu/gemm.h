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
#include "fetch.h"
#include "formats.h"

namespace quire {
namespace {

// How far ahead of its use a weight is fetched: covers memory latency at ~15 GB/s per core.
constexpr int64_t kPrefetchBytes = 8192;
// Inputs that stay in the L2 cache (1 MiB and more) while a thread's panels stream past them.
constexpr int64_t kRowBlockBytes = 512 << 10;

template <class Format>
int64_t panel_elements(int64_t k) {
  return kPanel * (Format::kPairs ? round_up(k, kPanel) : k);
}

inline void prefetch_span(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) prefetch(static_cast<const char*>(from) + i);
}

// A panel's weights.
struct Span {
  const char* begin;
  const char* end;

  int64_t bytes() const { return end - begin; }
};

template <class Format>
Span panel_span(const LinearArgs& args, int64_t panel) {
  const int64_t bytes = panel_elements<Format>(args.k) * sizeof(typename Format::Weight);
  const char* begin = static_cast<const char*>(args.weights) + panel * bytes;
  return {begin, begin + bytes};
}

// What to fetch during one pass over a panel: for each kPanel of k, `bytes` of weights, going on at
// `then` behind `end`, and `lines` of what comes after the matmul.
struct Ahead {
  const char* at;
  const char* end;
  const char* then;
  int64_t bytes;
  Fetch& later;
  int64_t lines;

  void step() {
    prefetch_span(at, bytes);
    at += bytes;
    if (at == end) at = then;
    fetch_lines(later, lines);
  }
};

// Rows are taken in passes over a panel. A lone pass fetches a little ahead of its use; several fetch
// the panel that follows between them, in even parts: all of it in the first would leave the
// multipliers idle, and then the memory.
template <class Format>
Ahead ahead_of(Span panel, Span follows, int64_t pass, int64_t passes, Fetch& later) {
  constexpr int64_t kStep = kPanel * kPanel * sizeof(typename Format::Weight);
  if (passes == 1) {
    return {panel.begin + kPrefetchBytes, panel.end, follows.begin, kStep, later, 0};
  }
  const int64_t steps = ceil_div(panel.bytes(), kStep) * passes;
  const int64_t share = round_up(ceil_div(follows.bytes(), steps), 64);
  const int64_t done = pass * share * (steps / passes);
  const bool is_left = done < follows.bytes();
  return {follows.begin + done, nullptr, nullptr, is_left ? share : 0, later, kMostLines};
}

// acc[row][half] += in[row][0..k) * panel, for ROWS rows. Inlined, or the sums would live in memory:
// the compiler cannot know that nothing else points at them.
template <int ROWS, class T>
[[gnu::always_inline]] inline void multiply_panel(const float* in, int64_t stride, const T* panel,
                                                  int64_t k, Ahead ahead, Lanes (&acc)[ROWS][2]) {
  for (int64_t i = 0; i < k; ++i, panel += kPanel) {
    if (i % kPanel == 0) ahead.step();
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
[[gnu::always_inline]] inline void multiply_panel(const BFloat16* in, int64_t stride,
                                                  const BFloat16* panel, int64_t k, Ahead ahead,
                                                  Lanes (&acc)[ROWS][2]) {
  constexpr int kHalf = 16 * kLanes * 2;
  for (int64_t block = 0; block < k; block += kPanel, panel += 2 * kHalf) {
    ahead.step();
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
void panel_rows(const LinearArgs& args, int64_t row, int64_t rows, int64_t panel, Ahead ahead,
                const Finish& finish) {
  if constexpr (ROWS > 0) {
    if (rows < ROWS) return panel_rows<Format, ROWS - 1>(args, row, rows, panel, ahead, finish);
    Lanes acc[ROWS][2];
    for (auto& halves : acc) halves[0] = halves[1] = splat(0.0f);
    const auto* weights = static_cast<const typename Format::Weight*>(args.weights);
    if constexpr (Finish::kFetches) finish.fetch(row, ROWS, panel + 1);
    multiply_panel<ROWS>(row_of<typename Format::Activation>(args.in, row), args.in.stride,
                         weights + panel * panel_elements<Format>(args.k), args.k, ahead, acc);
    for (int i = 0; i < ROWS; ++i) finish(row + i, panel, acc[i][0], acc[i][1]);
  }
}

inline int64_t num_panels(const LinearArgs& args) { return ceil_div(args.n, kPanel); }

// Rows that stay in L2 beside the panels streaming past them.
template <class Format>
int64_t row_block(const LinearArgs& args) {
  const int64_t row_bytes = args.k * static_cast<int64_t>(sizeof(typename Format::Activation));
  return std::max<int64_t>(1, kRowBlockBytes / row_bytes / kGemmRows) * kGemmRows;
}

// Items are (block of rows, panel), panels within a block following one another.
template <class Format>
int64_t gemm_items(const LinearArgs& args, int64_t rows) {
  return num_panels(args) * ceil_div(rows, row_block<Format>(args));
}

// Rows [begin, end) of one panel. Meanwhile `follows` is fetched, and some of what `later` holds.
template <class Format, class Finish>
void gemm_panel(const LinearArgs& args, int64_t begin, int64_t end, int64_t panel, Span follows,
                Fetch& later, const Finish& finish) {
  const Span own = panel_span<Format>(args, panel);
  const int64_t rows = end - begin;
  const int64_t passes = ceil_div(rows, kGemmRows);
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t first = rows * pass / passes;
    const int64_t count = rows * (pass + 1) / passes - first;
    panel_rows<Format, kGemmRows>(args, begin + first, count, panel,
                                  ahead_of<Format>(own, follows, pass, passes, later), finish);
  }
}

template <class Format, class Finish>
void gemm(const LinearArgs& args, int64_t rows, Range items, Workspace& space,
          const Finish& finish) {
  const int64_t panels = num_panels(args);
  const int64_t block = row_block<Format>(args);
  const NextLinear& next = space.next;
  for (int64_t item = items.begin; item < items.end; ++item) {
    const int64_t begin = item / panels * block;
    const bool is_last = next.args != nullptr && item + 1 == items.end;
    const Span follows = is_last ? panel_span<Format>(*next.args, next.item % num_panels(*next.args))
                                 : panel_span<Format>(args, (item + 1) % panels);
    gemm_panel<Format>(args, begin, std::min(begin + block, rows), item % panels, follows,
                       space.fetch, finish);
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
int64_t best_gemm_items(const LinearArgs& args, int64_t rows) {
  return gemm_items<Format>(args, rows);
}

template <class Format, class Finish>
void best_gemm(const LinearArgs& args, int64_t rows, Range items, Workspace& space,
               const Finish& finish) {
  gemm<Format>(args, rows, items, space, finish);
}
#endif

template <class Format>
void linear(const LinearArgs& args, int64_t rows, Range items, Workspace& space) {
  using Activation = typename Format::Activation;
  switch (args.epilogue) {
    case Epilogue::kStore:
      return best_gemm<Format>(args, rows, items, space, StoreRows<Activation>{args});
    case Epilogue::kStoreFloat:
      return best_gemm<Format>(args, rows, items, space, StoreRows<float>{args});
    case Epilogue::kAddFloat:
      return best_gemm<Format>(args, rows, items, space, AddRows{args});
    case Epilogue::kSiluMul:
      return best_gemm<Format>(args, rows, items, space, SiluMul<Activation>{args});
  }
}

}  // namespace
}  // namespace quire
