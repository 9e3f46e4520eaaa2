// The kernels of one instruction set as a table. Included by each kernels_<isa>.cpp, which is
// compiled with that set's flags; see simd.h.

#pragma once

#include "attention.h"
#include "elementwise.h"
#include "gemm.h"
#include "rope.h"

namespace quire {
namespace {

void run_embed(const Op& op, const Step& step, Worker& worker) {
  with_format(step.dtype, [&](auto format) {
    embed<decltype(format)>(op.embed, step, worker);
  });
}

void run_rms_norm(const Op& op, const Step& step, Worker& worker) {
  with_format(step.dtype, [&](auto format) {
    rms_norm<decltype(format)>(op.rms_norm, step.rows(op.domain), worker);
  });
}

void run_linear(const Op& op, const Step& step, Worker& worker) {
  with_format(step.dtype, [&](auto format) {
    linear<decltype(format)>(op.linear, step.rows(op.domain), worker);
  });
}

void run_rope_and_cache(const Op& op, const Step& step, Worker& worker) {
  with_format(step.dtype, [&](auto format) {
    rope_and_cache<decltype(format)>(op.rope, step, worker);
  });
}

void run_attention(const Op& op, const Step& step, Worker& worker) {
  with_format(step.dtype, [&](auto format) {
    attention<decltype(format)>(op.attention, step, worker);
  });
}

void run_take_rows(const Op& op, const Step& step, Worker& worker) {
  take_rows(op.take_rows, step, worker);
}

void release() {
#if defined(__AMX_BF16__)
  _tile_release();
#endif
}

constexpr int64_t kScratchBytes = std::max({sizeof(AttentionScratch<Float32Format>),
                                            sizeof(AttentionScratch<BFloat16Format>),
                                            sizeof(AttentionScratch<Float16Format>)});

// In the order of OpCode.
constexpr Kernels make_table(const char* name) {
  return {name,
          {run_embed, run_rms_norm, run_linear, run_rope_and_cache, run_attention, run_take_rows},
          release,
          kScratchBytes};
}

}  // namespace
}  // namespace quire
