// relu and its gradient: 16 bytes a thread and access.
#include "cuda/common.cuh"

namespace dlkernels::cuda {

namespace {

constexpr int kThreads = 256;

// y = f(x, z) element by element; z is read only if kTwo.
template <class T, bool kTwo, class F>
__global__ void __launch_bounds__(kThreads)
    map_kernel(const T* x, const T* z, T* y, int64_t n, bool packed, F f) {
  const int64_t first = global_thread(), stride = global_threads();
  const int64_t packs = packed ? n / Pack<T>::kSize : 0;
  for (int64_t i = first; i < packs; i += stride) {
    const Pack<T> a = reinterpret_cast<const Pack<T>*>(x)[i];
    const Pack<T> b = kTwo ? reinterpret_cast<const Pack<T>*>(z)[i] : a;
    Pack<T> c;
#pragma unroll
    for (int j = 0; j < Pack<T>::kSize; ++j) c.values[j] = f(a.values[j], b.values[j]);
    reinterpret_cast<Pack<T>*>(y)[i] = c;
  }
  for (int64_t i = packs * Pack<T>::kSize + first; i < n; i += stride)
    y[i] = f(x[i], kTwo ? z[i] : x[i]);
}

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

template <bool kTwo, class F>
Error map(DType dtype, const void* x, const void* z, void* y, int64_t n, Stream stream, F f) {
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch(map_kernel<T, kTwo, F>, striding_grid(n, kThreads * Pack<T>::kSize), kThreads, 0,
                  stream, static_cast<const T*>(x), static_cast<const T*>(z), static_cast<T*>(y), n,
                  aligned16(x, y) && (!kTwo || aligned16(z)), f);
  });
}

}  // namespace

Error relu(DType dtype, const void* x, void* y, int64_t n, Stream stream) {
  return map<false>(dtype, x, nullptr, y, n, stream, Relu());
}

Error relu_backward(DType dtype, const void* grad_y, const void* y, void* grad_x, int64_t n,
                    Stream stream) {
  return map<true>(dtype, grad_y, y, grad_x, n, stream, ReluBackward());
}

}  // namespace dlkernels::cuda
