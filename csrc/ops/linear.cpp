// linear and linear_relu: schema, shapes, CPU, CUDA and gradient. The arithmetic is in
// cpu/gemm.inl.h, cpu/dot.inl.h and cuda/gemm.cuh.
#include "ops/torch_headers.h"

#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/threshold_backward.h>

#include "gradient.h"
#include "linear.h"

namespace dlkernels {

TORCH_LIBRARY_FRAGMENT(dlkernels, m) {
  m.def("linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def("linear_relu(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor");
  // input is only needed for weight's gradient and weight for input's; y is linear_relu's output,
  // absent for linear. Gradients nobody asked for come back undefined.
  m.def(
      "linear_backward(Tensor grad_y, Tensor? input, Tensor? weight, Tensor? y, "
      "bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
}

namespace {

OpStats linear_stats("linear"), linear_relu_stats("linear_relu"),
    linear_backward_stats("linear_backward");

template <bool kRelu>
constexpr const char* kName = kRelu ? "linear_relu" : "linear";

using Linear = Tensor(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias);
using LinearBackward = Grads(const Tensor& grad_y, const optional<Tensor>& input,
                             const optional<Tensor>& weight, const optional<Tensor>& y,
                             std::array<bool, 3> mask);

// PyTorch's own, for what is not ours.
template <bool kRelu>
Tensor linear_torch(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias) {
  (kRelu ? linear_relu_stats : linear_stats).torch_ran();
  const Tensor y = at::linear(input, weight, bias);
  return kRelu ? at::relu(y) : y;
}

// One dtype of ours, a matrix as weight and a vector as bias. What PyTorch accepts beyond (a weight
// vector, a bias that broadcasts) is PyTorch's.
template <bool kRelu>
bool ours(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias) {
  check_device(kName<kRelu>, input, weight);
  check_device(kName<kRelu>, input, bias);
  return are_for_products(input, weight, bias) && input.dim() >= 1 && weight.dim() == 2 &&
         (!bias || (bias->dim() == 1 && (bias->sym_size(0) != 1 || weight.sym_size(0) == 1)));
}

// ---- shapes: shared by every device and by torch.compile, hence SymInt --------------------

// input (..., K), weight (N, K), bias (N) -> (..., N)
template <bool kRelu>
Tensor linear_meta(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias) {
  check_device(kName<kRelu>, input, weight), check_device(kName<kRelu>, input, bias);
  TORCH_CHECK(input.dim() >= 1 && weight.dim() == 2, kName<kRelu>,
              ": input must be (..., K) and weight (N, K), got input ", input.sym_sizes(),
              " and weight ", weight.sym_sizes());
  const c10::SymInt N = weight.sym_size(0), K = weight.sym_size(1);
  TORCH_CHECK(input.sym_size(-1) == K, kName<kRelu>, ": input's last dimension must be ", K,
              " (weight is ", weight.sym_sizes(), "), got input ", input.sym_sizes());
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->sym_size(0) == N), kName<kRelu>,
              ": bias must be (", N, ") (weight is ", weight.sym_sizes(), "), got bias ",
              bias->sym_sizes());
  c10::SymDimVector sizes(input.sym_sizes().begin(), input.sym_sizes().end());
  sizes.back() = N;
  return at::empty_symint(sizes, input.options());
}

Grads linear_backward_meta(const Tensor& grad_y, const optional<Tensor>& input,
                           const optional<Tensor>& weight, const optional<Tensor>& y,
                           std::array<bool, 3> mask) {
  TORCH_CHECK(grad_y.dim() >= 1, "linear_backward: grad_y must be (..., N), got ()");
  TORCH_CHECK((!mask[0] || weight) && (!mask[1] || input),
              "linear_backward: a gradient of input needs weight, one of weight needs input");
  for (const auto& x : {input, weight, y}) {
    check_device("linear_backward", grad_y, x);
    TORCH_CHECK_NOT_IMPLEMENTED(
        are_for_products(grad_y, x), "linear_backward: tensors must be dense ", kProductDTypes,
        ", got grad_y ", grad_y.scalar_type(), " and ", x ? x->scalar_type() : at::kFloat);
  }
  c10::SymDimVector sizes(grad_y.sym_sizes().begin(), grad_y.sym_sizes().end());
  const c10::SymInt N = sizes.back();
  TORCH_CHECK(!y || y->sym_sizes() == grad_y.sym_sizes(), "linear_backward: y must be ",
              grad_y.sym_sizes(), " as grad_y is, got ", y->sym_sizes());
  TORCH_CHECK(!weight || (weight->dim() == 2 && weight->sym_size(0) == N),
              "linear_backward: weight must be (", N, ", K) (grad_y is ", grad_y.sym_sizes(),
              "), got ", weight->sym_sizes());
  if (weight) sizes.back() = weight->sym_size(1);
  if (input && !weight && input->dim() >= 1) sizes.back() = input->sym_size(-1);
  TORCH_CHECK(!input || input->sym_sizes() == c10::SymIntArrayRef(sizes),
              "linear_backward: input must be ", c10::SymIntArrayRef(sizes), ", got ",
              input->sym_sizes());
  return {mask[0] ? at::empty_symint(sizes, grad_y.options()) : Tensor(),
          mask[1] ? at::empty_symint({N, sizes.back()}, grad_y.options()) : Tensor(),
          mask[2] ? at::empty_symint({N}, grad_y.options()) : Tensor()};
}

// ---- cpu ----------------------------------------------------------------------------------

Tensor some(const optional<Tensor>& x) { return x ? *x : Tensor(); }

template <bool kRelu>
Tensor linear_cpu(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias) {
  if (!ours<kRelu>(input, weight, bias)) return linear_torch<kRelu>(input, weight, bias);
  (kRelu ? linear_relu_stats : linear_stats).kernel_ran();
  Tensor y = linear_meta<kRelu>(input, weight, bias);
  linear_into(y, input, weight, some(bias), kRelu);
  return y;
}

Grads linear_backward_cpu(const Tensor& grad_y, const optional<Tensor>& input,
                          const optional<Tensor>& weight, const optional<Tensor>& y,
                          std::array<bool, 3> mask) {
  auto [grad_x, grad_weight, grad_bias] = linear_backward_meta(grad_y, input, weight, y, mask);
  linear_backward_stats.kernel_ran();
  linear_backward_into({grad_x, grad_weight, grad_bias}, grad_y, some(input), some(weight),
                       some(y));
  return {grad_x, grad_weight, grad_bias};
}

// ---- cuda ---------------------------------------------------------------------------------

template <bool kRelu>
Tensor linear_cuda(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias) {
  if (!ours<kRelu>(input, weight, bias)) return linear_torch<kRelu>(input, weight, bias);
  (kRelu ? linear_relu_stats : linear_stats).kernel_ran();
  const Tensor y = linear_meta<kRelu>(input, weight, bias);
  linear_into_cuda(kName<kRelu>, y, input, weight, some(bias), kRelu);
  return y;
}

// The ReLU's mask is applied in a pass of its own, 3 numbers of memory for each of grad_y: to read
// y as well, each product would need half as much shared memory again, which narrow types are bound
// by, and as much more of L2.
Grads linear_backward_cuda(const Tensor& grad_y, const optional<Tensor>& input,
                           const optional<Tensor>& weight, const optional<Tensor>& y,
                           std::array<bool, 3> mask) {
  const Grads grads = linear_backward_meta(grad_y, input, weight, y, mask);
  linear_backward_stats.kernel_ran();
  constexpr const char* kOp = "linear_backward";
  const Tensor g = y ? through_relu_cuda(kOp, grad_y, *y) : grad_y;
  linear_backward_into_cuda(kOp, grads, g, some(input), some(weight), Tensor());
  return grads;
}

// ---- gradient -----------------------------------------------------------------------------

// (..., K) -> (M, K)
Tensor as_matrix(const Tensor& x) { return x.dim() == 1 ? x.unsqueeze(0) : x.flatten(0, -2); }

template <bool kRelu>
const BelowAutograd<Linear>& linear_op() {
  static const BelowAutograd<Linear> op(kRelu ? "dlkernels::linear_relu" : "dlkernels::linear");
  return op;
}

template <bool kRelu>
struct LinearFunction : Function<LinearFunction<kRelu>> {
  static constexpr const char* kNode = kRelu ? "LinearReLUBackward" : "LinearBackward";

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                        const optional<Tensor>& bias) {
    const Tensor y = linear_op<kRelu>()(input, weight, bias);
    // As PyTorch, no more than is needed: the rest may be freed or written to before backward.
    ctx->save_for_backward({weight.requires_grad() ? input : Tensor(),
                            input.requires_grad() ? weight : Tensor(), kRelu ? y : Tensor()});
    ctx->saved_data["bias"] = bias.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const BelowAutograd<LinearBackward> op("dlkernels::linear_backward");
    const auto saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &weight = saved[1], &y = saved[2];
    // needs_input_grad counts tensors, not arguments: an absent bias has no slot of its own.
    const bool grad_bias = ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(2);
    const std::array<bool, 3> mask = {ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                      grad_bias};
    if (is_differentiated(grads[0], linear_backward_stats)) {
      const Tensor g = kRelu ? at::threshold_backward(grads[0], y, 0) : grads[0];
      return {mask[0] ? at::matmul(g, weight) : Tensor(),
              mask[1] ? at::mm(as_matrix(g).t(), as_matrix(input)) : Tensor(),
              mask[2] ? as_matrix(g).sum(0) : Tensor()};
    }
    const auto given = [](const Tensor& x) { return x.defined() ? optional(x) : std::nullopt; };
    auto [gx, gw, gb] = op(grads[0], given(input), given(weight), given(y), mask);
    return {gx, gw, gb};
  }
};

template <bool kRelu>
Tensor linear_autograd(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias) {
  if (!ours<kRelu>(input, weight, bias)) return linear_torch<kRelu>(input, weight, bias);
  // A node that records nothing would still cost a third of a small call.
  if (!any_requires_grad(input, weight, bias)) return linear_op<kRelu>()(input, weight, bias);
  return LinearFunction<kRelu>::apply(input, weight, bias);
}

const bool torch_paths =
    (register_torch_path("linear", linear_torch<false>, /*on_autocast_cpu=*/false),
     register_torch_path("linear_relu", linear_torch<true>, /*on_autocast_cpu=*/false), true);

}  // namespace

TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("linear", linear_cpu<false>);
  m.impl("linear_relu", linear_cpu<true>);
  m.impl("linear_backward", linear_backward_cpu);
}
TORCH_LIBRARY_IMPL(dlkernels, CUDA, m) {
  m.impl("linear", linear_cuda<false>);
  m.impl("linear_relu", linear_cuda<true>);
  m.impl("linear_backward", linear_backward_cuda);
}
TORCH_LIBRARY_IMPL(dlkernels, AutocastCPU, m) {
  register_autocast_cpu(m, "linear");
  register_autocast_cpu(m, "linear_relu");
}
TORCH_LIBRARY_IMPL(dlkernels, AutocastCUDA, m) {
  register_autocast_cuda<true>(m, "linear");
  register_autocast_cuda<true>(m, "linear_relu");
}
TORCH_LIBRARY_IMPL(dlkernels, Meta, m) {
  m.impl("linear", linear_meta<false>);
  m.impl("linear_relu", linear_meta<true>);
  m.impl("linear_backward", linear_backward_meta);
}
TORCH_LIBRARY_IMPL(dlkernels, Autograd, m) {
  m.impl("linear", linear_autograd<false>);
  m.impl("linear_relu", linear_autograd<true>);
}

}  // namespace dlkernels
