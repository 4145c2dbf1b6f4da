// Runs every registered test on every table, and once more with the guard pages moved.
#include "kernels_test.h"

using namespace dlkernels;

int main() {
  int wrong = 0, ran = 0;
  for (const cpu::Kernels* table : {&cpu::baseline, &cpu::avx2, &cpu::avx512}) {
    if (!cpu::set_isa(table->isa)) {
      std::printf("%s: this machine cannot run it\n", table->isa);
      continue;
    }
    for (const bool at_end : {true, false}) {
      test::guard_at_end = at_end;
      for (const auto& [name, run] : test::Test::all()) {
        const int bad = run(*table);
        if (bad) std::printf("%s %s: %d wrong\n", table->isa, name, bad);
        wrong += bad != 0, ++ran;
      }
    }
  }
  std::printf("kernels: %d passed, %d failed\n", ran - wrong, wrong);
  return wrong != 0 || ran == 0;
}
