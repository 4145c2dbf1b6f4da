// linear and linear_relu: y[..., n] = act(sum_k input[..., k] * weight[n, k] + bias[n]). The
// arithmetic is in cpu/gemm/ and cuda/gemm/.
#include "ops/core/torch_headers.h"

#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/threshold_backward.h>

#include "ops/core/op.h"
#include "ops/linear/linear.h"

namespace dlkernels {
namespace {

// input is needed for weight's gradient alone, and weight for input's; y is linear_relu's output,
// absent for linear. Gradients that output_mask excludes are undefined.
struct LinearBackward
    : Op<LinearBackward, Grads(const Tensor&, const optional<Tensor>&, const optional<Tensor>&,
                               const optional<Tensor>&, std::array<bool, 3>)> {
  static constexpr const char* kName = "linear_backward";
  static constexpr const char* kSchema =
      "(Tensor grad_y, Tensor? input, Tensor? weight, Tensor? y, bool[3] output_mask) "
      "-> (Tensor, Tensor, Tensor)";
  inline static OpStats stats{kName};

  struct Args {
    const Tensor& grad_y;
    const optional<Tensor>&input, &weight, &y;
    std::array<bool, 3> output_mask;
  };

  static Grads meta(const Args& a) {
    const auto& [grad_y, input, weight, y, mask] = a;
    TORCH_CHECK(grad_y.dim() >= 1, kName, ": grad_y must be (..., N), got ()");
    TORCH_CHECK((!mask[0] || weight) && (!mask[1] || input), kName,
                ": a gradient of input needs weight, one of weight needs input");
    for (const auto& x : {input, weight, y}) {
      check_device(kName, grad_y, x);
      TORCH_CHECK_NOT_IMPLEMENTED(has_gemm_kernel(grad_y, x), kName, ": tensors must be dense ",
                                  kGemmDTypes, ", got grad_y ", grad_y.scalar_type(), " and ",
                                  x ? x->scalar_type() : at::kFloat);
    }
    c10::SymDimVector sizes(grad_y.sym_sizes().begin(), grad_y.sym_sizes().end());
    const c10::SymInt N = sizes.back();
    TORCH_CHECK(!y || y->sym_sizes() == grad_y.sym_sizes(), kName, ": y must be ",
                grad_y.sym_sizes(), " as grad_y is, got ", y->sym_sizes());
    TORCH_CHECK(!weight || (weight->dim() == 2 && weight->sym_size(0) == N), kName,
                ": weight must be (", N, ", K) (grad_y is ", grad_y.sym_sizes(), "), got ",
                weight->sym_sizes());
    if (weight) sizes.back() = weight->sym_size(1);
    if (input && !weight && input->dim() >= 1) sizes.back() = input->sym_size(-1);
    TORCH_CHECK(!input || input->sym_sizes() == c10::SymIntArrayRef(sizes), kName,
                ": input must be ", c10::SymIntArrayRef(sizes), ", got ", input->sym_sizes());
    return {mask[0] ? at::empty_symint(sizes, grad_y.options()) : Tensor(),
            mask[1] ? at::empty_symint({N, sizes.back()}, grad_y.options()) : Tensor(),
            mask[2] ? at::empty_symint({N}, grad_y.options()) : Tensor()};
  }

  static void cpu(const Grads& grads, const Args& a) {
    linear_backward_into(grads, a.grad_y, or_undefined(a.input), or_undefined(a.weight),
                         or_undefined(a.y));
  }

  // The ReLU's mask is applied in a pass of its own, 3 numbers of memory for each of grad_y: to
  // read y as well, each product would need half as much shared memory again, which reduced floats
  // are bound by, and as much more of L2.
  static void cuda(const Grads& grads, const Args& a) {
    const Tensor g = a.y ? through_relu_cuda(kName, a.grad_y, *a.y) : a.grad_y;
    linear_backward_into_cuda(kName, grads, g, or_undefined(a.input), or_undefined(a.weight),
                              Tensor());
  }
};

// (..., K) -> (M, K)
Tensor as_matrix(const Tensor& x) { return x.dim() == 1 ? x.unsqueeze(0) : x.flatten(0, -2); }

template <bool kRelu>
struct Linear : Op<Linear<kRelu>, Tensor(const Tensor&, const Tensor&, const optional<Tensor>&)> {
  using Backward = LinearBackward;
  static constexpr const char* kName = kRelu ? "linear_relu" : "linear";
  static constexpr const char* kNode = kRelu ? "LinearReLUBackward" : "LinearBackward";
  static constexpr const char* kSchema =
      "(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor";
  static constexpr Autocast kAutocast = Autocast::kLower;
  static constexpr bool kIsGemm = true;
  inline static OpStats stats{kName};

  struct Args {
    const Tensor &input, &weight;
    const optional<Tensor>& bias;
  };

  // One dtype, a matrix as weight and a vector as bias. What PyTorch accepts beyond (a weight
  // vector, a bias that broadcasts) is PyTorch's.
  static bool has_kernel(const Args& a) {
    check_device(kName, a.input, a.weight), check_device(kName, a.input, a.bias);
    return has_gemm_kernel(a.input, a.weight, a.bias) && a.input.dim() >= 1 &&
           a.weight.dim() == 2 &&
           (!a.bias ||
            (a.bias->dim() == 1 && (a.bias->sym_size(0) != 1 || a.weight.sym_size(0) == 1)));
  }

  static Tensor aten(const Args& a) {
    const Tensor y = at::linear(a.input, a.weight, a.bias);
    return kRelu ? at::relu(y) : y;
  }

  // input (..., K), weight (N, K), bias (N) -> (..., N)
  static Tensor meta(const Args& a) {
    const auto& [input, weight, bias] = a;
    check_device(kName, input, weight), check_device(kName, input, bias);
    TORCH_CHECK(input.dim() >= 1 && weight.dim() == 2, kName,
                ": input must be (..., K) and weight (N, K), got input ", input.sym_sizes(),
                " and weight ", weight.sym_sizes());
    const c10::SymInt N = weight.sym_size(0), K = weight.sym_size(1);
    TORCH_CHECK(input.sym_size(-1) == K, kName, ": input's last dimension must be ", K,
                " (weight is ", weight.sym_sizes(), "), got input ", input.sym_sizes());
    TORCH_CHECK(!bias || (bias->dim() == 1 && bias->sym_size(0) == N), kName, ": bias must be (", N,
                ") (weight is ", weight.sym_sizes(), "), got bias ", bias->sym_sizes());
    c10::SymDimVector sizes(input.sym_sizes().begin(), input.sym_sizes().end());
    sizes.back() = N;
    return at::empty_symint(sizes, input.options());
  }

  static void cpu(const Tensor& y, const Args& a) {
    linear_into(y, a.input, a.weight, or_undefined(a.bias), kRelu);
  }

  static void cuda(const Tensor& y, const Args& a) {
    linear_into_cuda(kName, y, a.input, a.weight, or_undefined(a.bias), kRelu);
  }

  // ---- gradient ---------------------------------------------------------------------------

  static Tensor forward(AutogradContext* ctx, const Args& a) {
    const Tensor y = Linear::call_below_autograd(a.input, a.weight, a.bias);
    // As PyTorch, no more than is needed: the rest may be freed or written to before backward.
    ctx->save_for_backward({a.weight.requires_grad() ? a.input : Tensor(),
                            a.input.requires_grad() ? a.weight : Tensor(), kRelu ? y : Tensor()});
    ctx->saved_data["bias"] = a.bias.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const Tensor& grad_y) {
    const auto saved = ctx->get_saved_variables();
    auto [gx, gw, gb] = LinearBackward::call_below_autograd(
        grad_y, or_nullopt(saved[0]), or_nullopt(saved[1]), or_nullopt(saved[2]), output_mask(ctx));
    return {gx, gw, gb};
  }

  static variable_list double_backward(AutogradContext* ctx, const Tensor& grad_y) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &weight = saved[1], &y = saved[2];
    const auto mask = output_mask(ctx);
    const Tensor g = kRelu ? at::threshold_backward(grad_y, y, 0) : grad_y;
    return {mask[0] ? at::matmul(g, weight) : Tensor(),
            mask[1] ? at::mm(as_matrix(g).t(), as_matrix(input)) : Tensor(),
            mask[2] ? as_matrix(g).sum(0) : Tensor()};
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(dlkernels, m) {
  register_ops<Linear<false>, Linear<true>, LinearBackward>(m);
}

}  // namespace dlkernels
