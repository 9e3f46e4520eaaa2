// Matmul on AMX tiles, for bf16. See gemm.h for the packed weights; a unit of them is one B tile.
//
//              B: 2 tiles = one panel (32 columns), a step of 32 k
//            +----+----+
//   A: 2 x   | C0 | C1 |  rows 0-15          tiles 0-3: C, 4-5: A, 6-7: B
//   16 rows  | C2 | C3 |  rows 16-31         4 loads feed 4 multiplications
//            +----+----+
//
// A lone row and the 32nd of a block take k in the same steps of 32, so they get the same bits.
// Rows are taken in blocks that stay in the L2 cache while a thread's panels stream past them; a
// panel is reused from L2 by every 32 rows, and while it is, the next one is fetched in even parts:
// fetching it all at its first use would leave the tiles idle and then the memory. For the same
// reason the epilogue of one block of rows (SiLU, conversion, ...) runs a row at a time between the
// multiplications of the next block: the tile unit works on its own while vectors are computed.
// Included once per instruction set; see simd.h.

#pragma once

#include "epilogue.h"
#include "tiles.h"

namespace quire {
namespace {

constexpr int64_t kTileRowBlockBytes = 1 << 20;  // of a 2 MiB L2

inline void configure_gemm_tiles() {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.set(tile, kTileRows, 64);
  configure(config);
}

// Spreads the fetching of [next, next + bytes) over `steps` calls.
class SpreadPrefetch {
 public:
  SpreadPrefetch(const void* next, int64_t bytes, int64_t steps)
      : next_(static_cast<const char*>(next)), bytes_(bytes), step_(ceil_div(bytes, steps)) {}

  void step() {
    const int64_t end = std::min(done_ + step_, bytes_);
    for (; done_ < end; done_ += 64) prefetch(next_ + done_);
  }

 private:
  const char* next_;
  int64_t bytes_;
  int64_t step_;
  int64_t done_ = 0;
};

// Results of the block of rows computed last, finished little by little.
template <class Finish>
class PendingRows {
 public:
  explicit PendingRows(const Finish& finish) : finish_(finish) {}

  // C tile `tile` of the block; all rows of the block before must be finished.
  float* tile(int tile) { return c_[tile]; }

  // The tiles have been filled, for `rows` rows from `row` on; finish them within `steps` calls.
  void start(int64_t row, int64_t rows, int64_t panel, int64_t steps) {
    row_ = row;
    rows_ = rows;
    panel_ = panel;
    next_ = 0;
    per_step_ = ceil_div(rows, steps);
  }

  void step() { finish_some(per_step_); }
  void drain() { finish_some(rows_ - next_); }

 private:
  void finish_some(int64_t count) {
    const int64_t end = std::min(next_ + count, rows_);
    for (; next_ < end; ++next_) {
      const float* low = c_[next_ / kTileRows * 2] + next_ % kTileRows * kLanes;
      finish_(row_ + next_, panel_, load(low), load(low + kTileFloats));
    }
  }

  const Finish& finish_;
  int64_t row_ = 0;
  int64_t rows_ = 0;
  int64_t panel_ = 0;
  int64_t next_ = 0;
  int64_t per_step_ = 0;
  alignas(64) float c_[4][kTileFloats];
};

// Sixteen rows of `in` times a panel, into C tiles 0 and 1. `beside()` is called for each 32 k.
template <class F>
void multiply_16_rows(const BFloat16* in, int64_t stride, const BFloat16* panel, int64_t k,
                      const F& beside) {
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t i = 0; i < k; i += kPanel, panel += kPanel * kPanel) {
    _tile_loadd(4, in + i, stride * 2);
    _tile_loadd(6, panel, 64);
    _tile_loadd(7, panel + kTileBytes / 2, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    beside();
  }
}

template <class F>
void multiply_32_rows(const BFloat16* in, int64_t stride, const BFloat16* panel, int64_t k,
                      const F& beside) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const BFloat16* lower = in + kTileRows * stride;
  for (int64_t i = 0; i < k; i += kPanel, panel += kPanel * kPanel) {
    _tile_loadd(4, in + i, stride * 2);
    _tile_loadd(6, panel, 64);
    _tile_loadd(7, panel + kTileBytes / 2, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, lower + i, stride * 2);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    beside();
  }
}

// Rows [begin, end) of one panel; the last block of them stays pending.
template <class Finish>
void amx_panel(const LinearArgs& args, int64_t begin, int64_t end, int64_t panel,
               PendingRows<Finish>& pending) {
  const int64_t k = round_up(args.k, kPanel);
  const int64_t elements = kPanel * k;
  const auto* weights = static_cast<const BFloat16*>(args.weights) + panel * elements;
  const int64_t block_steps = k / kPanel;
  const int64_t steps = ceil_div(end - begin, 2 * kTileRows) * block_steps;
  // With one block of rows this is a stream 8 KiB ahead of its use, else the whole next panel.
  const bool streams = end - begin <= 2 * kTileRows;
  SpreadPrefetch ahead(weights + (streams ? kPrefetchBytes / 2 : elements), elements * 2, steps);
  const auto beside = [&] {
    ahead.step();
    pending.step();
  };
  for (int64_t row = begin; row < end; row += 2 * kTileRows) {
    const BFloat16* in = row_of<BFloat16>(args.in, row);
    const int64_t rows = std::min<int64_t>(2 * kTileRows, end - row);
    if (rows <= kTileRows) {
      multiply_16_rows(in, args.in.stride, weights, k, beside);
      pending.drain();
    } else {
      multiply_32_rows(in, args.in.stride, weights, k, beside);
      pending.drain();
      _tile_stored(2, pending.tile(2), 64);
      _tile_stored(3, pending.tile(3), 64);
    }
    _tile_stored(0, pending.tile(0), 64);
    _tile_stored(1, pending.tile(1), 64);
    pending.start(row, rows, panel, block_steps);
  }
}

// `row_block` for tiles.
inline int64_t tile_row_block(const LinearArgs& args) {
  const int64_t fitting = kTileRowBlockBytes / (2 * round_up(args.k, kPanel));
  return std::max<int64_t>(2 * kTileRows, fitting / 32 * 32);
}

template <class Format>
int64_t best_gemm_items(const LinearArgs& args, int64_t rows) {
  if constexpr (!Format::kPairs) return gemm_items<Format>(args, rows);
  return num_panels(args) * ceil_div(rows, tile_row_block(args));
}

template <class Format, class Finish>
void best_gemm(const LinearArgs& args, int64_t rows, Range items, Workspace& space,
               const Finish& finish) {
  if constexpr (Format::kPairs) {  // too fast to leave memory idle: fetches nothing else
    configure_gemm_tiles();
    const int64_t panels = num_panels(args);
    const int64_t block = tile_row_block(args);
    PendingRows<Finish> pending(finish);
    for (int64_t item = items.begin; item < items.end; ++item) {
      const int64_t row = item / panels * block;
      amx_panel(args, row, std::min(row + block, rows), item % panels, pending);
    }
    pending.drain();
  } else {
    gemm<Format>(args, rows, items, space, finish);
  }
}

}  // namespace
}  // namespace quire
