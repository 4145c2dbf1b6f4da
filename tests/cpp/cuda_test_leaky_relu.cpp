// leaky_relu and leaky_relu_backward, in every type.
#include "cuda_test.h"

#include "cuda/leaky_relu.cu"

namespace dlkernels::test {
namespace {

const CudaTest leaky_relu_test("leaky_relu", [] {
  return each_type([](auto zero) {
    using T = decltype(zero);
    constexpr float kSlope = 0.25f;
    int wrong = 0;
    for (const int64_t n : {0, 1, 7, 8, 255, 4096, 20'001}) {
      CudaBuffer<T> x(n, 1), g(n, 2), y(n), gx(n);
      if (n > 7) x[0] = cuda::from_float<T>(NAN);
      wrong += cuda::leaky_relu(kDType<T>, x.data(), y.data(), kSlope, n, nullptr) != 0;
      wrong += cuda::leaky_relu_backward(kDType<T>, g.data(), x.data(), gx.data(), kSlope, n,
                                         nullptr) != 0;
      for (int64_t i = 0; i < n; ++i) {  // a quarter is exact but for float16's smallest numbers
        const double v = x.at(i);
        wrong += !close(y.at(i), v > 0 ? v : v * kSlope, 1e-7);
        wrong += !close(gx.at(i), v > 0 ? g.at(i) : g.at(i) * kSlope, 1e-7);
      }
    }
    return wrong;
  });
});

}  // namespace
}  // namespace dlkernels::test
