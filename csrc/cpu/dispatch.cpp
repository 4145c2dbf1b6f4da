// One choice of instruction set for the whole library, made once, outside every loop.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

namespace dlkernels::cpu {

// The tables this machine can run, best first, null-terminated.
static const Kernels* const* supported() {
  static const Kernels* tables[4] = {};
  if (tables[0]) return tables;
  int count = 0;
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    tables[count++] = &avx512;
  if (has_avx2) tables[count++] = &avx2;
#endif
  tables[count] = &baseline;
  return tables;
}

// 0 baseline, 1 AVX2, 2 AVX-512 or no wish. "default" is ATen's word for its baseline.
static int level(const char* isa) {
  if (!isa) return 2;
  if (!std::strcmp(isa, "baseline") || !std::strcmp(isa, "default")) return 0;
  return std::strcmp(isa, "avx2") ? 2 : 1;
}

static const Kernels* choose() {
  const int wanted = level(std::getenv("DLKERNELS_ISA"));
  const int torch_wants = level(std::getenv("ATEN_CPU_CAPABILITY"));
  const Kernels* const* table = supported();
  while (level((*table)->isa) > (wanted < torch_wants ? wanted : torch_wants)) ++table;
  return *table;
}

static std::atomic<const Kernels*> current{choose()};

const Kernels& kernels() { return *current.load(std::memory_order_relaxed); }

bool multiplies_bfloat16() {
#if defined(__x86_64__)
  static const bool does = __builtin_cpu_supports("avx512bf16");
  return does && &kernels() == &avx512;
#else
  return false;
#endif
}

bool set_isa(const char* isa) {
  for (const Kernels* const* table = supported(); *table; ++table)
    if (!std::strcmp((*table)->isa, isa)) return current = *table, true;
  return false;
}

}  // namespace dlkernels::cpu
