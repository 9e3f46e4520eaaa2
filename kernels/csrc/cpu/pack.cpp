// Packing of checkpoint matrices [rows, k] into the panels that the matmuls read (gemm.h).
//
// A packed matrix is made of slabs of 16 output columns; slab s is half s % 2 of panel s / 2:
//
//   pack_linear    consecutive rows of the stacked matrices fill consecutive columns
//   pack_gate_up   16 rows of gate fill the even slabs, 16 rows of up the odd ones
//
// Both are "source row r goes to column first + r / 16 * step + r % 16" with step 16 or 32. The
// destination is zeroed memory, so padding needs no writing. Sources are read once, in order, which
// suits a checkpoint that is mapped from disk.

#include <algorithm>

#include "kernels.h"
#include "team.h"

namespace quire {
namespace {

struct Source {
  const void* data;
  DType dtype;
  int64_t rows;
  int64_t k;
  int64_t row_stride;  // elements
};

struct Destination {
  void* data;
  DType dtype;
  int64_t first;  // column of source row 0
  int64_t step;   // columns between source rows r and r + 16
};

// Offset of element (column, k) in a packed matrix with K = `k_total`.
int64_t packed_offset(const BFloat16*, int64_t column, int64_t k, int64_t k_total) {
  const int64_t panel = column / kPanel * kPanel * round_up(k_total, kPanel);
  const int64_t block = k / kPanel * kPanel * kPanel;
  const int64_t half = column % kPanel / 16 * 512;
  return panel + block + half + k % kPanel / 2 * 32 + column % 16 * 2 + k % 2;
}

template <class T>
int64_t packed_offset(const T*, int64_t column, int64_t k, int64_t k_total) {
  return (column / kPanel * k_total + k) * kPanel + column % kPanel;
}

// Sixteen source rows (fewer at the end) into one slab; blocks of k keep both sides in cache.
template <class From, class To>
void pack_slab(const Source& source, const Destination& destination, int64_t slab) {
  const int64_t row = slab * 16;
  const int64_t rows = std::min<int64_t>(16, source.rows - row);
  const int64_t column = destination.first + slab * destination.step;
  auto* out = static_cast<To*>(destination.data);
  for (int64_t begin = 0; begin < source.k; begin += kPanel) {
    const int64_t end = std::min<int64_t>(begin + kPanel, source.k);
    for (int64_t r = 0; r < rows; ++r) {
      const From* in = static_cast<const From*>(source.data) + (row + r) * source.row_stride;
      for (int64_t k = begin; k < end; ++k) {
        out[packed_offset(out, column + r, k, source.k)] = from_float<To>(to_float(in[k]));
      }
    }
  }
}

template <class From>
void pack_slab_to(const Source& source, const Destination& destination, int64_t slab) {
  switch (destination.dtype) {
    case DType::kFloat32:
      return pack_slab<From, float>(source, destination, slab);
    case DType::kBFloat16:
      return pack_slab<From, BFloat16>(source, destination, slab);
    case DType::kFloat16:
      return pack_slab<From, Half>(source, destination, slab);
  }
}

void pack_slab_from(const Source& source, const Destination& destination, int64_t slab) {
  switch (source.dtype) {
    case DType::kFloat32:
      return pack_slab_to<float>(source, destination, slab);
    case DType::kBFloat16:
      return pack_slab_to<BFloat16>(source, destination, slab);
    case DType::kFloat16:
      return pack_slab_to<Half>(source, destination, slab);
  }
}

}  // namespace
}  // namespace quire

extern "C" {

// Elements of a packed matrix of n columns.
int64_t quire_packed_elements(int32_t dtype, int64_t n, int64_t k) {
  using namespace quire;
  const bool pairs = static_cast<DType>(dtype) == DType::kBFloat16;
  return round_up(n, kPanel) * (pairs ? round_up(k, kPanel) : k);
}

// Packs one source. A stacked source need not start on a slab: `first` may be any column when `step`
// is 16, because a slab's rows then go to consecutive columns.
void quire_pack(quire::Team* team, const quire::Source* source,
                const quire::Destination* destination) {
  using namespace quire;
  team->parallel_for(ceil_div(source->rows, 16), 4, [&](int64_t begin, int64_t end) {
    for (int64_t slab = begin; slab < end; ++slab) pack_slab_from(*source, *destination, slab);
  });
}
}
