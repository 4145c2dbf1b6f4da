// The table of CUDA kernels. The library _C_cuda exports it; _C, which knows torch, loads it and
// calls through it. Neither includes the other's headers: pointers, sizes and a stream in, an error
// out.
//
// Pointers are to memory of the stream's device, which is the current one. A launcher checks
// nothing but its launch; it allocates nothing and waits for nothing, so it can be captured in a
// CUDA graph. Sizes are int64_t and may be zero.
#pragma once
#include <cstdint>

#include "shapes.h"

namespace dlkernels::cuda {

using Stream = void*;               // a cudaStream_t
using Error = int;                  // a cudaError_t; 0 is success
constexpr Error kInvalidValue = 1;  // cudaErrorInvalidValue

using dlkernels::DType;

// y[i] = max(x[i], 0), a NaN stays one; grad_x[i] = y[i] <= 0 ? 0 : grad_y[i]. i < n
Error relu(DType dtype, const void* x, void* y, int64_t n, Stream stream);
Error relu_backward(DType dtype, const void* grad_y, const void* y, void* grad_x, int64_t n,
                    Stream stream);

// y[i] = x[i] > 0 ? x[i] : x[i] * slope; grad_x[i] = x[i] > 0 ? grad_y[i] : grad_y[i] * slope
Error leaky_relu(DType dtype, const void* x, void* y, float slope, int64_t n, Stream stream);
Error leaky_relu_backward(DType dtype, const void* grad_y, const void* x, void* grad_x, float slope,
                          int64_t n, Stream stream);

// ---- max pooling ---------------------------------------------------------------------------

// in and out of an axis are at most this; every window starts before the input's end.
constexpr int64_t kPoolSide = int64_t{1} << 29;

// x (images, H, W, C) -> y (images, OH, OW, C), H and W being h.in and w.in: channels last; planes
// are images with one channel. C is at most kPoolSide. An argmax is a byte, kh * KW + kw, or 255
// where a window has no element: KH * KW <= 255.
struct Pool {
  int64_t images, C;
  PoolAxis h, w;
};

// y[o] = max over the elements of window o, NaN above all; argmax[o] (unless null) is the first
// greatest one, or the last NaN.
Error max_pool2d(DType dtype, const void* x, void* y, uint8_t* argmax, const Pool& pool,
                 Stream stream);

// grad_x[i] = sum of grad_y[o] over the windows o whose argmax is i, in the order of o. Any bytes
// are safe: those that name no element of their window count for nothing.
Error max_pool2d_backward(DType dtype, const void* grad_y, const uint8_t* argmax, void* grad_x,
                          const Pool& pool, Stream stream);

// indices[o] = h * W + w of the element that argmax[o] names, -1 where it names none.
Error max_pool2d_indices(const uint8_t* argmax, int64_t* indices, const Pool& pool, Stream stream);

// ---- cross-entropy -------------------------------------------------------------------------

// Rows of 1 to kMaxClasses logits, C of them, and what each should have been: a class, or a
// probability for every class. Row n * inner + i has its class c at element (n * C + c) * inner +
// i. With
//   p[n, c] = exp(x[n, c] - top) / s, top = max_c x[n, c], s = sum_c exp(x[n, c] - top)
//   g[n, c] = weight[c] * ((1 - smoothing) * t[n, c] + smoothing / C), t the target's one-hot row
//             or the probabilities; 0 for a row whose target is ignore_index
// a row's loss is sum_c g[n, c] * (log s + top - x[n, c]), its gradient p[n, c] * sum_c g[n, c] -
// g[n, c]. A mean divides by the sum of the targets' weights, or by the rows that are not ignored.
// In a row whose target is no class, loss and gradient are NaN.
constexpr int64_t kMaxClasses = int64_t{1} << 30;
enum class Reduction { kNone, kMean, kSum };  // as PyTorch numbers them
struct CrossEntropy {
  const void* x;              // (N, C, inner)
  const int64_t* target;      // (N, inner), or null
  const void* probabilities;  // as x, where target is null
  const void* weight;         // (C) or null
  int64_t rows, C, inner, ignore_index;
  float smoothing;
  Reduction reduction;
  void* loss;     // (N, inner), or one number
  void* grad;     // as x, or null: of the loss, not scaled by a gradient from outside
  int* no_class;  // set to 1 where a target is neither a class nor ignored; or null. It may be the
                  // host's memory, as the device sees it
};

// workspace: cross_entropy_workspace(rows, C, inner) floats.
Error cross_entropy(DType dtype, const CrossEntropy& rows, float* workspace, Stream stream);
int64_t cross_entropy_workspace(int64_t rows, int64_t C, int64_t inner);

// rows.grad[n, c] = rows.x[n, c] * grad_y[n * step], and 0 where target (may be null) is
// ignore_index: x is the gradient made by cross_entropy. grad may be x; nothing is read or written
// then if step is 0 and grad_y[0] is 1.
Error cross_entropy_backward(DType dtype, const CrossEntropy& rows, const void* grad_y,
                             int64_t step, Stream stream);

// ---- optimizers ----------------------------------------------------------------------------

// One tensor of n elements: arrays of one layout and any alignment. step is read and written where
// it is on the device (capturable); otherwise it is null and `steps` counts this one.
struct AdamTensor {
  void *param, *grad, *exp_avg, *exp_avg_sq;
  float* step;
  double steps;
  int64_t n;
};

struct AdamOptions {
  double lr, beta1, beta2, weight_decay, eps;
  bool maximize, decoupled_weight_decay;
  const float *device_lr, *grad_scale, *found_inf;  // one number each on the device, or null
};

// A step of Adam on all tensors, of one dtype, either all with a step on the device or none:
//   g = sign * grad / grad_scale + weight_decay * param (the latter unless decoupled)
//   exp_avg += (1 - beta1) * (g - exp_avg); exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g^2
//   param = (1 - lr * weight_decay if decoupled) * param
//           - lr / (1 - beta1^step) * exp_avg / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)
// grad is written if there is a grad_scale. Nothing at all is, steps included, if *found_inf is not
// 0. device_lr replaces lr, and needs steps on the device. tensors is the host's memory and is read
// before the return. workspace: adam_workspace(count) floats, used where steps are on the device.
Error adam(DType dtype, const AdamTensor* tensors, int64_t count, const AdamOptions& options,
           float* workspace, Stream stream);
int64_t adam_workspace(int64_t count);

// ---- convolution ---------------------------------------------------------------------------

// y[n, o, oh, ow] = bias[o] + sum over i, kh, kw of x[n, g * C / groups + i, h, w] * weight[o, i,
// kh, kw], where g is o's group and h, w are tap kh of oh and tap kw of ow. An axis with its
// padding and a plane have less than 2^30 elements, as do the weights with C / groups rounded up to
// eight; there are less than 2^18 channels. Images may be of any size, and any many.
enum class Conv2dAlgorithm { kFastest, kDirect, kGemm };
struct Conv2d {
  DType dtype;  // of all but argmax
  int64_t N, C, K, groups;
  ConvAxis h, w;
  bool channels_last;         // x, y and their gradients: (N, H, W, C), else (N, C, H, W)
  bool weight_channels_last;  // weight and its gradient: (K, KH, KW, C / groups), else as indexed
  bool allow_tf32 = false;    // float32 products may round their factors to TF32
  Conv2dAlgorithm algorithm = Conv2dAlgorithm::kFastest;  // or the one that is tested
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
// the sums of A(m, k) over k; bias, mask and row_sums may be null. Where A's rows are not
// contiguous in memory (row = 1), as they must not be for row_sums, B's columns have to be lines,
// too (row = 1). Fastest where data and lines are aligned to 16 bytes. float32 is as exact as
// float32's own arithmetic, infinities included, or with allow_tf32 a product of numbers cut to 10
// bits of mantissa.
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
  decltype(cuda::leaky_relu)* leaky_relu;
  decltype(cuda::leaky_relu_backward)* leaky_relu_backward;
  decltype(cuda::max_pool2d)* max_pool2d;
  decltype(cuda::max_pool2d_backward)* max_pool2d_backward;
  decltype(cuda::max_pool2d_indices)* max_pool2d_indices;
  decltype(cuda::cross_entropy)* cross_entropy;
  decltype(cuda::cross_entropy_workspace)* cross_entropy_workspace;
  decltype(cuda::cross_entropy_backward)* cross_entropy_backward;
  decltype(cuda::adam)* adam;
  decltype(cuda::adam_workspace)* adam_workspace;
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
