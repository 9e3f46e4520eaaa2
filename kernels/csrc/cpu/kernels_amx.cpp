// Kernels for AMX bf16 tiles; AVX-512 with BF16 for the rest.

#include "kernel_table.h"

namespace quire {

const Kernels& amx_kernels() {
  static constexpr Kernels table = make_table("amx");
  return table;
}

}  // namespace quire
