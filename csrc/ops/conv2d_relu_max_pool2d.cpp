// conv2d_relu_max_pool2d: schema, shapes, CPU, CUDA and gradient. max_pool2d(relu(conv2d(..)), 2):
// what is pooled exists in cache alone.
#include "ops/torch_headers.h"

#include "conv2d.h"
#include "gradient.h"
#include "max_pool2d.h"

namespace dlkernels {

// argmax (N, K, PH, PW), channels last, is all that the gradient needs to know of what was pooled:
// a byte, 2 * row + column of the maximum in its window, or 255 where that is <= 0 and ReLU lets no
// gradient pass.
TORCH_LIBRARY_FRAGMENT(dlkernels, m) {
  m.def(
      "conv2d_relu_max_pool2d(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, "
      "SymInt[4] padding, SymInt[2] dilation, SymInt groups) -> Tensor");
  m.def(
      "conv2d_relu_max_pool2d_forward(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, "
      "SymInt[4] padding, SymInt[2] dilation, SymInt groups) -> (Tensor y, Tensor argmax)");
  // Gradients nobody asked for come back undefined.
  m.def(
      "conv2d_relu_max_pool2d_backward(Tensor grad_y, Tensor argmax, Tensor input, Tensor weight, "
      "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups, "
      "bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
}

namespace {

using c10::SymInt;
using c10::SymIntArrayRef;
using conv::batched;

OpStats stats("conv2d_relu_max_pool2d"), backward_stats("conv2d_relu_max_pool2d_backward");

using Two = std::tuple<Tensor, Tensor>;
using conv::Grads;

// The arguments but for the tensors.
struct Args {
  SymIntArrayRef stride, padding, dilation;
  SymInt groups;
};
const pool::Args& pooling() {
  static const pool::Args args("conv2d_relu_max_pool2d", {2}, {}, {0}, {1}, /*ceil_mode=*/false);
  return args;
}

template <class Result>
using Op = Result(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
                  SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                  SymInt groups);
using BackwardOp = Grads(const Tensor& grad_y, const Tensor& argmax, const Tensor& input,
                         const Tensor& weight, SymIntArrayRef stride, SymIntArrayRef padding,
                         SymIntArrayRef dilation, SymInt groups, std::array<bool, 3> mask);

// f as the ops are called.
template <class Result,
          Result (*f)(const Args&, const Tensor&, const Tensor&, const optional<Tensor>&)>
Result called(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
              SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
              SymInt groups) {
  return f({stride, padding, dilation, groups}, input, weight, bias);
}

template <class Result>
Result call(const BelowAutograd<Op<Result>>& op, const Args& args, const Tensor& input,
            const Tensor& weight, const optional<Tensor>& bias) {
  return op(input, weight, bias, args.stride, args.padding, args.dilation, args.groups);
}

// ---- the two ops that this is one of --------------------------------------------------------

Tensor conv2d(bool relu, const Args& args, const Tensor& input, const Tensor& weight,
              const optional<Tensor>& bias) {
  using Conv2d = Tensor(const Tensor&, const Tensor&, const optional<Tensor>&, SymIntArrayRef,
                        SymIntArrayRef, SymIntArrayRef, SymInt);
  static const auto plain = find_op<Conv2d>("dlkernels::conv2d");
  static const auto with_relu = find_op<Conv2d>("dlkernels::conv2d_relu");
  return (relu ? with_relu : plain)
      .call(input, weight, bias, args.stride, args.padding, args.dilation, args.groups);
}

Tensor max_pool2d(const Tensor& x) {
  static const auto op =
      find_op<Tensor(const Tensor&, SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, SymIntArrayRef,
                     bool)>("dlkernels::max_pool2d");
  static const std::array<SymInt, 1> size = {2}, none = {0}, one = {1};
  return op.call(x, size, {}, none, one, /*ceil_mode=*/false);
}

// (OH, OW) of the convolution
c10::SymDimVector plane(const Args& args, const Tensor& input, const Tensor& weight) {
  const auto sizes =
      conv::output_sizes(input, weight, args.stride, args.padding, args.dilation, args.groups);
  return {sizes[2], sizes[3]};
}

// Each decides for itself what is PyTorch's: where this one is, at least the convolution is.
Tensor conv2d_relu_max_pool2d_torch(const Args& args, const Tensor& input, const Tensor& weight,
                                    const optional<Tensor>& bias) {
  stats.torch_ran();
  return max_pool2d(conv2d(/*relu=*/true, args, input, weight, bias));
}

bool ours(const Args& args, const Tensor& input, const Tensor& weight,
          const optional<Tensor>& bias) {
  check_device(pooling().op, input, weight);
  check_device(pooling().op, input, bias);
  return are_for_products(input, weight, bias) && input.sym_numel() != 0 &&
         weight.sym_numel() != 0 &&
         conv::fits_cuda(input, weight, args.stride, args.padding, args.dilation);
}

// ---- shapes -------------------------------------------------------------------------------

// y ([N,] K, PH, PW), laid out as PyTorch's, and argmax
Two conv2d_relu_max_pool2d_forward_meta(const Args& args, const Tensor& input, const Tensor& weight,
                                        const optional<Tensor>& bias) {
  check_device(pooling().op, input, weight), check_device(pooling().op, input, bias);
  conv::check_bias(pooling().op, weight, bias);
  auto sizes =
      conv::output_sizes(input, weight, args.stride, args.padding, args.dilation, args.groups);
  for (const int i : {0, 1}) sizes[2 + i] = pool::output_size(pooling(), i, sizes[2 + i]);
  const auto layout = input.dim() == 3 ? at::MemoryFormat::Contiguous : conv::layout(input, weight);
  const Tensor y = at::empty_symint(sizes, input.options(), layout);
  const Tensor argmax =
      at::empty_symint(sizes, input.options().dtype(at::kByte), at::MemoryFormat::ChannelsLast);
  return input.dim() == 3 ? Two(y.squeeze(0), argmax.squeeze(0)) : Two(y, argmax);
}

Tensor conv2d_relu_max_pool2d_meta(const Args& args, const Tensor& input, const Tensor& weight,
                                   const optional<Tensor>& bias) {
  return std::get<0>(conv2d_relu_max_pool2d_forward_meta(args, input, weight, bias));
}

Grads conv2d_relu_max_pool2d_backward_meta(const Tensor& grad_y, const Tensor& argmax,
                                           const Tensor& input, const Tensor& weight,
                                           SymIntArrayRef stride, SymIntArrayRef padding,
                                           SymIntArrayRef dilation, SymInt groups,
                                           std::array<bool, 3> mask) {
  const char* const op = "conv2d_relu_max_pool2d_backward";
  for (const Tensor& t : {argmax, input, weight}) check_device(op, grad_y, t);
  pool::check_argmax(pooling(), argmax, plane({stride, padding, dilation, groups}, input, weight));
  TORCH_CHECK(grad_y.sym_sizes() == argmax.sym_sizes() && argmax.dim() == input.dim() &&
                  argmax.sym_size(-3) == weight.sym_size(0) &&
                  batched(argmax).sym_size(0) == batched(input).sym_size(0),
              op, ": grad_y and argmax must be of the output's size, got grad_y ",
              grad_y.sym_sizes(), " and argmax ", argmax.sym_sizes());
  for (const Tensor& t : {grad_y, input, weight})
    TORCH_CHECK_NOT_IMPLEMENTED(are_for_products(grad_y, t) && t.sym_numel() != 0, op,
                                ": tensors must be dense ", kProductDTypes, " and not empty, got ",
                                t.scalar_type(), " of ", t.sym_sizes());
  TORCH_CHECK(conv::fits_cuda(input, weight, stride, padding, dilation), op,
              ": tensors must be smaller, got input ", input.sym_sizes(), " and weight ",
              weight.sym_sizes());
  return conv::new_gradients(input, weight, mask);
}

// ---- cpu ----------------------------------------------------------------------------------

Two conv2d_relu_max_pool2d_forward_cpu(const Args& args, const Tensor& input, const Tensor& weight,
                                       const optional<Tensor>& bias) {
  TORCH_CHECK_NOT_IMPLEMENTED(ours(args, input, weight, bias), pooling().op,
                              "_forward: tensors must be dense ", kProductDTypes,
                              " and not empty, got input ", input.scalar_type(), ", weight ",
                              weight.scalar_type());
  auto [y, argmax] = conv2d_relu_max_pool2d_forward_meta(args, input, weight, bias);
  stats.kernel_ran();
  const conv::Geometry g(input, weight, args.stride, args.padding, args.dilation, args.groups);
  const Tensor x = batched(input).contiguous(g.format());
  const Tensor b = bias ? widened(*bias) : Tensor();
  cpu::Conv2d v = g.forward(x);
  v.h.out = g.OH / 2 * 2, v.w.out = g.OW / 2 * 2;  // what lies in no window is not computed
  g.set_output(v, y, g.images(y, g.K, g.OH / 2, g.OW / 2));
  v.bias = bias ? b.const_data_ptr<float>() : nullptr, v.relu = true;
  v.argmax = argmax.mutable_data_ptr<uint8_t>();
  convolve(g, v, g.filter(weight));
  return {y, argmax};
}

Tensor conv2d_relu_max_pool2d_cpu(const Args& args, const Tensor& input, const Tensor& weight,
                                  const optional<Tensor>& bias) {
  if (!ours(args, input, weight, bias))
    return conv2d_relu_max_pool2d_torch(args, input, weight, bias);
  return std::get<0>(conv2d_relu_max_pool2d_forward_cpu(args, input, weight, bias));
}

Grads conv2d_relu_max_pool2d_backward_cpu(const Tensor& grad_y, const Tensor& argmax,
                                          const Tensor& input, const Tensor& weight,
                                          SymIntArrayRef stride, SymIntArrayRef padding,
                                          SymIntArrayRef dilation, SymInt groups,
                                          std::array<bool, 3> mask) {
  const Grads out = conv2d_relu_max_pool2d_backward_meta(grad_y, argmax, input, weight, stride,
                                                         padding, dilation, groups, mask);
  backward_stats.kernel_ran();
  const conv::Geometry g(input, weight, stride, padding, dilation, groups);
  const Tensor gy = batched(grad_y).contiguous(g.format());
  const Tensor elements = batched(argmax).contiguous(at::MemoryFormat::ChannelsLast);
  cpu::Images images = g.images(gy, g.K, g.OH / 2, g.OW / 2);
  images.H = g.OH, images.W = g.OW, images.argmax = elements.const_data_ptr<uint8_t>();
  conv::gradients(g, images, input, weight, out);
  return out;
}

// ---- cuda ---------------------------------------------------------------------------------

Two conv2d_relu_max_pool2d_forward_cuda(const Args& args, const Tensor& input, const Tensor& weight,
                                        const optional<Tensor>& bias) {
  TORCH_CHECK_NOT_IMPLEMENTED(ours(args, input, weight, bias), pooling().op,
                              "_forward: tensors must be dense ", kProductDTypes,
                              " and not empty, got input ", input.scalar_type(), ", weight ",
                              weight.scalar_type());
  auto [y, argmax] = conv2d_relu_max_pool2d_forward_meta(args, input, weight, bias);
  stats.kernel_ran();
  const conv::Geometry g(input, weight, args.stride, args.padding, args.dilation, args.groups);
  const bool channels_last = g.channels_last && input.dim() == 4;  // as y lies
  conv::forward_cuda(pooling().op, g, input, weight, bias, channels_last, /*relu=*/true, y, argmax);
  return {y, argmax};
}

Tensor conv2d_relu_max_pool2d_cuda(const Args& args, const Tensor& input, const Tensor& weight,
                                   const optional<Tensor>& bias) {
  if (!ours(args, input, weight, bias))
    return conv2d_relu_max_pool2d_torch(args, input, weight, bias);
  return std::get<0>(conv2d_relu_max_pool2d_forward_cuda(args, input, weight, bias));
}

Grads conv2d_relu_max_pool2d_backward_cuda(const Tensor& grad_y, const Tensor& argmax,
                                           const Tensor& input, const Tensor& weight,
                                           SymIntArrayRef stride, SymIntArrayRef padding,
                                           SymIntArrayRef dilation, SymInt groups,
                                           std::array<bool, 3> mask) {
  const Grads out = conv2d_relu_max_pool2d_backward_meta(grad_y, argmax, input, weight, stride,
                                                         padding, dilation, groups, mask);
  backward_stats.kernel_ran();
  const conv::Geometry g(input, weight, stride, padding, dilation, groups);
  conv::gradients_cuda(pooling().op, g, grad_y, Tensor(), argmax, input, weight, out);
  return out;
}

// ---- gradient -----------------------------------------------------------------------------

struct Conv2dReLUMaxPool2dFunction : Function<Conv2dReLUMaxPool2dFunction> {
  static constexpr const char* kNode = "Conv2dReLUMaxPool2dBackward";

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                        const optional<Tensor>& bias, const Args& args) {
    static const BelowAutograd<Op<Two>> op("dlkernels::conv2d_relu_max_pool2d_forward");
    const auto [y, argmax] = call(op, args, input, weight, bias);
    ctx->save_for_backward({input, weight, argmax});
    ctx->saved_data["stride"] = args.stride;
    ctx->saved_data["padding"] = args.padding;
    ctx->saved_data["dilation"] = args.dilation;
    ctx->saved_data["groups"] = args.groups;
    ctx->saved_data["bias"] = bias.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const BelowAutograd<BackwardOp> op("dlkernels::conv2d_relu_max_pool2d_backward");
    const auto saved = ctx->get_saved_variables();
    const Tensor &grad_y = grads[0], &input = saved[0], &weight = saved[1], &argmax = saved[2];
    const auto stride = ctx->saved_data["stride"].toSymIntVector();
    const auto padding = ctx->saved_data["padding"].toSymIntVector();
    const auto dilation = ctx->saved_data["dilation"].toSymIntVector();
    const Args args = {stride, padding, dilation, ctx->saved_data["groups"].toSymInt()};
    // needs_input_grad counts tensors, not arguments: an absent bias has no slot of its own.
    const bool bias = ctx->saved_data["bias"].toBool(),
               grad_bias = bias && ctx->needs_input_grad(2);
    if (is_differentiated(grad_y, backward_stats))
      return differentiable(args, grad_y, argmax, input, weight, bias, grad_bias);
    auto [gx, gw, gb] = op(grad_y, argmax, input, weight, stride, padding, dilation, args.groups,
                           {ctx->needs_input_grad(0), ctx->needs_input_grad(1), grad_bias});
    return {gx, gw, gb, Tensor()};
  }

  // The gradient of the elements of the convolution that argmax names, as PyTorch's gather. Which
  // ones depends on all inputs, with derivatives of 0.
  static variable_list differentiable(const Args& args, const Tensor& grad_y, const Tensor& argmax,
                                      const Tensor& input, const Tensor& weight, bool bias,
                                      bool grad_bias) {
    static const BelowAutograd<Tensor(const Tensor&, SymIntArrayRef, at::IntArrayRef, bool)>
        indices_op("dlkernels::max_pool2d_indices");
    const Tensor indices =
        indices_op(argmax, plane(args, input, weight), pooling().window, /*ceil_mode=*/false);
    const Tensor at = indices.clamp_min(0).flatten(-2);
    Tensor g = grad_y.masked_fill(indices.lt(0), 0) + zero_of(input) + zero_of(weight);
    if (bias)
      g = g + zero_of(in_place_of_input(2, at::empty_symint({weight.sym_size(0)}, g.options())));
    variable_list out = differentiable_backward(
        [&](const variable_list& in) {
          const Tensor y = conv2d(/*relu=*/false, args, in[0], in[1], {});
          return y.flatten(-2).gather(-1, at).view_as(g);
        },
        {input, weight}, g);
    out.resize(4);
    if (grad_bias) out[2] = batched(g).sum({0, 2, 3});
    return out;
  }
};

Tensor conv2d_relu_max_pool2d_autograd(const Args& args, const Tensor& input, const Tensor& weight,
                                       const optional<Tensor>& bias) {
  static const BelowAutograd<Op<Tensor>> op("dlkernels::conv2d_relu_max_pool2d");
  if (!ours(args, input, weight, bias))
    return conv2d_relu_max_pool2d_torch(args, input, weight, bias);
  if (any_requires_grad(input, weight, bias))
    return Conv2dReLUMaxPool2dFunction::apply(input, weight, bias, args);
  return call(op, args, input, weight, bias);  // no argmax is kept
}

const bool torch_paths =
    (register_torch_path("conv2d_relu_max_pool2d", called<Tensor, conv2d_relu_max_pool2d_torch>,
                         /*on_autocast_cpu=*/false),
     true);

}  // namespace

TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("conv2d_relu_max_pool2d", called<Tensor, conv2d_relu_max_pool2d_cpu>);
  m.impl("conv2d_relu_max_pool2d_forward", called<Two, conv2d_relu_max_pool2d_forward_cpu>);
  m.impl("conv2d_relu_max_pool2d_backward", conv2d_relu_max_pool2d_backward_cpu);
}
TORCH_LIBRARY_IMPL(dlkernels, CUDA, m) {
  m.impl("conv2d_relu_max_pool2d", called<Tensor, conv2d_relu_max_pool2d_cuda>);
  m.impl("conv2d_relu_max_pool2d_forward", called<Two, conv2d_relu_max_pool2d_forward_cuda>);
  m.impl("conv2d_relu_max_pool2d_backward", conv2d_relu_max_pool2d_backward_cuda);
}
TORCH_LIBRARY_IMPL(dlkernels, AutocastCPU, m) {
  register_autocast_cpu(m, "conv2d_relu_max_pool2d");
}
TORCH_LIBRARY_IMPL(dlkernels, AutocastCUDA, m) {
  register_autocast_cuda<true>(m, "conv2d_relu_max_pool2d");
}
TORCH_LIBRARY_IMPL(dlkernels, Meta, m) {
  m.impl("conv2d_relu_max_pool2d", called<Tensor, conv2d_relu_max_pool2d_meta>);
  m.impl("conv2d_relu_max_pool2d_forward", called<Two, conv2d_relu_max_pool2d_forward_meta>);
  m.impl("conv2d_relu_max_pool2d_backward", conv2d_relu_max_pool2d_backward_meta);
}
TORCH_LIBRARY_IMPL(dlkernels, Autograd, m) {
  m.impl("conv2d_relu_max_pool2d", called<Tensor, conv2d_relu_max_pool2d_autograd>);
}

}  // namespace dlkernels
