// Runs every registered test on every table, and once more with the guard pages moved:
// kernels_test [random cases a test] [their seed] [one instruction set] [one side of the buffers].
#include "kernels_test.h"

using namespace dlkernels;

int main(int argc, char** argv) {
  if (argc > 1) test::random_cases = std::atoi(argv[1]);
  if (argc > 2) test::random_seed = static_cast<uint32_t>(std::strtoul(argv[2], nullptr, 10));
  int wrong = 0, ran = 0, cannot_run = 0;
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    if (argc > 3 && std::strcmp(isa, argv[3])) continue;
    if (!cpu::set_isa(isa)) {
      std::printf("%s: this machine cannot run it\n", isa);
      ++cannot_run;
      continue;
    }
    for (const bool at_end : {true, false}) {
      if (argc > 4 && std::strcmp(at_end ? "end" : "begin", argv[4])) continue;
      test::guard_at_end = at_end;
      for (const auto& [name, run] : test::Test::all()) {
        const int bad = run(cpu::kernels());
        if (bad) std::printf("%s %s: %d wrong\n", isa, name, bad);
        wrong += bad != 0, ++ran;
      }
    }
  }
  std::printf("kernels: %d passed, %d failed; %d random cases each, seed %u\n", ran - wrong, wrong,
              test::random_cases, test::random_seed);
  return wrong != 0 || ran + cannot_run == 0;
}
