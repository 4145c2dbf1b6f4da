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

using Stream = void*;               // a cudaStream_t
using Error = int;                  // a cudaError_t; 0 is success
constexpr Error kInvalidValue = 1;  // cudaErrorInvalidValue

enum class DType { kFloat32, kBFloat16, kFloat16 };  // stored so; sums are float32

// y[i] = max(x[i], 0), a NaN stays one; grad_x[i] = y[i] <= 0 ? 0 : grad_y[i]. i < n
Error relu(DType dtype, const void* x, void* y, int64_t n, Stream stream);
Error relu_backward(DType dtype, const void* grad_y, const void* y, void* grad_x, int64_t n,
                    Stream stream);

// Numbers at data[i * row + j * col]; one of the strides is 1, or there is only one number along
// it.
struct Matrix {
  const void* data;
  int64_t row, col;
};

// C (M, N) = A (M, K) * B (N, K)^T, then C(m, n) += bias(n), then max(C, 0) with NaN as it is
// (relu), then 0 where mask(m, n) <= 0. C and mask have rows of N, bias is (N), row_sums (M) are
// the sums of A(m, k) over k; bias, mask and row_sums may be null. Where A's rows are no lines of
// memory (row = 1), as they must not be for row_sums, B's columns have to be lines, too (row = 1).
// Fastest where data and lines are aligned to 16 bytes. float32 is as exact as float32's own
// arithmetic (but where an operand is infinite, or beyond 0x1.ffep127, C may be NaN), or with
// allow_tf32 a product of numbers cut to 10 bits of mantissa.
struct Product {
  DType dtype = {};  // of all
  int64_t M = 0, N = 0, K = 0;
  Matrix a = {}, b = {};
  void* c = nullptr;
  const void *bias = nullptr, *mask = nullptr;
  void* row_sums = nullptr;
  bool relu = false, allow_tf32 = false;
};
int64_t gemm_workspace(const Product& product);  // bytes, on the current device; aligned to 16
Error gemm(const Product& product, void* workspace, Stream stream);

struct Kernels {
  int version;  // of the CUDA toolkit it was built with, as 13000
  const char* (*error_string)(Error error);
  int (*capability)(int device);  // as 90; 0 where it cannot be told
  decltype(cuda::relu)* relu;
  decltype(cuda::relu_backward)* relu_backward;
  decltype(cuda::gemm_workspace)* gemm_workspace;
  decltype(cuda::gemm)* gemm;
};

}  // namespace dlkernels::cuda

extern "C" __attribute__((visibility("default"))) const dlkernels::cuda::Kernels*
dlkernels_cuda_kernels();
