// Fetching of what a later operation reads, a few lines at a time between products.
//
// A matmul of many rows computes and leaves memory idle; attention that follows reads blocks that lie
// scattered over the pool, and waits for memory. So the matmuls between two attentions bring the
// second one's keys and values into the last-level cache (see Program::fetch_of).
// Included once per instruction set; see simd.h.

#pragma once

#include "kernels.h"
#include "simd.h"

namespace quire {
namespace {

// Lines that a product of kGemmRows rows, 32 columns and 32 k hides, beside the weights' own.
constexpr int64_t kMostLines = 2 * kGemmRows;

inline void fetch_lines(Fetch& fetch, int64_t count) {
  for (count = std::min(count, fetch.left); count > 0; --count, --fetch.left, --fetch.span_left) {
    if (fetch.span_left == 0) {
      fetch.at = *fetch.spans++ + fetch.offset;
      fetch.span_left = fetch.span_lines;
    }
    prefetch(fetch.at);
    fetch.at += 64;
  }
}

}  // namespace
}  // namespace quire
