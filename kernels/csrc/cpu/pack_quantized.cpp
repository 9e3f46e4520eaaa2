// Packing of integer matrices [rows, k] into the panels of quantized_layout.h. See pack.cpp for how rows
// become columns. The destination is zeroed memory.

#include "quantized_layout.h"
#include "team.h"

namespace quire {
namespace {

struct QuantizedSource {
  const int8_t* values;  // [rows][k]
  const float* scales;   // [rows][groups]
  const int16_t* zeros;  // [rows][groups] or null: zero
  int64_t rows;
};

struct QuantizedDestination {
  char* data;
  QuantizedLayout layout;
  int64_t first;  // column of source row 0
  int64_t step;   // columns between source rows r and r + 16
};

void pack_header(const QuantizedSource& source, const QuantizedDestination& to, int64_t row,
                 int64_t column) {
  const int64_t groups = to.layout.groups();
  for (int64_t group = 0; group < groups; ++group) {
    char* header = to.data + to.layout.group_offset(column, group * to.layout.group_size);
    const int64_t lane = column % kPanel;
    std::memcpy(header + lane * 4, source.scales + row * groups + group, 4);
    if (source.zeros == nullptr) continue;
    const int16_t zero = source.zeros[row * groups + group];
    const int16_t pair[2] = {zero, zero};
    std::memcpy(header + kPanel * 4 + lane * 4, pair, 4);
  }
}

void pack_row(const QuantizedSource& source, const QuantizedDestination& to, int64_t row,
              int64_t column) {
  const QuantizedLayout& layout = to.layout;
  const int8_t* values = source.values + row * layout.k;
  pack_header(source, to, row, column);
  for (int64_t k = 0; k < layout.k; ++k) {
    char& byte = to.data[layout.value_offset(column, k)];
    if (layout.bits == 8) {
      byte = static_cast<char>(values[k]);
    } else {
      const int nibble = values[k] & 15;
      byte = static_cast<char>(byte | (layout.is_upper_half(k) ? nibble << 4 : nibble));
    }
  }
}

}  // namespace
}  // namespace quire

extern "C" {

// Bytes of a packed matrix of n columns.
int64_t quire_quantized_bytes(const quire::QuantizedLayout* layout, int64_t n) {
  return layout->bytes(n);
}

void quire_pack_quantized(quire::Team* team, const quire::QuantizedSource* source,
                          const quire::QuantizedDestination* destination) {
  using namespace quire;
  // A row's bytes are its own: rows of one byte or word never share it.
  team->parallel_for(source->rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t column = destination->first + row / 16 * destination->step + row % 16;
      pack_row(*source, *destination, row, column);
    }
  });
}
}
