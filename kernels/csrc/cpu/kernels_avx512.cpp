// Kernels for AVX-512 F, BW, VL, DQ.

#include "kernel_table.h"

namespace quire {

const Kernels& avx512_kernels() {
  static constexpr Kernels table = make_table("avx512");
  return table;
}

}  // namespace quire
