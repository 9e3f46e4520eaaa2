// Embedding, RMSNorm, the gather of logit rows and what follows an exchange between ranks: an item is
// a row.
// Included once per instruction set; see simd.h.

#pragma once

#include "formats.h"
#include "gemm.h"

namespace quire {
namespace {

// Row `id` of a packed matrix: one column of a panel. A tied output matrix is held once, packed for
// the logits; a row is then `columns` short reads with a stride.
template <class Format>
void unpack_row(const EmbedArgs& args, int64_t id, float* out) {
  using Weight = typename Format::Weight;
  const int64_t panel = id / kPanel;
  const int64_t column = id % kPanel;
  const auto* weights =
      static_cast<const Weight*>(args.table) + panel * panel_elements<Format>(args.columns);
  if constexpr (Format::kPairs) {
    const Weight* pair = weights + column / kLanes * 512 + column % kLanes * 2;
    for (int64_t k = 0; k < args.columns; k += kPanel, pair += 512) {
      const int64_t end = std::min(k + kPanel, args.columns);
      for (int64_t i = k; i < end; i += 2, pair += 32) {
        out[i] = to_float(pair[0]);
        if (i + 1 < end) out[i + 1] = to_float(pair[1]);
      }
    }
  } else {
    for (int64_t k = 0; k < args.columns; ++k) out[k] = to_float(weights[k * kPanel + column]);
  }
}

template <class Format>
void embed(const EmbedArgs& args, const Step& step, Range rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t id = step.args.token_ids[row] - args.first;
    float* out = row_of<float>(args.out, row);
    if (id >= 0 && id < args.rows) {
      unpack_row<Format>(args, id, out);
    } else {
      std::fill_n(out, args.columns, 0.0f);
    }
  }
}

// 1 / sqrt(mean(x^2) + eps) over n elements.
inline float inverse_rms(const float* x, int64_t n, float eps) {
  Lanes squares = splat(0.0f);
  for (int64_t i = 0; i < n; i += kLanes) {
    const Lanes part = load_some(x + i, n - i);
    squares = fma(part, part, squares);
  }
  return 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(n) + eps);
}

template <class T>
void normalise(const float* x, const float* weight, int64_t n, float eps, T* out) {
  const Lanes scale = splat(inverse_rms(x, n, eps));
  for (int64_t i = 0; i < n; i += kLanes) {
    const Lanes scaled = load_some(x + i, n - i) * scale * load_some(weight + i, n - i);
    store_some(out + i, scaled, n - i);
  }
}

template <class Format>
void rms_norm(const RmsNormArgs& args, Range rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    normalise(row_of<float>(args.in, row), args.weight, args.columns, args.eps,
              row_of<typename Format::Activation>(args.out, row));
  }
}

inline void take_rows(const TakeRowsArgs& args, const Step& step, Range rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    std::memcpy(row_of<char>(args.out, row), row_of<char>(args.in, step.args.logit_rows[row]),
                args.row_bytes);
  }
}

// Parts are summed in the order of ranks, so every rank gets the same bits at any step size.
inline void sum_parts(const PartsArgs& args, int64_t num_rows, Range rows) {
  const int64_t n = args.columns;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    float* out = row_of<float>(args.out, row);
    for (int64_t i = 0; i < n; i += kLanes) {
      const float* part = args.parts + row * n + i;
      Lanes sum = load_some(part, n - i);
      for (int64_t rank = 1; rank < args.num_parts; ++rank) {
        part += num_rows * n;
        sum = sum + load_some(part, n - i);
      }
      if (args.accumulate) sum = load_some(out + i, n - i) + sum;
      store_some(out + i, sum, n - i);
    }
  }
}

inline void join_columns(const PartsArgs& args, int64_t num_rows, Range rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    float* out = row_of<float>(args.out, row);
    for (int64_t rank = 0; rank < args.num_parts; ++rank, out += args.columns) {
      const float* part = args.parts + (rank * num_rows + row) * args.columns;
      std::memcpy(out, part, args.columns * sizeof(float));
    }
  }
}

}  // namespace
}  // namespace quire
