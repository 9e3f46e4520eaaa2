// Paged causal attention, one kernel for prompt chunks and for single tokens.
//
// Work item: up to 32 rows x one KV head. A row is (token, query head of the group); consecutive
// tokens of a sequence with all heads of the group, so a decode token and a prompt token are the
// same thing and every key and value tile read serves all rows.
//
//   context   | split 0: tokens 0..255      | split 1: 256..511           | ...
//             | tile 0 | tile 1 | ... | 15  |   tile = one cache block of 16 tokens
//
//   per split:  S[row][token] = q . k              16 tokens at a time
//               m = max over visible tokens, P = exp(scale * S - m), l = sum P
//               O[row][d] = sum over the split's tiles, in order, of P v
//   splits merge in order:  M' = max(M, m);  O = O e^(M-M') + o e^(m-M');  L likewise
//   result      O / L
//
// Splits lie at absolute positions, and a token that a row may not see adds exactly zero. So a row's
// result has the same bits however its prompt was chunked and whichever rows are beside it. Tokens
// behind the context's end are never used in arithmetic: their scores are replaced, their values
// (which 0 * NaN would let through) zeroed in a copy of the last tile.
// Included once per instruction set; see simd.h.

#pragma once

#include <limits>

#include "formats.h"
#include "gemm.h"

namespace quire {
namespace {

constexpr int kSplitTiles = 16;
constexpr int kSplitTokens = kSplitTiles * kBlockTokens;
// Strides are an odd number of cache lines: rows of a tile then spread over the L1 cache's sets.
constexpr int kQueryStride = kMaxHeadDim + 32;
constexpr int kScoreStride = kSplitTokens + 16;
constexpr int kProbStride = kSplitTokens + 32;
constexpr int kOutStride = kMaxHeadDim + 16;

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Probabilities are as wide as the values they multiply.
template <class Format>
using Prob = typename Format::Activation;

// One thread's work space.
template <class Format>
struct AttentionScratch {
  alignas(64) typename Format::Activation query[kAttentionRows][kQueryStride];
  alignas(64) float scores[kAttentionRows][kScoreStride];
  alignas(64) Prob<Format> probs[kAttentionRows][kProbStride];
  alignas(64) float part[kAttentionRows][kOutStride];  // of the current split
  alignas(64) float out[kAttentionRows][kOutStride];   // of the splits merged so far
  alignas(64) typename Format::Cached last_values[kBlockTokens * kMaxHeadDim];
};

// The tiles of one split that some row of the item sees.
template <class Cached>
struct Split {
  int first_token;  // absolute position of tile 0's first token
  int tiles;
  bool is_cold;  // read by this item alone, so not in the cache yet
  const Cached* k[kSplitTiles];
  const Cached* v[kSplitTiles];
};

// A row's share of softmax: largest scaled score and sum of exp; sum 0 when nothing was seen.
struct Mass {
  float max = kMinusInfinity;
  float sum = 0.0f;
};

// The tokens [begin, end) that a row sees.
struct Sight {
  int begin;
  int end;
};

// Offsets a pointer to an array type without changing its type.
template <class T, int N>
const T (*columns_from(const T (*rows)[N], int64_t column))[N] {
  return reinterpret_cast<const T(*)[N]>(&rows[0][column]);
}

constexpr int kTilesAhead = 4;

template <class T>
void prefetch_tiles(const T* const* tiles, int64_t count, int64_t head_dim) {
  for (int64_t i = 0; i < count; ++i) {
    prefetch_span(tiles[i], kBlockTokens * head_dim * static_cast<int64_t>(sizeof(T)));
  }
}

// While `count` tiles from `tile` on are scored, fetches the keys of those behind them, and their
// values. Blocks of a sequence are scattered over the pool: no hardware prefetcher finds the next.
template <class T>
void fetch_beside(const Split<T>& split, int64_t tile, int64_t count, int64_t head_dim) {
  if (!split.is_cold) return;
  const int64_t begin = tile == 0 ? 0 : std::min<int64_t>(split.tiles, tile + kTilesAhead);
  const int64_t end = std::min<int64_t>(split.tiles, tile + count + kTilesAhead);
  prefetch_tiles(split.k + begin, end - begin, head_dim);
  prefetch_tiles(split.v + tile, count, head_dim);
}

// ---- softmax --------------------------------------------------------------------------------------

// The exponential of softmax. Where probabilities are rounded to bf16 it is a rough one to the base
// 2, and scores are scaled by log2 e beforehand.
template <class Format>
struct Exponential {
  static float scale(float scale) { return Format::kPairs ? scale * kLog2E : scale; }
  static Lanes of(Lanes x) {
    if constexpr (Format::kPairs) return rough_exp2(x);
    return exp(x);
  }
};

// Turns one row's scores of a split into probabilities; tokens out of sight get exactly 0.
template <class Format>
Mass softmax_row(const float* scores, Prob<Format>* probs, int tiles, Sight sight, float scale) {
  const int first = std::min(std::max(sight.begin, 0) / kLanes, tiles);
  const int last = std::max(first, std::min((sight.end + kLanes - 1) / kLanes, tiles));
  const auto in_sight = [&](int tile, Lanes x, float other) {
    if (tile != first && tile != last - 1) return x;
    const int start = tile * kLanes;
    return keep(x, std::max(sight.begin - start, 0), std::min(sight.end - start, kLanes),
                splat(other));
  };
  for (int tile = 0; tile < first; ++tile) store(probs + tile * kLanes, splat(0.0f));
  for (int tile = last; tile < tiles; ++tile) store(probs + tile * kLanes, splat(0.0f));
  if (first == last) return {};
  Lanes max_lanes = splat(kMinusInfinity);
  for (int tile = first; tile < last; ++tile) {
    max_lanes = max(max_lanes, in_sight(tile, load(scores + tile * kLanes), kMinusInfinity));
  }
  Mass mass;
  mass.max = largest(max_lanes) * scale;
  Lanes sum_lanes = splat(0.0f);
  for (int tile = first; tile < last; ++tile) {
    const Lanes x = fma(load(scores + tile * kLanes), splat(scale), splat(-mass.max));
    const Lanes p = in_sight(tile, Exponential<Format>::of(x), 0.0f);
    sum_lanes = sum_lanes + p;
    store(probs + tile * kLanes, p);
  }
  mass.sum = sum(sum_lanes);
  return mass;
}

// Adds a split's part to what the splits before it gave.
template <class Format>
void merge(Mass& total, float* out, const Mass& mass, const float* part, int64_t head_dim) {
  if (mass.sum == 0.0f) return;
  if (total.sum == 0.0f) {
    std::memcpy(out, part, head_dim * sizeof(float));
    total = mass;
    return;
  }
  const float max = std::max(total.max, mass.max);
  const Lanes before = Exponential<Format>::of(splat(total.max - max));
  const Lanes now = Exponential<Format>::of(splat(mass.max - max));
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    // Columns past head_dim exist in both rows; what they hold is not used.
    store(out + d, fma(load(out + d), before, load(part + d) * now));
  }
  total.sum = first(fma(splat(total.sum), before, splat(mass.sum) * now));
  total.max = max;
}

}  // namespace
}  // namespace quire

#include "attention_lanes.h"
#if defined(__AMX_BF16__)
#include "attention_amx.h"
#endif

namespace quire {
namespace {

#if !defined(__AMX_BF16__)
template <class Format>
struct BestProducts {
  explicit BestProducts(int64_t) {}
  void score(AttentionScratch<Format>& scratch, int rows,
             const Split<typename Format::Cached>& split, int64_t head_dim) const {
    score_in_lanes<Format>(scratch, rows, split, head_dim);
  }
  void weigh(AttentionScratch<Format>& scratch, int rows,
             const Split<typename Format::Cached>& split, int64_t head_dim) const {
    weigh_in_lanes<Format>(scratch, rows, split, head_dim);
  }
};
#endif

// ---- one work item ---------------------------------------------------------------------------------

template <class Format>
class AttentionItem {
 public:
  using Activation = typename Format::Activation;
  using Cached = typename Format::Cached;

  // Query heads [head, head + heads) of `kv_head`'s group, for the tokens of `group`.
  AttentionItem(const AttentionArgs& args, const Step& step, const QueryGroup& group,
                int64_t kv_head, int64_t head, int64_t heads, AttentionScratch<Format>& scratch)
      : args_(args),
        step_(step),
        group_(group),
        kv_head_(kv_head),
        head_(head),
        heads_(heads),
        rows_(static_cast<int>(group.count * heads)),
        hd_(args.shape.head_dim),
        scratch_(scratch) {}

  void run(const BestProducts<Format>& products) {
    gather_queries();
    Mass total[kAttentionRows];
    const float scale = Exponential<Format>::scale(args_.scale);
    const int first = sight(0).begin / kSplitTokens;
    const int last = (sight(rows_ - 1).end - 1) / kSplitTokens;
    for (int index = first; index <= last; ++index) {
      const Split<Cached> split = tiles_of(index);
      products.score(scratch_, rows_, split, hd_);
      Mass mass[kAttentionRows];
      for (int row = 0; row < rows_; ++row) {
        Sight seen = sight(row);
        seen.begin -= split.first_token;
        seen.end -= split.first_token;
        mass[row] = softmax_row<Format>(scratch_.scores[row], scratch_.probs[row], split.tiles,
                                        seen, scale);
      }
      products.weigh(scratch_, rows_, split, hd_);
      for (int row = 0; row < rows_; ++row) {
        merge<Format>(total[row], scratch_.out[row], mass[row], scratch_.part[row], hd_);
      }
    }
    write(total);
  }

 private:
  Sight sight(int row) const {
    const int end = step_.args.positions[group_.row + row / heads_] + 1;
    const auto window = static_cast<int>(args_.window);
    return {window == 0 ? 0 : std::max(0, end - window), end};
  }

  // Rows lie one after the other, padded with zeros for products that take d in larger steps.
  void gather_queries() {
    for (int row = 0; row < rows_; ++row) {
      const Activation* query =
          row_of<Activation>(args_.qkv, group_.row + row / heads_) + (head_ + row % heads_) * hd_;
      Activation* copy = scratch_.query[row];
      std::memcpy(copy, query, hd_ * sizeof(Activation));
      std::memset(copy + hd_, 0, (round_up(hd_, 32) - hd_) * sizeof(Activation));
    }
  }

  Split<Cached> tiles_of(int index) {
    const int begin = std::max(index * kSplitTiles, sight(0).begin / kBlockTokens);
    const int end = std::min((index + 1) * kSplitTiles,
                             (sight(rows_ - 1).end + kBlockTokens - 1) / kBlockTokens);
    Split<Cached> split;
    split.first_token = begin * kBlockTokens;
    split.tiles = end - begin;
    split.is_cold = group_.count == 1;
    const int32_t* table = step_.block_table(group_.sequence);
    for (int tile = begin; tile < end; ++tile) {
      const char* k = step_.k_tile(table[tile], kv_head_, args_.shape.layer);
      split.k[tile - begin] = reinterpret_cast<const Cached*>(k);
      split.v[tile - begin] = split.k[tile - begin] + kBlockTokens * hd_;
    }
    const int context = step_.args.context_lens[group_.sequence];
    if (end * kBlockTokens > context) {
      const Cached*& values = split.v[split.tiles - 1];
      copy_values(values, context - (end - 1) * kBlockTokens);
      values = scratch_.last_values;
    }
    return split;
  }

  // Copies a V tile's first `tokens` tokens and zeroes the rest.
  void copy_values(const Cached* tile, int tokens) {
    constexpr int kTogether = Format::kPairs ? 2 : 1;  // tokens that interleave
    Cached* copy = scratch_.last_values;
    const int64_t whole = tokens / kTogether * kTogether * hd_;
    std::memcpy(copy, tile, whole * sizeof(Cached));
    std::memset(copy + whole, 0, (kBlockTokens * hd_ - whole) * sizeof(Cached));
    if (tokens % kTogether != 0) {
      for (int64_t d = 0; d < hd_; ++d) copy[whole + 2 * d] = tile[whole + 2 * d];
    }
  }

  void write(const Mass* total) const {
    for (int row = 0; row < rows_; ++row) {
      Activation* out =
          row_of<Activation>(args_.out, group_.row + row / heads_) + (head_ + row % heads_) * hd_;
      const Lanes scale = splat(1.0f / total[row].sum);
      for (int64_t d = 0; d < hd_; d += kLanes) {
        store_some(out + d, load(&scratch_.out[row][d]) * scale, hd_ - d);
      }
    }
  }

  const AttentionArgs& args_;
  const Step& step_;
  const QueryGroup& group_;
  const int64_t kv_head_;
  const int64_t head_;
  const int64_t heads_;
  const int rows_;
  const int64_t hd_;
  AttentionScratch<Format>& scratch_;
};

// How the query heads of a KV head are cut where they are more than an item's rows.
struct HeadParts {
  int64_t group;  // query heads per KV head
  int64_t heads;  // per item
  int64_t parts;  // items per KV head and query group

  explicit HeadParts(const HeadShape& shape)
      : group(shape.num_heads / shape.num_kv_heads),
        heads(std::min<int64_t>(group, kAttentionRows)),
        parts(ceil_div(group, heads)) {}
};

inline int64_t attention_items(const AttentionArgs& args, const Step& step) {
  const auto groups = static_cast<int64_t>(step.groups.size());
  return groups * args.shape.num_kv_heads * HeadParts(args.shape).parts;
}

template <class Format>
void attention(const AttentionArgs& args, const Step& step, Range items, char* space) {
  const HeadParts cut(args.shape);
  const int64_t per_group = args.shape.num_kv_heads * cut.parts;
  auto& scratch = *reinterpret_cast<AttentionScratch<Format>*>(space);
  const BestProducts<Format> products(args.shape.head_dim);
  for (int64_t item = items.begin; item < items.end; ++item) {
    const int64_t kv_head = item % per_group / cut.parts;
    const int64_t first = item % cut.parts * cut.heads;  // within the KV head's group
    const int64_t heads = std::min(cut.heads, cut.group - first);
    AttentionItem<Format>(args, step, step.groups[item / per_group], kv_head,
                          kv_head * cut.group + first, heads, scratch)
        .run(products);
  }
}

}  // namespace
}  // namespace quire
