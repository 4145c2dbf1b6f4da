// The table of CUDA kernels. The library _C_cuda exports it; _C, which knows torch, loads it and
// calls through it. Neither includes the other's headers: pointers, sizes and a stream in, an error
// out.
//
// Pointers are to memory of the stream's device, which is the current one. A launcher checks
// nothing but its launch; it allocates nothing and waits for nothing, so it can be captured in a
// CUDA graph. Sizes are int64_t and may be zero.
#pragma once
#include <cstdint>

namespace dlkernels::cuda {

using Stream = void*;  // a cudaStream_t
using Error = int;     // a cudaError_t; 0 is success

enum class DType { kFloat32, kBFloat16, kFloat16 };  // stored so; sums are float32

// y[i] = max(x[i], 0), a NaN stays one; grad_x[i] = y[i] <= 0 ? 0 : grad_y[i]. i < n
Error relu(DType dtype, const void* x, void* y, int64_t n, Stream stream);
Error relu_backward(DType dtype, const void* grad_y, const void* y, void* grad_x, int64_t n,
                    Stream stream);

struct Kernels {
  int version;  // of the CUDA toolkit it was built with, as 13000
  const char* (*error_string)(Error error);
  int (*capability)(int device);  // as 90; 0 where it cannot be told
  decltype(cuda::relu)* relu;
  decltype(cuda::relu_backward)* relu_backward;
};

}  // namespace dlkernels::cuda

extern "C" __attribute__((visibility("default"))) const dlkernels::cuda::Kernels*
dlkernels_cuda_kernels();
