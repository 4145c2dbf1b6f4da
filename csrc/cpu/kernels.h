// CPU kernels: raw pointers and sizes in, memory out. No torch, no threads, no SIMD types.
// Sizes and strides count elements. The caller decides how work is shared among threads: a
// kernel does the part [begin, end) it is told to, and any parts give the same bits.
#pragma once
#include <cstdint>

#include "shapes.h"

namespace dlkernels::cpu {

// ---- the shared GEMM: C[m, n] = sum_k A[m, k] * B[n, k] ------------------------------------

// Element (i, k) is data[i * row + k * col]. With relu_y, laid out as data, an element counts as
// 0 where relu_y <= 0: the gradient of a ReLU, applied while it is read.
struct Matrix {
  const void* data;
  int64_t row, col;
  const void* relu_y = nullptr;
  DType dtype = DType::kFloat32;
};

// Where C (M, N) goes and what is done to it on the way: c[m * row + n] = act(C + bias), rounded
// once where c is a reduced float.
struct GemmOutput {
  void* c;
  int64_t row = 0;
  const float* row_bias = nullptr;  // (M) or null
  const float* col_bias = nullptr;  // (N) or null
  bool relu = false;
  bool accumulate = false;  // add to what c and row_sums hold; float32 alone
  float* row_sums =
      nullptr;  // (M) or null: row_sums[m] = sum_k A[m, k]; written by the chunk with n = 0
  DType dtype = DType::kFloat32;  // of c
};

// The chunk of C that a call computes: rows [m0, m1), columns [n0, n1).
struct GemmChunk {
  int64_t m0, m1, n0, n1;
};
struct GemmSize {
  int64_t m, n;
};

// ---- convolution ---------------------------------------------------------------------------

// What happens to an image's elements while a block of it is loaded into scratch.
struct OnLoad {
  // The gradient of a ReLU: an element counts as 0 where relu_y, laid out as the image, is <= 0.
  const void* relu_y = nullptr;

  // The gradient of a max-pool with windows of 2x2, from that of its output: H and W are the pool's
  // input, the image's data and strides its output (N, C, H / 2, W / 2). argmax, channels last,
  // names the element of its window that each gradient belongs to: 0 to 3, or none.
  const uint8_t* argmax = nullptr;
};

// An (N, C, H, W) tensor: element (n, c, h, w) is data[n * sn + c * sc + h * sh + w * sw]. Either
// sc or sw is 1.
struct ImageView {
  const void* data;
  int64_t C, H, W, sn, sc, sh, sw;
  DType dtype = DType::kFloat32;
  OnLoad on_load = {};
};

// What happens to a sum over all products before it is stored, in this order.
struct OnStore {
  const float* bias = nullptr;  // (K) or null
  bool relu = false;
  // The max-pool with windows of 2x2, after relu: OH and OW are even, and what is stored is y (N,
  // K, OH / 2, OW / 2) and, channels last, which element of its window each is: 0 to 3, or
  // kNoElement where it is <= 0.
  uint8_t* argmax = nullptr;
};

// x -> y (N, K, OH, OW) = on_store(conv2d(on_load(x))). y by its strides, as ImageView, and of x's
// dtype, as are the weights.
struct Conv2d {
  ImageView x;
  ConvAxis h, w;
  int64_t groups, K;
  void* y = nullptr;
  int64_t yn = 0, yc = 0, yh = 0, yw = 0;
  OnStore on_store = {};
};

// Weights: output o and input i of group g at data[g * sg + o * so + i * si + kh * sh + kw * sw]. A
// rotated kernel has negative steps.
struct WeightView {
  const void* data;
  int64_t sg, so, si, sh, sw;
};

// One way to compute a convolution. It works on blocks of an image's outputs, and on panels of
// output channels. Sizes in floats must not overflow: the caller sees to that.
struct Conv2dAlgorithm {
  bool (*supports)(const Conv2d& conv);
  int64_t (*blocks)(const Conv2d& conv);  // an image
  int64_t (*batch)(const Conv2d& conv);   // blocks that are best done together, of several images
  int64_t (*scratch)(const Conv2d& conv);
  int64_t (*panels)(const Conv2d& conv);
  int64_t (*panel_floats)(const Conv2d& conv);
  int64_t (*sum_floats)(const Conv2d& conv);

  // Packs the weights of panels [begin, end).
  void (*pack)(const Conv2d& conv, const WeightView& filter, float* packed, int64_t begin,
               int64_t end);

  // Blocks [begin, end) of all images, panels [panel_begin, panel_end).
  void (*forward)(const Conv2d& conv, const float* packed, int64_t begin, int64_t end,
                  int64_t panel_begin, int64_t panel_end, float* scratch);

  // sums = sum over blocks [begin, end), not none, of x's windows times grad_y, and bias_sums (K)
  // of grad_y. Either may be null. Only the panels' own channels are touched. Another begin or end
  // is another order of adding.
  void (*grad_weight)(const Conv2d& conv, const ImageView& grad_y, int64_t begin, int64_t end,
                      int64_t panel_begin, int64_t panel_end, float* sums, float* bias_sums,
                      float* scratch);

  // The panels' part of the gradient from all sums, added up; `to` by the strides of a filter.
  void (*unpack)(const Conv2d& conv, const float* sums, const WeightView& strides, void* to,
                 int64_t begin, int64_t end);
};

// ---- max pooling ---------------------------------------------------------------------------

// x (images, H, W, C) -> y (images, OH, OW, C), H and W being h.in and w.in. Planes are images with
// one channel. An argmax is a byte: kh * KW + kw, so KH * KW <= 255.
struct Pool {
  int64_t C;
  PoolAxis h, w;
};

// ---- optimizers ----------------------------------------------------------------------------

// One tensor's step: contiguous arrays of one order, and g, which every formula starts from:
// g = sign * grad[i] / grad_scale + weight_decay * param[i]
struct OptimTensor {
  float* param;
  const float* grad;
  float* unscaled;  // where grad / grad_scale goes (grad itself, or a copy); null: do not divide
  float* state[3];  // in the order of the formula; null where an option is off
  float grad_scale, sign, weight_decay;  // sign: -1 to maximize
};

// The scalars of the formula in sgd.inl.h, adam.inl.h, ...
struct SgdScalars {
  float lr, momentum, one_minus_dampening;
  bool nesterov, is_first_step;
};
struct AdamScalars {
  float one_minus_beta1, beta2, one_minus_beta2, eps;
  float shrink;                 // 1 - lr * weight_decay where that is decoupled
  float rsqrt_bias, step_size;  // 1 / sqrt(1 - beta2^step), lr / (1 - beta1^step)
};
struct AdagradScalars {
  float step_size, eps;  // lr / (1 + (step - 1) * lr_decay)
};
struct AdadeltaScalars {
  float lr, rho, one_minus_rho, eps;
};
struct RmspropScalars {
  float lr, alpha, one_minus_alpha, eps, momentum;
};

// One step on elements [begin, end) of a tensor.
template <class Scalars>
using OptimKernel = void(const OptimTensor& tensor, const Scalars& scalars, int64_t begin,
                         int64_t end);

// ---- cross-entropy -------------------------------------------------------------------------

// Rows of C logits, and what each should have been: a class, or a probability for every class. Row
// n * inner + i has its class c at element (n * C + c) * inner + i.
struct CrossEntropy {
  const float* x;                        // (N, C, inner)
  const int64_t* target;                 // (N, inner), each ignore_index or in [0, C); or null
  const float* probabilities = nullptr;  // as x, where target is null
  const float* weight = nullptr;         // (C) or null
  int64_t C, inner, ignore_index;
  float smoothing = 0;
  float weight_sum = 0;  // of weight, or C
  float grad_scale = 1;
  float* losses = nullptr;  // as target, or null
  float* grad = nullptr;    // as x, or null
};

// ---- the table -----------------------------------------------------------------------------

// One table per instruction set, one entry per kernel.
struct Kernels {
  const char* isa;

  // C[m, n] = sum_k a[m, k] * b[n, k], with gemm_scratch floats, 64-byte aligned.
  void (*gemm)(const Matrix& a, const Matrix& b, int64_t K, const GemmOutput& out,
               const GemmChunk& chunk, float* scratch);
  int64_t gemm_scratch;

  // The size of its chunks (M, N) for so many threads, which may be a share of one.
  GemmSize (*gemm_chunk_size)(const Matrix& a, const Matrix& b, int64_t M, int64_t N, int64_t K,
                              const GemmOutput& out, double threads);

  // The same where both operands have col = 1, without masks and row_sums, all of one dtype, and
  // nothing is packed: for a few rows of either, where the sum is long.
  void (*gemm_dot)(const Matrix& a, const Matrix& b, int64_t K, const GemmOutput& out,
                   const GemmChunk& chunk);

  // direct is for every convolution. small_k is for few output channels, scatter for those of which
  // most taps lie outside of the image, depthwise for few channels a group. Winograd's, by tiles of
  // 4x4 or 2x2 outputs, are for windows of 3x3, one group, stride and dilations of 1. 4x4 is the
  // fastest for 16 channels and more, and rounds most: its RMS error is 2 to 4 times that of the
  // direct sum, where that of 2x2 is the direct sum's.
  Conv2dAlgorithm direct, small_k, scatter, depthwise, winograd_4x4, winograd_2x2;

  // y[i] = sum_r x[r * n + i], in order
  void (*sum_rows)(const float* x, int64_t rows, int64_t n, float* y, int64_t begin, int64_t end);

  // y[i] = max(0, x[i]), NaN kept
  void (*relu)(const float* x, float* y, int64_t begin, int64_t end);

  // grad_x[i] = y[i] <= 0 ? 0 : grad_y[i]
  void (*relu_backward)(const float* grad_y, const float* y, float* grad_x, int64_t begin,
                        int64_t end);

  // y[i] = x[i] > 0 ? x[i] : x[i] * slope
  void (*leaky_relu)(const float* x, float* y, float slope, int64_t begin, int64_t end);

  // grad_x[i] = x[i] > 0 ? grad_y[i] : grad_y[i] * slope
  void (*leaky_relu_backward)(const float* grad_y, const float* x, float* grad_x, float slope,
                              int64_t begin, int64_t end);

  // y[o] = max over the elements of window o, NaN above all; argmax[o] (unless null) is the first
  // greatest one, or the last NaN. Rows (image, oh) from begin to end.
  void (*max_pool2d)(const float* x, float* y, uint8_t* argmax, const Pool& pool, int64_t begin,
                     int64_t end);

  // grad_x[i] = sum of grad_y[o] over the windows o whose argmax is i. Rows (image, h) from begin
  // to end. Any bytes are safe: those that name no element of their window count for nothing.
  void (*max_pool2d_backward)(const float* grad_y, const uint8_t* argmax, float* grad_x,
                              const Pool& pool, int64_t begin, int64_t end);

  // indices[o] = h * W + w of the element that argmax[o] names, -1 where it names none. Rows
  // (image, oh) from begin to end.
  void (*max_pool2d_indices)(const uint8_t* argmax, int64_t* indices, const Pool& pool,
                             int64_t begin, int64_t end);

  OptimKernel<SgdScalars>* sgd;            // momentum_buffer, or no state
  OptimKernel<AdamScalars>* adam;          // exp_avg, exp_avg_sq
  OptimKernel<AdagradScalars>* adagrad;    // sum
  OptimKernel<AdadeltaScalars>* adadelta;  // square_avg, acc_delta
  OptimKernel<RmspropScalars>* rmsprop;    // square_avg, grad_avg or null, momentum_buffer or null

  // losses[n] = -sum_c g[n, c] * log p[n, c], grad[n, c] = grad_scale * d losses[n] / d x[n, c];
  // p and g in cross_entropy.inl.h. Returns the sum of the losses of rows [begin, end), in order:
  // the one result that depends on the part, so the caller's parts must follow the shape.
  double (*cross_entropy)(const CrossEntropy& rows, int64_t begin, int64_t end);

  // grad[n, c] = x[n, c] * grad_y[n * step], and 0 where target (may be null) is ignore_index: x is
  // the gradient made by cross_entropy. Rows [begin, end).
  void (*cross_entropy_backward)(const CrossEntropy& rows, const float* grad_y, int64_t step,
                                 int64_t begin, int64_t end);

  // As many multiply-adds as fit into registers, `times` times: multiply_add_flops a time. The
  // result says that they were done.
  int64_t multiply_add_flops;
  float (*multiply_add)(int64_t times);
};

// What the choice of an algorithm may take. kAny is what is fastest; the others are for tests,
// where they support the convolution.
enum class Conv2dForce { kAny, kDirect, kWinograd2x2, kWinograd4x4 };

// The algorithm for a pass over N images, from the shape alone. `exact` excludes those that round
// more than the direct sum (Winograd's).
const Conv2dAlgorithm& choose_conv2d(const Kernels& table, int64_t N, const Conv2d& conv,
                                     bool exact, Conv2dForce force = Conv2dForce::kAny);

// Whether that machine multiplies pairs of bfloat16 by instructions that its table has none of: to
// convert them to float32 first is slower there.
bool multiplies_bfloat16();

// The best table this machine can run. DLKERNELS_ISA=baseline|avx2|avx512 and torch's own
// ATEN_CPU_CAPABILITY=default|avx2|avx512 lower it.
const Kernels& kernels();

// Changes the choice, for tests and benchmarks; false where the machine lacks that ISA.
bool set_isa(const char* isa);

extern const Kernels baseline, avx2, avx512;  // for dispatch.cpp; the last two on x86-64 alone

}  // namespace dlkernels::cpu
