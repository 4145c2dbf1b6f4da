#include "kernels_test.h"

using namespace dlkernels;
using namespace dlkernels::test;

static int leaky_relu(const cpu::Kernels& t) {
  int wrong = 0;
  for (const float slope : {0.01f, 0.0f, -2.0f})
    for (int64_t n = 0; n <= 67; ++n) {
      Buffer<float> x(n, 1), y(n), grad_y(n, 2), grad_x(n);
      if (n > 2) x[1] = NAN, x[2] = -0.0f;
      const auto forward = [&](int64_t begin, int64_t end) {
        t.leaky_relu(x.data(), y.data(), slope, begin, end);
      };
      const auto backward = [&](int64_t begin, int64_t end) {
        t.leaky_relu_backward(grad_y.data(), x.data(), grad_x.data(), slope, begin, end);
      };
      together([&] { forward(0, n / 3); }, [&] { forward(n / 3, n); });
      together([&] { backward(0, n / 3); }, [&] { backward(n / 3, n); });
      for (int64_t i = 0; i < n; ++i) {
        const float expected = x[i] > 0 ? x[i] : x[i] * slope;
        wrong += std::memcmp(&y[i], &expected, sizeof expected) != 0;
        wrong += grad_x[i] != (x[i] > 0 ? grad_y[i] : grad_y[i] * slope);
      }
    }
  return wrong;
}
static const Test leaky_relu_test("leaky_relu", leaky_relu);
