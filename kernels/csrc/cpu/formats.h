// The three number formats a model runs in, as types that the kernels are instantiated with.
//
//            weights   activations   KV cache (order)
//   float32  float32   float32       float32  (LANES)
//   bfloat16 bf16      bf16          bf16     (PAIRS)
//   float16  fp16      float32       fp16     (LANES)
//
// The residual stream, norms, rotary embedding and softmax are float32 in all of them.
// Included once per instruction set; see simd.h.

#pragma once

#include "kernels.h"
#include "simd.h"

namespace quire {
namespace {

struct Float32Format {
  using Weight = float;
  using Activation = float;
  using Cached = float;
  static constexpr bool kPairs = false;
};

struct BFloat16Format {
  using Weight = BFloat16;
  using Activation = BFloat16;
  using Cached = BFloat16;
  static constexpr bool kPairs = true;
};

struct Float16Format {
  using Weight = Half;
  using Activation = float;
  using Cached = Half;
  static constexpr bool kPairs = false;
};

// Calls f with the format's type.
template <class F>
void with_format(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(Float32Format{});
    case DType::kBFloat16:
      return f(BFloat16Format{});
    case DType::kFloat16:
      return f(Float16Format{});
  }
}

// Items [begin, end) of an op.
struct Range {
  int64_t begin;
  int64_t end;
};

template <class T>
T* row_of(const Matrix& matrix, int64_t row) {
  return static_cast<T*>(matrix.data) + row * matrix.stride;
}

}  // namespace
}  // namespace quire
