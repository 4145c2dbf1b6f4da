// y[i] = x[i] > 0 ? x[i] : x[i] * slope; grad_x[i] = x[i] > 0 ? grad_y[i] : grad_y[i] * slope.
#include "cuda/elementwise.cuh"

namespace dlkernels::cuda {

namespace {

struct LeakyRelu {
  float slope;
  template <class T>
  __device__ T operator()(T x, T) const {
    return to_float(x) > 0 ? x : from_float<T>(to_float(x) * slope);
  }
};
struct LeakyReluBackward {
  float slope;
  template <class T>
  __device__ T operator()(T grad_y, T x) const {
    return to_float(x) > 0 ? grad_y : from_float<T>(to_float(grad_y) * slope);
  }
};

}  // namespace

Error leaky_relu(DType dtype, const void* x, void* y, float slope, int64_t n, Stream stream) {
  return map<false>(dtype, x, nullptr, y, n, stream, LeakyRelu{slope});
}

Error leaky_relu_backward(DType dtype, const void* grad_y, const void* x, void* grad_x, float slope,
                          int64_t n, Stream stream) {
  return map<true>(dtype, grad_y, x, grad_x, n, stream, LeakyReluBackward{slope});
}

}  // namespace dlkernels::cuda
