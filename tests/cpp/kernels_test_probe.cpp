#include "kernels_test.h"

using namespace dlkernels;
using namespace dlkernels::test;

static int multiply_add(const cpu::Kernels& t) {
  const double lanes = t.multiply_add_flops / 2;
  double chains = 0;  // of x = 0.5 * x + 0.5 from 0, 1, 2, ...
  const double width = lanes / 12;
  for (int c = 0; c < 12; ++c) chains += 1 + (c - 1) / 4.0;
  return !close(t.multiply_add(2), width * chains, 1e-3) + !close(t.multiply_add(99), lanes, 1e-3);
}
static const Test multiply_add_test("multiply_add", multiply_add);
