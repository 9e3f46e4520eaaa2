// After the QKV matmul: per-head RMSNorm (optional) and rotation of q and k, and the write of k and
// v into the cache.
//
// An item is (run of rows in one cache block) x (KV head), so that one thread owns the cache lines
// of a tile: neighbouring tokens interleave in them.
//
//   PAIRS  K [hd / 2][16 tokens][2]    V [8 pairs of tokens][hd][2]    bf16
//   LANES  K [hd][16 tokens]           V [16 tokens][hd]               fp32, fp16
//
// Included once per instruction set; see simd.h.

#pragma once

#include "elementwise.h"
#include "formats.h"

namespace quire {
namespace {

// Rotates the halves of the first rotary_dim elements: (a, b) -> (a cos - b sin, b cos + a sin).
inline void rotate(float* x, const float* cos, const float* sin, int64_t rotary_dim) {
  const int64_t half = rotary_dim / 2;
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t n = half - i;
    const Lanes a = load_some(x + i, n);
    const Lanes b = load_some(x + half + i, n);
    const Lanes c = load_some(cos + i, n);
    const Lanes s = load_some(sin + i, n);
    store_some(x + i, a * c - b * s, n);
    store_some(x + half + i, fma(a, s, b * c), n);
  }
}

template <class From, class To>
void convert(const From* from, To* to, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store_some(to + i, load_some(from + i, n - i), n - i);
}

// One head of one row: normalised if `norm`, rotated for its position.
template <class From, class To>
void turn_head(const RopeArgs& args, const float* norm, int64_t position, const From* in, To* out) {
  alignas(64) float x[kMaxHeadDim];
  const int64_t n = args.shape.head_dim;
  convert(in, x, n);
  if (norm != nullptr) normalise(x, norm, n, args.eps, x);
  const int64_t half = args.rotary_dim / 2;
  rotate(x, args.cos + position * half, args.sin + position * half, args.rotary_dim);
  convert(x, out, n);
}

// `heads` [count][kMaxHeadDim] into slots [slot, slot + count) of a K tile.
inline void write_k(const BFloat16 (*heads)[kMaxHeadDim], const BlockRun& run, int64_t head_dim,
                    BFloat16* tile) {
  for (int64_t pair = 0; pair < head_dim / 2; ++pair) {
    for (int i = 0; i < run.count; ++i) {
      std::memcpy(tile + (pair * kBlockTokens + run.slot + i) * 2, heads[i] + 2 * pair, 4);
    }
  }
}

template <class T>
void write_k(const T (*heads)[kMaxHeadDim], const BlockRun& run, int64_t head_dim, T* tile) {
  for (int64_t d = 0; d < head_dim; ++d) {
    for (int i = 0; i < run.count; ++i) tile[d * kBlockTokens + run.slot + i] = heads[i][d];
  }
}

inline void write_v(const BFloat16 (*heads)[kMaxHeadDim], const BlockRun& run, int64_t head_dim,
                    BFloat16* tile) {
  for (int i = 0; i < run.count; ++i) {
    const int slot = run.slot + i;
    BFloat16* out = tile + slot / 2 * head_dim * 2 + slot % 2;
    for (int64_t d = 0; d < head_dim; ++d) out[2 * d] = heads[i][d];
  }
}

template <class T>
void write_v(const T (*heads)[kMaxHeadDim], const BlockRun& run, int64_t head_dim, T* tile) {
  for (int i = 0; i < run.count; ++i) {
    std::memcpy(tile + (run.slot + i) * head_dim, heads[i], head_dim * sizeof(T));
  }
}

// The tile's lines come from memory while the heads are still being rotated.
inline void prefetch_for_write(char* tile, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(tile + i, 1, 2);
}

template <class Format>
void rope_run(const RopeArgs& args, const Step& step, const BlockRun& run, int64_t kv_head) {
  using Activation = typename Format::Activation;
  using Cached = typename Format::Cached;
  const HeadShape& shape = args.shape;
  const int64_t hd = shape.head_dim;
  char* k_tile = step.k_tile(run.block, kv_head, shape.layer);
  char* v_tile = step.v_tile(run.block, kv_head, shape.layer);
  prefetch_for_write(k_tile, 2 * step.cache.tile_bytes(step.dtype));
  const int64_t group = shape.num_heads / shape.num_kv_heads;
  alignas(64) Cached keys[kBlockTokens][kMaxHeadDim];
  alignas(64) Cached values[kBlockTokens][kMaxHeadDim];
  for (int i = 0; i < run.count; ++i) {
    auto* qkv = row_of<Activation>(args.qkv, run.row + i);
    const int64_t position = step.args.positions[run.row + i];
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      turn_head(args, args.q_norm, position, qkv + head * hd, qkv + head * hd);
    }
    const Activation* k = qkv + (shape.num_heads + kv_head) * hd;
    turn_head(args, args.k_norm, position, k, keys[i]);
    convert(k + shape.num_kv_heads * hd, values[i], hd);
  }
  write_k(keys, run, hd, reinterpret_cast<Cached*>(k_tile));
  write_v(values, run, hd, reinterpret_cast<Cached*>(v_tile));
}

inline int64_t rope_items(const RopeArgs& args, const Step& step) {
  return static_cast<int64_t>(step.runs.size()) * args.shape.num_kv_heads;
}

template <class Format>
void rope_and_cache(const RopeArgs& args, const Step& step, Range items) {
  const int64_t heads = args.shape.num_kv_heads;
  for (int64_t item = items.begin; item < items.end; ++item) {
    rope_run<Format>(args, step, step.runs[item / heads], item % heads);
  }
}

}  // namespace
}  // namespace quire
