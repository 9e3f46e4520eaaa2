// The two products of attention on AMX tiles, for bf16 and head sizes that are multiples of 16.
//
//   scores   A = 16 query rows x 32 d     B = K tile, 16 pairs of d x 16 tokens     C [16][16 tokens]
//            (8 pairs and 16 d where the head size is no multiple of 32)
//   values   A = 16 rows x 16 tokens of P  B = V tile, 8 pairs of tokens x 16 d     C [16][16 d]
//
// Tiles: 0-3 C, 4 queries, 5 keys, 6 probabilities, 7 values. GCC wants these numbers as literals.
//
// Both B operands are read where they lie in the cache. Four C tiles are in flight: four token tiles
// of scores, or four column tiles of values that run over all tiles of the split. A block holds 16
// tokens, so values take 16 tokens per instruction: half of what a tile could, but the softmax in
// between costs more than both products.
// Included once per instruction set; see simd.h.

#pragma once

#include "tiles.h"

namespace quire {
namespace {

inline void configure_attention_tiles(int64_t dims) {
  TileConfig config;
  for (int c = 0; c < 4; ++c) config.set(c, kTileRows, 64);
  config.set(4, kTileRows, static_cast<int>(dims) * 2);
  config.set(5, static_cast<int>(dims) / 2, 64);
  config.set(6, kTileRows, kBlockTokens * 2);
  config.set(7, kBlockTokens / 2, 64);
  configure(config);
}

// The first COUNT of the C tiles.
template <int COUNT>
void zero_tiles() {
  if constexpr (COUNT > 0) _tile_zero(0);
  if constexpr (COUNT > 1) _tile_zero(1);
  if constexpr (COUNT > 2) _tile_zero(2);
  if constexpr (COUNT > 3) _tile_zero(3);
}

template <int COUNT>
void store_tiles(float* out, int64_t stride) {
  if constexpr (COUNT > 0) _tile_stored(0, out, stride * 4);
  if constexpr (COUNT > 1) _tile_stored(1, out + 16, stride * 4);
  if constexpr (COUNT > 2) _tile_stored(2, out + 32, stride * 4);
  if constexpr (COUNT > 3) _tile_stored(3, out + 48, stride * 4);
}

template <int C>
void score_tile(const BFloat16* k) {
  _tile_loadd(5, k, 64);
  if constexpr (C == 0) _tile_dpbf16ps(0, 4, 5);
  if constexpr (C == 1) _tile_dpbf16ps(1, 4, 5);
  if constexpr (C == 2) _tile_dpbf16ps(2, 4, 5);
  if constexpr (C == 3) _tile_dpbf16ps(3, 4, 5);
}

// Scores of 16 rows and COUNT token tiles.
template <int COUNT>
void score_tiles(const BFloat16* query, const BFloat16* const* k, int64_t head_dim, int64_t dims,
                 float* scores) {
  zero_tiles<COUNT>();
  for (int64_t d = 0; d < head_dim; d += dims) {
    _tile_loadd(4, query + d, kQueryStride * 2);
    const int64_t offset = d * kBlockTokens;
    if constexpr (COUNT > 0) score_tile<0>(k[0] + offset);
    if constexpr (COUNT > 1) score_tile<1>(k[1] + offset);
    if constexpr (COUNT > 2) score_tile<2>(k[2] + offset);
    if constexpr (COUNT > 3) score_tile<3>(k[3] + offset);
  }
  store_tiles<COUNT>(scores, kScoreStride);
}

template <int C>
void weigh_tile(const BFloat16* v, int64_t head_dim) {
  _tile_loadd(7, v + C * 32, head_dim * 4);
  if constexpr (C == 0) _tile_dpbf16ps(0, 6, 7);
  if constexpr (C == 1) _tile_dpbf16ps(1, 6, 7);
  if constexpr (C == 2) _tile_dpbf16ps(2, 6, 7);
  if constexpr (C == 3) _tile_dpbf16ps(3, 6, 7);
}

// 16 rows of output, COUNT x 16 columns from `column` on, over all tiles of the split.
template <int COUNT>
void weigh_tiles(const BFloat16* probs, const Split<BFloat16>& split, int64_t column,
                 int64_t head_dim, float* out) {
  zero_tiles<COUNT>();
  for (int tile = 0; tile < split.tiles; ++tile) {
    _tile_loadd(6, probs + tile * kBlockTokens, kProbStride * 2);
    const BFloat16* v = split.v[tile] + column * 2;
    if constexpr (COUNT > 0) weigh_tile<0>(v, head_dim);
    if constexpr (COUNT > 1) weigh_tile<1>(v, head_dim);
    if constexpr (COUNT > 2) weigh_tile<2>(v, head_dim);
    if constexpr (COUNT > 3) weigh_tile<3>(v, head_dim);
  }
  store_tiles<COUNT>(out + column, kOutStride);
}

// Calls f with a count of 4 for whole groups and of what is left for the last.
template <class F>
void in_fours(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) f(i, std::integral_constant<int, 4>());
  if (count - i == 3) f(i, std::integral_constant<int, 3>());
  if (count - i == 2) f(i, std::integral_constant<int, 2>());
  if (count - i == 1) f(i, std::integral_constant<int, 1>());
}

// The products for one head size; tiles are configured for it. Head sizes that tiles cannot cut, and
// float32 and float16, compute in lanes.
template <class Format>
class BestProducts {
 public:
  explicit BestProducts(int64_t head_dim)
      : tiled_(Format::kPairs && head_dim % 16 == 0), dims_(head_dim % 32 == 0 ? 32 : 16) {
    if (tiled_) configure_attention_tiles(dims_);
  }

  void score(AttentionScratch<Format>& scratch, int rows,
             const Split<typename Format::Cached>& split, int64_t head_dim) const {
    if constexpr (Format::kPairs) {
      if (tiled_) return score_tiled(scratch, rows, split, head_dim);
    }
    score_in_lanes<Format>(scratch, rows, split, head_dim);
  }

  void weigh(AttentionScratch<Format>& scratch, int rows,
             const Split<typename Format::Cached>& split, int64_t head_dim) const {
    if constexpr (Format::kPairs) {
      if (tiled_) return weigh_tiled(scratch, rows, split, head_dim);
    }
    weigh_in_lanes<Format>(scratch, rows, split, head_dim);
  }

 private:
  void score_tiled(AttentionScratch<Format>& scratch, int rows, const Split<BFloat16>& split,
                   int64_t head_dim) const {
    in_fours(split.tiles, [&](int64_t tile, auto count) {
      fetch_beside(split, tile, count, head_dim);
      for (int row = 0; row < rows; row += kTileRows) {
        score_tiles<count>(scratch.query[row], split.k + tile, head_dim, dims_,
                           &scratch.scores[row][tile * kBlockTokens]);
      }
    });
  }

  void weigh_tiled(AttentionScratch<Format>& scratch, int rows, const Split<BFloat16>& split,
                   int64_t head_dim) const {
    in_fours(head_dim / 16, [&](int64_t column, auto count) {
      for (int row = 0; row < rows; row += kTileRows) {
        weigh_tiles<count>(scratch.probs[row], split, column * 16, head_dim, scratch.part[row]);
      }
    });
  }

  bool tiled_;
  int64_t dims_;
};

}  // namespace
}  // namespace quire
