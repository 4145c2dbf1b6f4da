// relu and relu_backward: exact, in every type.
#include "cuda_test.h"

#include "cuda/relu.cu"

namespace dlkernels::test {
namespace {

const CudaTest relu_test("relu", [] {
  return each_type([](auto zero) {
    using T = decltype(zero);
    int wrong = 0;
    for (const int64_t n : {0, 1, 7, 8, 255, 4096, 20'001}) {
      CudaBuffer<T> x(n, 1), g(n, 2), y(n), gx(n);
      if (n > 7) {
        x[0] = cuda::from_float<T>(NAN);
        x[n - 1] = x[3] = cuda::from_float<T>(-0.0f);
      }
      wrong += cuda::relu(kDType<T>, x.data(), y.data(), n, nullptr) != 0;
      wrong += cuda::relu_backward(kDType<T>, g.data(), y.data(), gx.data(), n, nullptr) != 0;
      for (int64_t i = 0; i < n; ++i) {
        const double v = x.at(i);
        wrong += !close(y.at(i), v < 0 ? 0 : v, 0) || std::signbit(y.at(i)) != (v == 0);
        wrong += !close(gx.at(i), v <= 0 ? 0 : g.at(i), 0);
      }
    }
    return wrong;
  });
});

}  // namespace
}  // namespace dlkernels::test
