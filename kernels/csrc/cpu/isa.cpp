// Chooses the kernels' instruction set, once: the best that was built, that the processor has and
// that the operating system saves; QUIRE_CPU_ISA lowers the choice.
//
// setup.py defines QUIRE_HAVE_<ISA> for what the compiler could build.

#include <cstdlib>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace quire {
namespace {

#if defined(__x86_64__)

struct CpuidLeaf {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;

  CpuidLeaf(unsigned leaf, unsigned subleaf) {
    __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx);
  }
};

bool has(unsigned flags, int bit) { return (flags >> bit & 1u) != 0; }

// Which register states the operating system saves on a context switch (XCR0).
uint64_t saved_states() {
  if (!has(CpuidLeaf(1, 0).ecx, 27)) return 0;  // OSXSAVE
  unsigned low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

bool saves(uint64_t states) { return (saved_states() & states) == states; }

bool has_avx2() {
  const unsigned basic = CpuidLeaf(1, 0).ecx;
  return saves(0x6) && has(basic, 12) && has(basic, 29) && has(CpuidLeaf(7, 0).ebx, 5);
}

bool has_avx512() {
  const unsigned flags = CpuidLeaf(7, 0).ebx;
  return has_avx2() && saves(0xe6) && has(flags, 16) && has(flags, 17) && has(flags, 30) &&
         has(flags, 31);
}

// Every processor with BF16 dot products has the integer ones (VNNI) too; a virtual machine may hide them.
bool has_avx512_bf16() {
  return has_avx512() && has(CpuidLeaf(7, 0).ecx, 11) && has(CpuidLeaf(7, 1).eax, 5);
}

// Linux gives a process the large tile registers only when it asks.
bool permitted_to_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_amx() {
  const unsigned flags = CpuidLeaf(7, 0).edx;
  return has_avx512_bf16() && saves(0x60000) && has(flags, 22) && has(flags, 24) &&
         permitted_to_use_tiles();
}

#endif

enum Level { kGeneric, kAvx2, kAvx512, kAvx512Bf16, kAmx };

Level allowed_level() {
  const char* name = std::getenv("QUIRE_CPU_ISA");
  if (name == nullptr) return kAmx;
  if (std::strcmp(name, "generic") == 0) return kGeneric;
  if (std::strcmp(name, "avx2") == 0) return kAvx2;
  if (std::strcmp(name, "avx512") == 0) return kAvx512;
  if (std::strcmp(name, "avx512_bf16") == 0) return kAvx512Bf16;
  return kAmx;  // names are checked in kernels/cpu/library.py
}

const Kernels& choose() {
  [[maybe_unused]] const Level level = allowed_level();
#if defined(QUIRE_HAVE_AMX)
  if (level >= kAmx && has_amx()) return amx_kernels();
#endif
#if defined(QUIRE_HAVE_AVX512_BF16)
  if (level >= kAvx512Bf16 && has_avx512_bf16()) return avx512_bf16_kernels();
#endif
#if defined(QUIRE_HAVE_AVX512)
  if (level >= kAvx512 && has_avx512()) return avx512_kernels();
#endif
#if defined(QUIRE_HAVE_AVX2)
  if (level >= kAvx2 && has_avx2()) return avx2_kernels();
#endif
  return generic_kernels();
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace quire

extern "C" const char* quire_isa() { return quire::kernels().name; }
