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

// ---- convolution ---------------------------------------------------------------------------

// One axis: tap t of output o is input o * stride - pad + t * dilation, 0 where that is outside.
struct ConvAxis {
  int64_t in, out, taps, stride, pad, dilation;
};

// y[n, o, oh, ow] = bias[o] + sum over i, kh, kw of x[n, g * C / groups + i, h, w] * weight[o, i,
// kh, kw], where g is o's group and h, w are tap kh of oh and tap kw of ow. An axis with its
// padding and a plane have less than 2^30 elements, as do the weights with C / groups rounded up to
// eight; there are less than 2^18 channels. Images may be of any size, and any many.
enum class ConvWay { kFastest, kDirect, kGemm };
struct Conv2d {
  DType dtype;  // of all but argmax
  int64_t N, C, K, groups;
  ConvAxis h, w;
  bool channels_last;         // x, y and their gradients: (N, H, W, C), else (N, C, H, W)
  bool weight_channels_last;  // weight and its gradient: (K, KH, KW, C / groups), else as indexed
  bool allow_tf32 = false;    // float32 products may round their factors to TF32
  ConvWay way = ConvWay::kFastest;  // or the one that is tested
};

// relu: y = max(y, 0), a NaN stays one. With argmax, and then with relu, y (N, K, OH / 2, OW / 2)
// is the max-pool of that with windows of 2x2: the first maximum or the last NaN; argmax, always
// (N, OH / 2, OW / 2, K), says which, 2 * row + column, or 255 where it is <= 0. bias and argmax
// may be null. workspace is aligned to 256 bytes.
struct Conv2dForward {
  const void *x, *weight, *bias;
  void* y;
  uint8_t* argmax;
  bool relu;
};
int64_t conv2d_workspace(const Conv2d& conv, const Conv2dForward& tensors);  // in bytes
Error conv2d(const Conv2d& conv, const Conv2dForward& tensors, void* workspace, Stream stream);

// The gradients of sum(y * grad_y). With relu_y, laid out as grad_y, grad_y counts as 0 where
// relu_y <= 0. With argmax, grad_y is the gradient of the pooled y. Gradients that are null are
// not computed. Sums over pixels are cut by the shape alone.
struct Conv2dBackward {
  const void *grad_y, *relu_y;
  const uint8_t* argmax;
  const void *x, *weight;
  void *grad_x, *grad_weight, *grad_bias;
};
int64_t conv2d_backward_workspace(const Conv2d& conv, const Conv2dBackward& tensors);
Error conv2d_backward(const Conv2d& conv, const Conv2dBackward& tensors, void* workspace,
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
// arithmetic, or with allow_tf32 a product of numbers cut to 10 bits of mantissa.
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
  decltype(cuda::conv2d_workspace)* conv2d_workspace;
  decltype(cuda::conv2d)* conv2d;
  decltype(cuda::conv2d_backward_workspace)* conv2d_backward_workspace;
  decltype(cuda::conv2d_backward)* conv2d_backward;
  decltype(cuda::gemm_workspace)* gemm_workspace;
  decltype(cuda::gemm)* gemm;
};

}  // namespace dlkernels::cuda

extern "C" __attribute__((visibility("default"))) const dlkernels::cuda::Kernels*
dlkernels_cuda_kernels();
