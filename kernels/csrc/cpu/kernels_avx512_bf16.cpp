// Kernels for AVX-512 with BF16 dot products.

#include "kernel_table.h"

namespace quire {

const Kernels& avx512_bf16_kernels() {
  static constexpr Kernels table = make_table("avx512_bf16");
  return table;
}

}  // namespace quire
