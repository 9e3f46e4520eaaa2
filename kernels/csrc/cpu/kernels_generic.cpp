// Kernels for any target the compiler knows; no flags beyond its default.

#include "kernel_table.h"

namespace quire {

const Kernels& generic_kernels() {
  static constexpr Kernels table = make_table("generic");
  return table;
}

}  // namespace quire
