// The kernels of one instruction set as a table. Included by each kernels_<isa>.cpp, which is
// compiled with that set's flags; see simd.h.

#pragma once

#include "attention.h"
#include "elementwise.h"
#include "fixed_point.h"
#include "gemm.h"
#include "gemm_quantized.h"
#include "rope.h"

namespace quire {
namespace {

int64_t row_items(const Op& op, const Step& step) { return step.rows(op.domain); }

// Calls f with the step's format as a type and the items as a range.
template <class F>
void in_format(const Step& step, int64_t begin, int64_t end, F&& f) {
  with_format(step.dtype, [&](auto format) { f(format, Range{begin, end}); });
}

void run_embed(const Op& op, const Step& step, int64_t begin, int64_t end, Workspace&) {
  in_format(step, begin, end, [&](auto format, Range rows) {
    embed<decltype(format)>(op.embed, step, rows);
  });
}

void run_rms_norm(const Op& op, const Step& step, int64_t begin, int64_t end, Workspace&) {
  in_format(step, begin, end, [&](auto format, Range rows) {
    rms_norm<decltype(format)>(op.rms_norm, rows);
  });
}

int64_t linear_items(const Op& op, const Step& step) {
  int64_t items = 0;
  with_format(step.dtype, [&](auto format) {
    items = best_gemm_items<decltype(format)>(op.linear, step.rows(op.domain));
  });
  return items;
}

void run_linear(const Op& op, const Step& step, int64_t begin, int64_t end, Workspace& space) {
  in_format(step, begin, end, [&](auto format, Range items) {
    linear<decltype(format)>(op.linear, step.rows(op.domain), items, space);
  });
}

int64_t rope_and_cache_items(const Op& op, const Step& step) { return rope_items(op.rope, step); }

void run_rope_and_cache(const Op& op, const Step& step, int64_t begin, int64_t end, Workspace&) {
  in_format(step, begin, end, [&](auto format, Range items) {
    rope_and_cache<decltype(format)>(op.rope, step, items);
  });
}

int64_t attention_op_items(const Op& op, const Step& step) {
  return attention_items(op.attention, step);
}

void run_attention(const Op& op, const Step& step, int64_t begin, int64_t end, Workspace& space) {
  in_format(step, begin, end, [&](auto format, Range items) {
    attention<decltype(format)>(op.attention, step, items, space.scratch);
  });
}

void run_take_rows(const Op& op, const Step& step, int64_t begin, int64_t end, Workspace&) {
  take_rows(op.take_rows, step, {begin, end});
}

void run_sum_parts(const Op& op, const Step& step, int64_t begin, int64_t end, Workspace&) {
  sum_parts(op.parts, step.rows(op.domain), {begin, end});
}

void run_join_columns(const Op& op, const Step& step, int64_t begin, int64_t end, Workspace&) {
  join_columns(op.parts, step.rows(op.domain), {begin, end});
}

void run_fixed_point(const Op& op, const Step& step, int64_t begin, int64_t end, Workspace&) {
  in_format(step, begin, end, [&](auto format, Range rows) {
    fixed_point<decltype(format)>(op.fixed_point, rows);
  });
}

void run_norm_fixed_point(const Op& op, const Step& step, int64_t begin, int64_t end, Workspace&) {
  in_format(step, begin, end, [&](auto format, Range rows) {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      rms_norm<decltype(format)>(op.norm_fixed_point.norm, {row, row + 1});
      fixed_point<decltype(format)>(op.norm_fixed_point.fixed_point, {row, row + 1});
    }
  });
}

int64_t quantized_items(const Op& op, const Step&) { return num_panels(op.quantized.linear); }

void run_quantized_linear(const Op& op, const Step& step, int64_t begin, int64_t end, Workspace&) {
  in_format(step, begin, end, [&](auto format, Range panels) {
    using Activation = typename decltype(format)::Activation;
    quantized_linear<Activation>(op.quantized, step.rows(op.domain), panels);
  });
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
          {{row_items, run_embed},
           {row_items, run_rms_norm},
           {linear_items, run_linear},
           {rope_and_cache_items, run_rope_and_cache},
           {attention_op_items, run_attention},
           {row_items, run_take_rows},
           {row_items, run_sum_parts},
           {row_items, run_join_columns},
           {row_items, run_fixed_point},
           {quantized_items, run_quantized_linear},
           {row_items, run_norm_fixed_point}},
          release,
          kScratchBytes};
}

}  // namespace
}  // namespace quire
