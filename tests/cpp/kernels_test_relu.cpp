#include "kernels_test.h"

using namespace dlkernels;
using namespace dlkernels::test;

static int relu(const cpu::Kernels& t) {
  int wrong = 0;
  for (int64_t n = 0; n <= 67; ++n) {
    Buffer<float> x(n, 1), y(n), grad_y(n, 2), grad_x(n);
    if (n > 2) x[1] = NAN, x[2] = -0.0f;
    together([&] { t.relu(x.data(), y.data(), 0, n / 3); },
             [&] { t.relu(x.data(), y.data(), n / 3, n); });
    together([&] { t.relu_backward(grad_y.data(), y.data(), grad_x.data(), 0, n / 3); },
             [&] { t.relu_backward(grad_y.data(), y.data(), grad_x.data(), n / 3, n); });
    for (int64_t i = 0; i < n; ++i) {
      const float expected = x[i] < 0 ? 0.0f : x[i];
      wrong += std::memcmp(&y[i], &expected, sizeof expected) != 0;
      wrong += grad_x[i] != (x[i] <= 0 ? 0.0f : grad_y[i]);
    }
  }
  return wrong;
}
static const Test relu_test("relu", relu);
