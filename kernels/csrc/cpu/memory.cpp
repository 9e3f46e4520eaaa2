// Large zeroed memory on huge pages, for weights, cache pool and activations.
//
// Streaming a model through 4 KiB pages costs 15-20 % of the bandwidth in page walks, so spans are
// aligned to 2 MiB and the kernel is asked for huge pages. Pages appear, zeroed, when first touched.

#include <cstdint>
#include <cstring>

#include "numbers.h"
#include "team.h"

#include <sys/mman.h>

namespace quire {
namespace {

constexpr int64_t kHugePage = 2 << 20;

}  // namespace
}  // namespace quire

extern "C" {

// Null where the system refuses. `bytes` is rounded up to huge pages.
void* quire_alloc(int64_t bytes) {
  using namespace quire;
  const auto size = static_cast<size_t>(round_up(bytes, kHugePage));
  const size_t mapped = size + kHugePage;  // room to align
  void* base = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return nullptr;
  const auto address = reinterpret_cast<uintptr_t>(base);
  const uintptr_t aligned = (address + kHugePage - 1) / kHugePage * kHugePage;
  if (aligned > address) munmap(base, aligned - address);
  const size_t after = mapped - (aligned - address) - size;
  if (after > 0) munmap(reinterpret_cast<void*>(aligned + size), after);
  auto* span = reinterpret_cast<void*>(aligned);
#if defined(MADV_HUGEPAGE)
  madvise(span, size, MADV_HUGEPAGE);  // advice: without huge pages all works, slower
#endif
  return span;
}

// Takes the address and size that quire_alloc was called with.
void quire_free(void* span, int64_t bytes) {
  munmap(span, static_cast<size_t>(quire::round_up(bytes, quire::kHugePage)));
}

// Copies whole blocks of a pool: pairs [count][2] of (from, to), in order. Threads take slices of a
// block and each applies all pairs to its slice, so a block just written may be copied on.
void quire_copy_blocks(quire::Team* team, char* pool, int64_t block_bytes, const int32_t* pairs,
                       int64_t count) {
  constexpr int64_t kSlice = 64 << 10;
  team->parallel_for(quire::ceil_div(block_bytes, kSlice), 1, [&](int64_t first, int64_t last) {
    const int64_t begin = first * kSlice;
    const int64_t end = std::min(last * kSlice, block_bytes);
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(pool + pairs[2 * i + 1] * block_bytes + begin,
                  pool + pairs[2 * i] * block_bytes + begin, static_cast<size_t>(end - begin));
    }
  });
}
}
