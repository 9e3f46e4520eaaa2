// Kernels for AVX2 with FMA and F16C.

#include "kernel_table.h"

namespace quire {

const Kernels& avx2_kernels() {
  static constexpr Kernels table = make_table("avx2");
  return table;
}

}  // namespace quire
