// A linear layer, forward and backward, into tensors that are there: what linear and mlp share.
#pragma once
#include "gemm.h"

namespace dlkernels {

using Grads = std::tuple<Tensor, Tensor, Tensor>;  // of input, weight and bias

// (..., K) as rows of K, by its strides where those allow; `copy` holds what had to be copied.
inline cpu::Matrix as_rows(const Tensor& x, Tensor& copy) {
  const int64_t dim = x.dim();
  if (dim == 1) return {x.const_data_ptr<float>(), 0, x.stride(0)};
  if (dim == 2) return {x.const_data_ptr<float>(), x.stride(0), x.stride(1)};
  copy = x.flatten(0, -2);
  return {copy.const_data_ptr<float>(), copy.stride(0), copy.stride(1)};
}
inline cpu::Matrix transposed(const cpu::Matrix& x) { return {x.data, x.col, x.row, x.relu_y}; }

// y = act(input * weight^T + bias); y (..., N) contiguous, bias undefined if there is none.
inline void linear_into(const Tensor& y, const Tensor& input, const Tensor& weight,
                        const Tensor& bias, bool relu) {
  if (y.numel() == 0) return;
  const int64_t N = weight.size(0), K = weight.size(1);
  const Tensor b = bias.defined() ? bias.contiguous() : bias;
  Tensor copy;
  multiply({{.a = as_rows(input, copy),
             .b = as_rows(weight, copy),
             .M = y.numel() / N,
             .N = N,
             .K = K,
             .out = {.c = y.mutable_data_ptr<float>(),
                     .row = N,
                     .col_bias = b.defined() ? b.const_data_ptr<float>() : nullptr,
                     .relu = relu}}});
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
  // The mask y > 0 is read together with grad_y, so the two must lie alike.
  const Tensor yc = y.defined() ? y.contiguous() : y,
               gy = y.defined() ? grad_y.contiguous() : grad_y;
  Tensor g_copy, x_copy;
  cpu::Matrix g = as_rows(gy, g_copy);
  if (y.defined()) g.relu_y = yc.const_data_ptr<float>();
  const int64_t M = grad_y.numel() / N;

  Product for_x = {.a = g, .M = M, .K = N}, for_weight = {.a = transposed(g), .M = N, .K = M};
  if (grad_x.defined()) {
    for_x.b = transposed(as_rows(weight, x_copy));
    for_x.out.c = grad_x.mutable_data_ptr<float>();
    for_x.N = for_x.out.row = weight.size(1);
  }
  if (grad_weight.defined()) {
    for_weight.b = transposed(as_rows(input, x_copy));
    for_weight.out.c = grad_weight.mutable_data_ptr<float>();
    for_weight.N = for_weight.out.row = input.size(-1);
  }
  // The bias gradient is the row sums of the same packed operand.
  if (grad_bias.defined()) for_weight.out.row_sums = grad_bias.mutable_data_ptr<float>();
  const bool weight_or_bias = grad_weight.defined() || grad_bias.defined();
  if (grad_x.defined() && weight_or_bias)
    multiply({for_x, for_weight});
  else if (grad_x.defined())
    multiply({for_x});
  else if (weight_or_bias)
    multiply({for_weight});
}

}  // namespace dlkernels
