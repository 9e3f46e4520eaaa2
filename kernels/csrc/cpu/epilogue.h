// What a matmul does with a row's 32 results of one panel while they are still in registers.
//
// Each is called as finish(row, panel, low, high) with the panel's columns 0-15 and 16-31. Columns
// past N are not stored: they are padding of the output's row, which must stay zero.
// Included once per instruction set; see simd.h.

#pragma once

#include "formats.h"

namespace quire {
namespace {

struct PanelResult {
  Lanes low, high;
};

inline PanelResult add_bias(const LinearArgs& args, int64_t panel, Lanes low, Lanes high) {
  if (args.bias == nullptr) return {low, high};
  const float* bias = args.bias + panel * kPanel;
  return {low + load(bias), high + load(bias + kLanes)};
}

template <class T>
struct StoreRows {
  // Logits are many and were last used a step ago: their lines have left the caches.
  static constexpr bool kFetches = sizeof(T) == 4;
  const LinearArgs& args;

  void fetch(int64_t row, int64_t rows, int64_t panel) const {
    if (panel * kPanel >= args.n) return;
    for (int64_t i = 0; i < rows; ++i) {
      const T* out = row_of<T>(args.out, row + i) + panel * kPanel;
      __builtin_prefetch(out, 1);
      __builtin_prefetch(out + kLanes, 1);
    }
  }

  void operator()(int64_t row, int64_t panel, Lanes low, Lanes high) const {
    const PanelResult result = add_bias(args, panel, low, high);
    const int64_t column = panel * kPanel;
    T* out = row_of<T>(args.out, row) + column;
    store_some(out, result.low, args.n - column);
    if (column + kLanes < args.n) store_some(out + kLanes, result.high, args.n - column - kLanes);
  }
};

struct AddRows {
  static constexpr bool kFetches = false;
  const LinearArgs& args;

  void operator()(int64_t row, int64_t panel, Lanes low, Lanes high) const {
    const PanelResult result = add_bias(args, panel, low, high);
    const int64_t column = panel * kPanel;
    float* out = row_of<float>(args.out, row) + column;
    add(out, result.low, args.n - column);
    if (column + kLanes < args.n) add(out + kLanes, result.high, args.n - column - kLanes);
  }

 private:
  static void add(float* out, Lanes x, int64_t n) { store_some(out, load_some(out, n) + x, n); }
};

// A panel is 16 gate columns, then the 16 up columns of the same outputs.
template <class T>
struct SiluMul {
  static constexpr bool kFetches = false;
  const LinearArgs& args;

  void operator()(int64_t row, int64_t panel, Lanes low, Lanes high) const {
    const PanelResult result = add_bias(args, panel, low, high);
    const int64_t column = panel * kLanes;
    T* out = row_of<T>(args.out, row) + column;
    store_some(out, activate(result.low) * result.high, args.n / 2 - column);
  }

 private:
  static Lanes activate(Lanes gate) {
    if constexpr (sizeof(T) == 2) return rough_silu(gate);
    return silu(gate);
  }
};

}  // namespace
}  // namespace quire
