// conv2d and conv2d_relu: y[n, o, h, w] = act(bias[o] + sum_{i, kh, kw} input[n, i, h * stride -
// padding + kh * dilation, ...] * weight[o, i, kh, kw]). The passes are in conv2d_cpu.cpp and
// conv2d_cuda.cpp.
#include "ops/core/torch_headers.h"

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/threshold_backward.h>

#include "ops/conv2d/geometry.h"
#include "ops/core/op.h"

namespace dlkernels {
namespace {

using namespace conv;

Tensor aten_conv2d(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
                   const Options& options) {
  const auto& [stride, p, dilation, groups] = options;
  TORCH_CHECK(p.size() == 4, "conv2d: padding must be (top, bottom, left, right), got ", p);
  // PyTorch's own arithmetic overflows beyond what these allow. A dilation of 0 is PyTorch's to
  // refuse: it does not where there is nothing to compute.
  pair(kStride, stride), pair({"dilation", 0, kDilation.rule}, dilation);
  pair(kPadding, p.slice(0, 2)), pair(kPadding, p.slice(2, 2));
  if (p[0] == p[1] && p[2] == p[3])
    return at::conv2d_symint(input, weight, bias, stride, std::array{p[0], p[2]}, dilation, groups);
  const Tensor padded = at::constant_pad_nd_symint(input, {p[2], p[3], p[0], p[1]}, 0);
  const std::array<SymInt, 2> none = {0, 0};
  return at::conv2d_symint(padded, weight, bias, stride, none, dilation, groups);
}

// y is conv2d_relu's output, absent for conv2d. Gradients that output_mask excludes are undefined.
struct Conv2dBackward
    : Op<Conv2dBackward,
         Grads(const Tensor&, const Tensor&, const Tensor&, const optional<Tensor>&, SymIntArrayRef,
               SymIntArrayRef, SymIntArrayRef, SymInt, std::array<bool, 3>)> {
  static constexpr const char* kName = "conv2d_backward";
  static constexpr const char* kSchema =
      "(Tensor grad_y, Tensor input, Tensor weight, Tensor? y, SymInt[2] stride, "
      "SymInt[4] padding, SymInt[2] dilation, SymInt groups, bool[3] output_mask) "
      "-> (Tensor, Tensor, Tensor)";
  inline static OpStats stats{kName};

  struct Args {
    const Tensor &grad_y, &input, &weight;
    const optional<Tensor>& y;
    Options options;
    std::array<bool, 3> output_mask;
  };

  static Grads meta(const Args& a) {
    const auto& [grad_y, input, weight, y, options, mask] = a;
    check_device(kName, input, grad_y), check_device(kName, input, weight);
    check_device(kName, input, y);
    const auto all = output_sizes(input, weight, options);
    const auto sizes = SymIntArrayRef(all).slice(input.dim() == 3);
    TORCH_CHECK(grad_y.sym_sizes() == sizes && (!y || y->sym_sizes() == sizes), kName,
                ": grad_y and y must be ", sizes, ", got grad_y ", grad_y.sym_sizes(),
                y ? " and y " : "", y ? y->sym_sizes() : SymIntArrayRef());
    TORCH_CHECK_NOT_IMPLEMENTED(has_gemm_kernel(grad_y, input, weight, y) &&
                                    input.sym_numel() != 0 && weight.sym_numel() != 0,
                                kName, ": tensors must be dense ", kGemmDTypes,
                                " and not empty, got grad_y ", grad_y.scalar_type(), ", input ",
                                input.scalar_type(), ", weight ", weight.scalar_type());
    TORCH_CHECK(fits_cuda(input, weight, options), kName, ": tensors must be smaller, got input ",
                input.sym_sizes(), " and weight ", weight.sym_sizes());
    return new_gradients(input, weight, mask);
  }

  static void cpu(const Grads& grads, const Args& a) {
    const Geometry g = Geometry(a.input, a.weight, a.options).in_a_row();
    const Tensor gy = batched(a.grad_y).contiguous(g.format());
    const Tensor y = a.y ? batched(*a.y).contiguous(g.format()) : Tensor();
    const void* const relu_y = a.y ? y.const_data_ptr() : nullptr;
    gradients(g, g.images(gy, g.K, g.OH, g.OW, relu_y), a.input, a.weight, grads);
  }

  static void cuda(const Grads& grads, const Args& a) {
    const Geometry g = Geometry(a.input, a.weight, a.options).in_a_row();
    gradients_cuda(kName, g, a.grad_y, or_undefined(a.y), Tensor(), a.input, a.weight, grads);
  }
};

template <bool kRelu>
struct Conv2d : Op<Conv2d<kRelu>, Signature<Tensor>> {
  using Backward = Conv2dBackward;
  static constexpr const char* kName = kRelu ? "conv2d_relu" : "conv2d";
  static constexpr const char* kNode = kRelu ? "Conv2dReLUBackward" : "Conv2dBackward";
  static constexpr const char* kSchema =
      "(Tensor input, Tensor weight, Tensor? bias=None, SymInt[2] stride=1, SymInt[4] padding=0, "
      "SymInt[2] dilation=1, SymInt groups=1) -> Tensor";
  static constexpr Autocast kAutocast = Autocast::kLower;
  static constexpr bool kIsGemm = true;
  inline static OpStats stats{kName};
  using Args = conv::Args;

  static bool has_kernel(const Args& a) { return conv::has_kernel(kName, a); }

  static Tensor aten(const Args& a) {
    const Tensor y = aten_conv2d(a.input, a.weight, a.bias, a.options);
    return kRelu ? at::relu(y) : y;
  }

  static Tensor meta(const Args& a) {
    check_device(kName, a.input, a.weight), check_device(kName, a.input, a.bias);
    const auto sizes = output_sizes(a.input, a.weight, a.options);
    check_bias(kName, a.weight, a.bias);
    const Tensor y = at::empty_symint(sizes, a.input.options(), layout(a.input, a.weight));
    return a.input.dim() == 3 ? y.squeeze(0) : y;
  }

  static void cpu(const Tensor& y, const Args& a) {
    const Geometry g = Geometry(a.input, a.weight, a.options).in_a_row();
    const Tensor x = batched(a.input).contiguous(g.format());
    const Tensor bias = a.bias ? to_float32(*a.bias) : Tensor();
    cpu::Conv2d conv = g.forward(x);
    g.set_output(conv, y, g.images(y, g.K, g.OH, g.OW));
    conv.on_store.bias = a.bias ? bias.const_data_ptr<float>() : nullptr,
    conv.on_store.relu = kRelu;
    convolve(g, conv, g.filter(a.weight));
  }

  static void cuda(const Tensor& y, const Args& a) {
    const Geometry g = Geometry(a.input, a.weight, a.options).in_a_row();
    forward_cuda(kName, g, a.input, a.weight, a.bias, g.channels_last, kRelu, y, {});
  }

  // ---- gradient ---------------------------------------------------------------------------

  static Tensor forward(AutogradContext* ctx, const Args& a) {
    const Tensor y = a.apply(Conv2d::call_below_autograd);
    ctx->save_for_backward({a.input, a.weight, kRelu ? y : Tensor()});
    SavedOptions::save(ctx, a.options);
    ctx->saved_data["bias"] = a.bias.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const Tensor& grad_y) {
    const auto saved = ctx->get_saved_variables();
    const SavedOptions saved_options(ctx);
    const auto& [stride, padding, dilation, groups] = saved_options.get();
    auto [gx, gw, gb] =
        Conv2dBackward::call_below_autograd(grad_y, saved[0], saved[1], or_nullopt(saved[2]),
                                            stride, padding, dilation, groups, output_mask(ctx));
    return {gx, gw, gb};
  }

  static variable_list double_backward(AutogradContext* ctx, const Tensor& grad_y) {
    const auto saved = ctx->get_saved_variables();
    const SavedOptions options(ctx);
    const Tensor g = kRelu ? at::threshold_backward(grad_y, saved[2], 0) : grad_y;
    auto out = differentiable_backward(
        [&](const variable_list& in) { return aten_conv2d(in[0], in[1], {}, options.get()); },
        {saved[0], saved[1]}, g);
    if (output_mask(ctx)[2]) out.push_back(batched(g).sum({0, 2, 3}));
    return out;
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(dlkernels, m) {
  register_ops<Conv2d<false>, Conv2d<true>, Conv2dBackward>(m);
}

}  // namespace dlkernels
