// AMX tile registers: configuration and the shapes that the kernels use.
//
// One `tdpbf16ps` multiplies a tile A [16 rows][32 k] of bf16 by a tile B [16 pairs of k][16 columns]
// [2] and adds to C [16][16] float32. Within one instruction the even and the odd k are summed
// apart and then added to C, so *how K is cut into instructions is part of the result*: every path
// to the same result must use the same cuts. The rows of A never influence one another.
// Included once per instruction set; see simd.h.

#pragma once

#include <immintrin.h>

#include <cstring>

namespace quire {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int row_count, int bytes) {
    rows[tile] = static_cast<uint8_t>(row_count);
    column_bytes[tile] = static_cast<uint16_t>(bytes);
  }
};

constexpr int kTileRows = 16;
constexpr int kTileFloats = kTileRows * 16;
constexpr int kTileBytes = 1024;

inline void configure(const TileConfig& config) {
  // GCC's intrinsic says that it reads 8 bytes; without this the other stores are dropped as dead.
  asm volatile("" : : "m"(config));
  _tile_loadconfig(&config);
}

}  // namespace
}  // namespace quire
