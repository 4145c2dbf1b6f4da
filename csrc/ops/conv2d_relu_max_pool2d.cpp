// conv2d_relu_max_pool2d: schema, shapes, CPU and gradient. max_pool2d(relu(conv2d(..))) with
// windows that lie side by side.
#include <ATen/core/Tensor.h>

#include "common.h"
#include "conv2d.h"
#include "max_pool2d.h"

namespace dlkernels {

// `pool` is the window's size and its stride. argmax is all that the gradient needs to know of what
// was pooled: a byte, the position kh * KW + kw of the maximum in its window as max_pool2d_forward
// has it, or 255 where the maximum is <= 0 and ReLU lets no gradient pass.
TORCH_LIBRARY_FRAGMENT(dlkernels, m) {
  m.def(
      "conv2d_relu_max_pool2d(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, "
      "SymInt[4] padding, SymInt[2] dilation, SymInt groups, SymInt[2] pool) -> Tensor");
  m.def(
      "conv2d_relu_max_pool2d_forward(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, "
      "SymInt[4] padding, SymInt[2] dilation, SymInt groups, SymInt[2] pool) "
      "-> (Tensor y, Tensor argmax)");
  // Gradients nobody asked for come back undefined.
  m.def(
      "conv2d_relu_max_pool2d_backward(Tensor grad_y, Tensor argmax, Tensor input, Tensor weight, "
      "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups, SymInt[2] pool, "
      "bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
}

namespace {

using at::IntArrayRef;
using c10::SymInt;
using c10::SymIntArrayRef;
using conv::batched;

OpStats stats("conv2d_relu_max_pool2d"), backward_stats("conv2d_relu_max_pool2d_backward");

using Two = std::tuple<Tensor, Tensor>;
using Grads = std::tuple<Tensor, Tensor, Tensor>;

// The arguments but for the tensors.
struct Args {
  SymIntArrayRef stride, padding, dilation;
  SymInt groups;
  pool::Args pool;

  Args(SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation, const SymInt& groups,
       SymIntArrayRef pool)
      : stride(stride),
        padding(padding),
        dilation(dilation),
        groups(groups),
        pool("conv2d_relu_max_pool2d", pool::ints(pool), {}, {0}, {1}, /*ceil_mode=*/false) {}

  IntArrayRef window() const { return pool.window; }
  c10::SymDimVector pool_size() const { return {pool.window[0], pool.window[1]}; }
};

template <class Result>
using Op = Result(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
                  SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                  SymInt groups, SymIntArrayRef pool);
using BackwardOp = Grads(const Tensor& grad_y, const Tensor& argmax, const Tensor& input,
                         const Tensor& weight, SymIntArrayRef stride, SymIntArrayRef padding,
                         SymIntArrayRef dilation, SymInt groups, SymIntArrayRef pool,
                         std::array<bool, 3> mask);

// f as the ops are called.
template <class Result,
          Result (*f)(const Args&, const Tensor&, const Tensor&, const optional<Tensor>&)>
Result called(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
              SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups,
              SymIntArrayRef pool) {
  return f({stride, padding, dilation, groups, pool}, input, weight, bias);
}

template <class Result>
Result call(const c10::TypedOperatorHandle<Op<Result>>& op, const Args& args, const Tensor& input,
            const Tensor& weight, const optional<Tensor>& bias) {
  return op.call(input, weight, bias, args.stride, args.padding, args.dilation, args.groups,
                 args.pool_size());
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

Tensor max_pool2d(const Args& args, const Tensor& x) {
  static const auto op =
      find_op<Tensor(const Tensor&, SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, SymIntArrayRef,
                     bool)>("dlkernels::max_pool2d");
  return op.call(x, args.pool_size(), {}, {0}, {1}, /*ceil_mode=*/false);
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
  return max_pool2d(args, conv2d(/*relu=*/true, args, input, weight, bias));
}

bool ours(const Args& args, const Tensor& input, const Tensor& weight,
          const optional<Tensor>& bias) {
  check_device(args.pool.op, input, weight);
  check_device(args.pool.op, input, bias);
  return is_ours(input) && is_ours(weight) && is_ours(bias) && input.sym_numel() != 0 &&
         weight.sym_numel() != 0 && args.pool.fit_argmax();
}

// ---- shapes, and what is computed: one op after the other, on the CPU and on meta -----------

Tensor conv2d_relu_max_pool2d_meta(const Args& args, const Tensor& input, const Tensor& weight,
                                   const optional<Tensor>& bias) {
  return max_pool2d(args, conv2d(/*relu=*/true, args, input, weight, bias));
}

Two conv2d_relu_max_pool2d_forward_meta(const Args& args, const Tensor& input, const Tensor& weight,
                                        const optional<Tensor>& bias) {
  static const auto pool =
      find_op<Two(const Tensor&, IntArrayRef, bool)>("dlkernels::max_pool2d_forward");
  auto [y, argmax] =
      pool.call(conv2d(/*relu=*/true, args, input, weight, bias), args.window(), false);
  argmax.masked_fill_(y.le(0), cpu::kNoElement);
  return {y, argmax};
}

Grads conv2d_relu_max_pool2d_backward_meta(const Tensor& grad_y, const Tensor& argmax,
                                           const Tensor& input, const Tensor& weight,
                                           SymIntArrayRef stride, SymIntArrayRef padding,
                                           SymIntArrayRef dilation, SymInt groups,
                                           SymIntArrayRef pool, std::array<bool, 3> mask) {
  static const auto pool_backward =
      find_op<Tensor(const Tensor&, const Tensor&, SymIntArrayRef, IntArrayRef, bool)>(
          "dlkernels::max_pool2d_backward");
  static const auto conv2d_backward =
      find_op<Grads(const Tensor&, const Tensor&, const Tensor&, const optional<Tensor>&,
                    SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, SymInt, std::array<bool, 3>)>(
          "dlkernels::conv2d_backward");
  const Args args(stride, padding, dilation, groups, pool);
  // 255 is no element, so what ReLU let not pass counts for nothing.
  const Tensor grad = pool_backward.call(grad_y, argmax, plane(args, input, weight), args.window(),
                                         /*ceil_mode=*/false);
  return conv2d_backward.call(grad, input, weight, {}, stride, padding, dilation, groups, mask);
}

// ---- cpu ----------------------------------------------------------------------------------

Tensor conv2d_relu_max_pool2d_cpu(const Args& args, const Tensor& input, const Tensor& weight,
                                  const optional<Tensor>& bias) {
  if (!ours(args, input, weight, bias))
    return conv2d_relu_max_pool2d_torch(args, input, weight, bias);
  Tensor y = conv2d_relu_max_pool2d_meta(args, input, weight, bias);
  stats.kernel_ran();
  return y;
}

Two conv2d_relu_max_pool2d_forward_cpu(const Args& args, const Tensor& input, const Tensor& weight,
                                       const optional<Tensor>& bias) {
  TORCH_CHECK_NOT_IMPLEMENTED(ours(args, input, weight, bias), args.pool.op,
                              "_forward: tensors must be dense float32 and not empty, and windows "
                              "of at most 255 elements, got input ",
                              input.scalar_type(), ", weight ", weight.scalar_type(),
                              " and windows of ", args.window().slice(0, 2));
  Two out = conv2d_relu_max_pool2d_forward_meta(args, input, weight, bias);
  stats.kernel_ran();
  return out;
}

Grads conv2d_relu_max_pool2d_backward_cpu(const Tensor& grad_y, const Tensor& argmax,
                                          const Tensor& input, const Tensor& weight,
                                          SymIntArrayRef stride, SymIntArrayRef padding,
                                          SymIntArrayRef dilation, SymInt groups,
                                          SymIntArrayRef pool, std::array<bool, 3> mask) {
  Grads out = conv2d_relu_max_pool2d_backward_meta(grad_y, argmax, input, weight, stride, padding,
                                                   dilation, groups, pool, mask);
  backward_stats.kernel_ran();
  return out;
}

// ---- gradient -----------------------------------------------------------------------------

struct Conv2dReLUMaxPool2dFunction : torch::autograd::Function<Conv2dReLUMaxPool2dFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                        const optional<Tensor>& bias, const Args& args) {
    static const auto op = find_op<Op<Two>>("dlkernels::conv2d_relu_max_pool2d_forward");
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto [y, argmax] = call(op, args, input, weight, bias);
    ctx->save_for_backward({input, weight, argmax});
    ctx->saved_data["stride"] = args.stride;
    ctx->saved_data["padding"] = args.padding;
    ctx->saved_data["dilation"] = args.dilation;
    ctx->saved_data["groups"] = args.groups;
    ctx->saved_data["pool"] = SymIntArrayRef(args.pool_size());
    ctx->saved_data["bias"] = bias.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find_op<BackwardOp>("dlkernels::conv2d_relu_max_pool2d_backward");
    const auto saved = ctx->get_saved_variables();
    const Tensor &grad_y = grads[0], &input = saved[0], &weight = saved[1], &argmax = saved[2];
    const auto stride = ctx->saved_data["stride"].toSymIntVector();
    const auto padding = ctx->saved_data["padding"].toSymIntVector();
    const auto dilation = ctx->saved_data["dilation"].toSymIntVector();
    const auto pool = ctx->saved_data["pool"].toSymIntVector();
    const Args args(stride, padding, dilation, ctx->saved_data["groups"].toSymInt(), pool);
    // needs_input_grad counts tensors, not arguments: an absent bias has no slot of its own.
    const bool grad_bias = ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(2);
    if (is_differentiated(grad_y))
      return differentiable(args, grad_y, argmax, input, weight, grad_bias);
    auto [gx, gw, gb] =
        op.call(grad_y, argmax, input, weight, stride, padding, dilation, args.groups, pool,
                {ctx->needs_input_grad(0), ctx->needs_input_grad(1), grad_bias});
    return {gx, gw, gb, Tensor()};
  }

  // The gradient of the elements of the convolution that argmax names, as PyTorch's gather.
  static variable_list differentiable(const Args& args, const Tensor& grad_y, const Tensor& argmax,
                                      const Tensor& input, const Tensor& weight, bool grad_bias) {
    static const auto indices_op =
        find_op<Tensor(const Tensor&, SymIntArrayRef, IntArrayRef, bool)>(
            "dlkernels::max_pool2d_indices");
    const Tensor indices =
        indices_op.call(argmax, plane(args, input, weight), args.window(), /*ceil_mode=*/false);
    const Tensor at = indices.clamp_min(0).flatten(-2), g = grad_y.masked_fill(indices.lt(0), 0);
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
  static const auto op = find_op<Op<Tensor>>("dlkernels::conv2d_relu_max_pool2d");
  if (!ours(args, input, weight, bias))
    return conv2d_relu_max_pool2d_torch(args, input, weight, bias);
  const Tensor none, &b = bias ? *bias : none;
  if (any_requires_grad({&input, &weight, &b}))
    return Conv2dReLUMaxPool2dFunction::apply(input, weight, bias, args);
  at::AutoDispatchBelowADInplaceOrView below_autograd;  // then no argmax is kept
  return call(op, args, input, weight, bias);
}

const bool torch_paths =
    (register_torch_path("conv2d_relu_max_pool2d", called<Tensor, conv2d_relu_max_pool2d_torch>),
     true);

}  // namespace

TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("conv2d_relu_max_pool2d", called<Tensor, conv2d_relu_max_pool2d_cpu>);
  m.impl("conv2d_relu_max_pool2d_forward", called<Two, conv2d_relu_max_pool2d_forward_cpu>);
  m.impl("conv2d_relu_max_pool2d_backward", conv2d_relu_max_pool2d_backward_cpu);
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
