// Attention's two products in lanes: for instruction sets without matrix tiles, and for the formats
// and head sizes that tiles do not take.
//
// Sums are taken for a patch of rows x columns at once, a column being 16 tokens (scores) or 16
// elements of the values. A patch has as many sums as the matmul keeps in registers: then what is
// loaded serves several products, and a lone row (a decode token) has enough independent sums to
// hide their latency. A sum takes its terms in the same order in every patch.
// Included once per instruction set; see simd.h.

#pragma once

#include "formats.h"

namespace quire {
namespace {

// Columns of a patch of `rows` rows: a power of two.
constexpr int patch_columns(int rows) {
  int columns = 1;
  while (columns < 8 && 2 * columns * rows <= 2 * kPatchRows) columns *= 2;
  return columns;
}

// Calls f with n, which is 1 .. MOST, as a compile-time number.
template <int MOST, class F>
void with_count(int n, const F& f) {
  if constexpr (MOST > 1) {
    if (n < MOST) return with_count<MOST - 1>(n, f);
  }
  f(std::integral_constant<int, MOST>());
}

// Calls f(first row, rows) with even parts of the rows, none larger than a patch can be.
template <class F>
void in_row_parts(int rows, const F& f) {
  const int parts = static_cast<int>(ceil_div(rows, kPatchRows));
  for (int part = 0; part < parts; ++part) {
    const int first = rows * part / parts;
    with_count<kPatchRows>(rows * (part + 1) / parts - first, [&](auto count) { f(first, count); });
  }
}

// Calls f(first column, columns) with steps of MOST columns, then with halves of that.
template <int MOST, class F>
void in_column_steps(int64_t begin, int64_t end, const F& f) {
  for (; begin + MOST <= end; begin += MOST) f(begin, std::integral_constant<int, MOST>());
  if constexpr (MOST > 1) in_column_steps<MOST / 2>(begin, end, f);
}

template <int ROWS, int COLUMNS>
using Patch = Lanes[COLUMNS][ROWS];

// sums[tile][row] += query[row] . the tile's 16 keys. Inlined like multiply_panel in gemm.h.
template <int ROWS, int TILES, class T>
[[gnu::always_inline]] inline void score_patch(const float (*query)[kQueryStride],
                                               const T* const* k, int64_t head_dim,
                                               Patch<ROWS, TILES>& sums) {
  for (int64_t d = 0; d < head_dim; ++d) {
    Lanes keys[TILES];
    for (int t = 0; t < TILES; ++t) keys[t] = load(k[t] + d * kBlockTokens);
    for (int r = 0; r < ROWS; ++r) {
      const Lanes x = splat(query[r][d]);
      for (int t = 0; t < TILES; ++t) sums[t][r] = fma(x, keys[t], sums[t][r]);
    }
  }
}

template <int ROWS, int TILES>
[[gnu::always_inline]] inline void score_patch(const BFloat16 (*query)[kQueryStride],
                                               const BFloat16* const* k, int64_t head_dim,
                                               Patch<ROWS, TILES>& sums) {
  for (int64_t d = 0; d < head_dim; d += 2) {
    Pairs keys[TILES];
    for (int t = 0; t < TILES; ++t) keys[t] = load_pairs(k[t] + d * kBlockTokens);
    for (int r = 0; r < ROWS; ++r) {
      const Pairs x = splat_pair(&query[r][d]);
      for (int t = 0; t < TILES; ++t) sums[t][r] = dot(x, keys[t], sums[t][r]);
    }
  }
}

// sums[column][row] += probs[row] of a tile's 16 tokens * values; `n` elements of them are there,
// which only a patch of one column asks about.
template <int ROWS, int COLUMNS, class T>
[[gnu::always_inline]] inline void weigh_patch(const float (*probs)[kProbStride], const T* v,
                                               int64_t head_dim, int64_t n,
                                               Patch<ROWS, COLUMNS>& sums) {
  for (int token = 0; token < kBlockTokens; ++token, v += head_dim) {
    Lanes values[COLUMNS];
    for (int c = 0; c < COLUMNS; ++c) {
      values[c] = COLUMNS > 1 ? load(v + c * kLanes) : load_some(v, n);
    }
    for (int r = 0; r < ROWS; ++r) {
      const Lanes x = splat(probs[r][token]);
      for (int c = 0; c < COLUMNS; ++c) sums[c][r] = fma(x, values[c], sums[c][r]);
    }
  }
}

template <int ROWS, int COLUMNS>
[[gnu::always_inline]] inline void weigh_patch(const BFloat16 (*probs)[kProbStride],
                                               const BFloat16* v, int64_t head_dim, int64_t n,
                                               Patch<ROWS, COLUMNS>& sums) {
  for (int token = 0; token < kBlockTokens; token += 2, v += 2 * head_dim) {
    Pairs values[COLUMNS];
    for (int c = 0; c < COLUMNS; ++c) {
      const bool whole = COLUMNS > 1 || n >= kLanes;
      values[c] = whole ? load_pairs(v + 2 * c * kLanes) : load_pairs_partial(v, n);
    }
    for (int r = 0; r < ROWS; ++r) {
      const Pairs x = splat_pair(&probs[r][token]);
      for (int c = 0; c < COLUMNS; ++c) sums[c][r] = dot(x, values[c], sums[c][r]);
    }
  }
}

template <int ROWS, int COLUMNS>
void clear(Patch<ROWS, COLUMNS>& sums) {
  for (auto& column : sums) {
    for (Lanes& sum : column) sum = splat(0.0f);
  }
}

template <class Format>
void score_in_lanes(AttentionScratch<Format>& scratch, int rows,
                    const Split<typename Format::Cached>& split, int64_t head_dim) {
  in_row_parts(rows, [&](int row, auto count) {
    in_column_steps<patch_columns(count)>(0, split.tiles, [&](int64_t tile, auto tiles) {
      if (row == 0) fetch_beside(split, tile, tiles, head_dim);
      Patch<count, tiles> sums;
      clear<count, tiles>(sums);
      score_patch<count, tiles>(&scratch.query[row], split.k + tile, head_dim, sums);
      for (int r = 0; r < count; ++r) {
        for (int t = 0; t < tiles; ++t) {
          store(&scratch.scores[row + r][(tile + t) * kLanes], sums[t][r]);
        }
      }
    });
  });
}

template <class Format>
void weigh_in_lanes(AttentionScratch<Format>& scratch, int rows,
                    const Split<typename Format::Cached>& split, int64_t head_dim) {
  constexpr int kWidth = Format::kPairs ? 2 : 1;  // elements of v per value
  in_row_parts(rows, [&](int row, auto count) {
    const auto weigh = [&](int64_t column, auto columns) {
      const int64_t first = column * kLanes;
      Patch<count, columns> sums;
      clear<count, columns>(sums);
      for (int tile = 0; tile < split.tiles; ++tile) {
        weigh_patch<count, columns>(columns_from(&scratch.probs[row], tile * kBlockTokens),
                                    split.v[tile] + first * kWidth, head_dim, head_dim - first,
                                    sums);
      }
      for (int r = 0; r < count; ++r) {
        for (int c = 0; c < columns; ++c) {
          store(&scratch.part[row + r][first + c * kLanes], sums[c][r]);
        }
      }
    };
    const int64_t whole = head_dim / kLanes;
    in_column_steps<patch_columns(count)>(0, whole, weigh);
    if (whole * kLanes < head_dim) weigh(whole, std::integral_constant<int, 1>());
  });
}

}  // namespace
}  // namespace quire
