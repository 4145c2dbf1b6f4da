// A linear layer, forward and backward, into tensors that are there: what linear and mlp share, on
// the CPU and on CUDA.
#pragma once
#include <ATen/Context.h>

#include "ops/linear/gemm.h"

namespace dlkernels {

using Grads = std::tuple<Tensor, Tensor, Tensor>;  // of input, weight and bias

// (..., K) as rows of K, by its strides where those allow; `copy` holds what had to be copied.
inline cpu::Matrix as_rows(const Tensor& x, Tensor& copy) {
  const int64_t dim = x.dim();
  const DType dtype = dtype_of(x);
  if (dim == 1) return {x.const_data_ptr(), 0, x.stride(0), nullptr, dtype};
  if (dim == 2) return {x.const_data_ptr(), x.stride(0), x.stride(1), nullptr, dtype};
  copy = x.flatten(0, -2);
  return {copy.const_data_ptr(), copy.stride(0), copy.stride(1), nullptr, dtype};
}
inline cpu::Matrix transposed(const cpu::Matrix& x) {
  return {x.data, x.col, x.row, x.relu_y, x.dtype};
}

// y = act(input * weight^T + bias); y (..., N) contiguous, bias undefined if there is none.
inline void linear_into(const Tensor& y, const Tensor& input, const Tensor& weight,
                        const Tensor& bias, bool relu) {
  if (y.numel() == 0) return;
  const int64_t N = weight.size(0), K = weight.size(1);
  const Tensor b = bias.defined() ? to_float32(bias) : bias;
  Tensor copy;
  multiply({{.a = as_rows(input, copy),
             .b = as_rows(weight, copy),
             .M = y.numel() / N,
             .N = N,
             .K = K,
             .out = {.c = y.mutable_data_ptr(),
                     .row = N,
                     .col_bias = b.defined() ? b.const_data_ptr<float>() : nullptr,
                     .relu = relu,
                     .dtype = dtype_of(y)}}});
}

// Those gradients that are defined; y is the output of a ReLU, or undefined.
inline void linear_backward_into(const Grads& grads, const Tensor& grad_y, const Tensor& input,
                                 const Tensor& weight, const Tensor& y) {
  const auto& [grad_x, grad_weight, grad_bias] = grads;
  const int64_t N = grad_y.size(-1);
  if (N == 0) {  // no sum has a term
    if (grad_x.defined()) grad_x.zero_();
    return;
  }
  // The mask y > 0 is read together with grad_y, so the two must have one layout.
  const Tensor yc = y.defined() ? y.contiguous() : y,
               gy = y.defined() ? grad_y.contiguous() : grad_y;
  Tensor g_copy, x_copy;
  cpu::Matrix g = as_rows(gy, g_copy);
  if (y.defined()) g.relu_y = yc.const_data_ptr();
  const int64_t M = grad_y.numel() / N;

  Product for_x = {.a = g, .M = M, .K = N}, for_weight = {.a = transposed(g), .M = N, .K = M};
  for_x.out.dtype = for_weight.out.dtype = dtype_of(gy);
  if (grad_x.defined()) {
    for_x.b = transposed(as_rows(weight, x_copy));
    for_x.out.c = grad_x.mutable_data_ptr();
    for_x.N = for_x.out.row = weight.size(1);
  }
  if (grad_weight.defined()) {
    for_weight.b = transposed(as_rows(input, x_copy));
    for_weight.out.c = grad_weight.mutable_data_ptr();
    for_weight.N = for_weight.out.row = input.size(-1);
  }
  // The bias gradient is the row sums of the same packed operand.
  const Tensor sums = grad_bias.defined() ? empty_float32(grad_bias) : grad_bias;
  if (sums.defined()) for_weight.out.row_sums = sums.mutable_data_ptr<float>();
  const bool weight_or_bias = grad_weight.defined() || grad_bias.defined();
  if (grad_x.defined() && weight_or_bias)
    multiply({for_x, for_weight});
  else if (grad_x.defined())
    multiply({for_x});
  else if (weight_or_bias)
    multiply({for_weight});
  if (!sums.is_same(grad_bias)) grad_bias.copy_(sums);
}

// ---- the same on CUDA ---------------------------------------------------------------------

// (..., K) as a matrix with contiguous rows, copied where it has none; so is 1 x K, and a
// matrix of one column.
inline Tensor with_dense_rows(const Tensor& x) {
  const Tensor rows = x.dim() == 1 ? x.unsqueeze(0) : x.flatten(0, -2);
  return rows.stride(1) == 1 || rows.size(1) <= 1 ? rows : rows.contiguous();
}
inline cuda::Matrix cuda_matrix(const Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1)};
}
inline cuda::Matrix transposed(const cuda::Matrix& x) { return {x.data, x.col, x.row}; }

// A product of tensors like `x`, whose settings of precision are PyTorch's.
inline void multiply_cuda(const char* op, const Tensor& x, cuda::Product product) {
  product.dtype = dtype_of(x);
  product.allow_tf32 =
      !at::NoTF32Guard::should_disable_tf32() &&
      at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
          at::Float32Precision::TF32;
  launch(op, x, [&](const cuda::Kernels& kernels, cuda::Stream stream) {
    const int64_t bytes = kernels.gemm_workspace(product);
    const Tensor workspace = at::empty({bytes}, x.options().dtype(at::kByte));
    return kernels.gemm(product, workspace.mutable_data_ptr(), stream);
  });
}

inline void linear_into_cuda(const char* op, const Tensor& y, const Tensor& input,
                             const Tensor& weight, const Tensor& bias, bool relu) {
  if (y.numel() == 0) return;
  const int64_t N = weight.size(0), K = weight.size(1);
  const Tensor x = with_dense_rows(input), b = bias.defined() ? bias.contiguous() : bias;
  const Tensor w = weight.stride(0) == 1 ? weight : with_dense_rows(weight);
  multiply_cuda(op, y,
                {.M = y.numel() / N,
                 .N = N,
                 .K = K,
                 .a = cuda_matrix(x),
                 .b = cuda_matrix(w),
                 .c = y.mutable_data_ptr(),
                 .bias = b.defined() ? b.const_data_ptr() : nullptr,
                 .relu = relu});
}

// Those gradients that are defined. grad_y has been through y's ReLU; grad_x goes through that of
// hidden, an output of one, if it is defined.
inline void linear_backward_into_cuda(const char* op, const Grads& grads, const Tensor& grad_y,
                                      const Tensor& input, const Tensor& weight,
                                      const Tensor& hidden) {
  const auto& [grad_x, grad_weight, grad_bias] = grads;
  const int64_t N = grad_y.size(-1);
  if (N == 0) {  // no sum has a term
    if (grad_x.defined()) grad_x.zero_();
    return;
  }
  const Tensor g = with_dense_rows(grad_y);
  const int64_t M = g.size(0);
  if (grad_x.defined()) {
    const Tensor w = weight.stride(0) == 1 ? weight : with_dense_rows(weight);
    const Tensor mask = hidden.defined() ? hidden.contiguous() : hidden;
    multiply_cuda(op, grad_y,
                  {.M = M,
                   .N = w.size(1),
                   .K = N,
                   .a = cuda_matrix(g),
                   .b = transposed(cuda_matrix(w)),
                   .c = grad_x.mutable_data_ptr(),
                   .mask = mask.defined() ? mask.const_data_ptr() : nullptr});
  }
  if (!grad_weight.defined() && !grad_bias.defined()) return;
  cuda::Product product = {.M = N, .K = M, .a = transposed(cuda_matrix(g))};
  // The bias gradient is the row sums of the same operand; without a weight's, that is all.
  if (grad_bias.defined()) product.row_sums = grad_bias.mutable_data_ptr();
  Tensor x;
  if (grad_weight.defined()) {
    x = with_dense_rows(input);
    product.N = x.size(1);
    product.c = grad_weight.mutable_data_ptr();
  }
  product.b = transposed(cuda_matrix(x.defined() ? x : g));
  multiply_cuda(op, grad_y, product);
}

// grad_y through the ReLU whose output is y.
inline Tensor through_relu_cuda(const char* op, const Tensor& grad_y, const Tensor& y) {
  const Tensor g = grad_y.contiguous(), mask = y.contiguous(), masked = at::empty_like(g);
  launch(op, g, [&](const cuda::Kernels& kernels, cuda::Stream stream) {
    return kernels.relu_backward(dtype_of(g), g.const_data_ptr(), mask.const_data_ptr(),
                                 masked.mutable_data_ptr(), g.numel(), stream);
  });
  return masked;
}

}  // namespace dlkernels
