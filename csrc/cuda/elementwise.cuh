// y[i] = f(x[i]) and y[i] = f(x[i], z[i]), 16 bytes a thread and access. Memory bounds it.
#pragma once
#include "cuda/common.cuh"

namespace dlkernels::cuda {

constexpr int kElementwiseThreads = 256;

// y = f(x, z) element by element; z is read only if kTwo.
template <class T, bool kTwo, class F>
__global__ void __launch_bounds__(kElementwiseThreads)
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

// f(x, z) for float, bf16 or half; z is null and not read unless kTwo.
template <bool kTwo, class F>
Error map(DType dtype, const void* x, const void* z, void* y, int64_t n, Stream stream, F f) {
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch(map_kernel<T, kTwo, F>, striding_grid(n, kElementwiseThreads * Pack<T>::kSize),
                  kElementwiseThreads, 0, stream, static_cast<const T*>(x),
                  static_cast<const T*>(z), static_cast<T*>(y), n,
                  aligned16(x, y) && (!kTwo || aligned16(z)), f);
  });
}

}  // namespace dlkernels::cuda
