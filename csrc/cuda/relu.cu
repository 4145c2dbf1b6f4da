// y[i] = max(0, x[i]); grad_x[i] = y[i] <= 0 ? 0 : grad_y[i].
#include "cuda/elementwise.cuh"

namespace dlkernels::cuda {

namespace {

struct Relu {
  template <class T>
  __device__ T operator()(T x, T) const {
    return to_float(x) < 0 ? from_float<T>(0) : x;  // NaN and -0.0 are not < 0
  }
};
struct ReluBackward {
  template <class T>
  __device__ T operator()(T grad_y, T y) const {
    return to_float(y) <= 0 ? from_float<T>(0) : grad_y;
  }
};

}  // namespace

Error relu(DType dtype, const void* x, void* y, int64_t n, Stream stream) {
  return map<false>(dtype, x, nullptr, y, n, stream, Relu());
}

Error relu_backward(DType dtype, const void* grad_y, const void* y, void* grad_x, int64_t n,
                    Stream stream) {
  return map<true>(dtype, grad_y, y, grad_x, n, stream, ReluBackward());
}

}  // namespace dlkernels::cuda
