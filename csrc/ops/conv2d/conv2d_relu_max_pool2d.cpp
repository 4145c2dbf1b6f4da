// conv2d_relu_max_pool2d: y = max_pool2d(relu(conv2d(input, weight, bias)), 2), where what is
// pooled exists in cache alone. The passes are in conv2d_cpu.cpp and conv2d_cuda.cpp.
#include "ops/core/torch_headers.h"

#include "ops/conv2d/geometry.h"
#include "ops/core/op.h"
#include "ops/max_pool2d.h"

namespace dlkernels {
namespace {

using namespace conv;

constexpr const char* kOp = "conv2d_relu_max_pool2d";
OpStats stats(kOp);

const pool::Window& window() {
  static const pool::Window window(kOp, {2}, {}, {0}, {1}, /*ceil_mode=*/false);
  return window;
}

// (OH, OW) of the convolution
c10::SymDimVector plane(const Tensor& input, const Tensor& weight, const Options& options) {
  const auto sizes = output_sizes(input, weight, options);
  return {sizes[2], sizes[3]};
}

// ---- the gradient -------------------------------------------------------------------------

// Gradients that output_mask excludes are undefined.
struct PooledConv2dBackward
    : Op<PooledConv2dBackward,
         Grads(const Tensor&, const Tensor&, const Tensor&, const Tensor&, SymIntArrayRef,
               SymIntArrayRef, SymIntArrayRef, SymInt, std::array<bool, 3>)> {
  static constexpr const char* kName = "conv2d_relu_max_pool2d_backward";
  static constexpr const char* kSchema =
      "(Tensor grad_y, Tensor argmax, Tensor input, Tensor weight, SymInt[2] stride, "
      "SymInt[4] padding, SymInt[2] dilation, SymInt groups, bool[3] output_mask) "
      "-> (Tensor, Tensor, Tensor)";
  inline static OpStats stats{kName};

  struct Args {
    const Tensor &grad_y, &argmax, &input, &weight;
    Options options;
    std::array<bool, 3> output_mask;
  };

  static Grads meta(const Args& a) {
    const auto& [grad_y, argmax, input, weight, options, mask] = a;
    for (const Tensor& t : {argmax, input, weight}) check_device(kName, grad_y, t);
    pool::check_argmax(window(), argmax, plane(input, weight, options));
    TORCH_CHECK(grad_y.sym_sizes() == argmax.sym_sizes() && argmax.dim() == input.dim() &&
                    argmax.sym_size(-3) == weight.sym_size(0) &&
                    batched(argmax).sym_size(0) == batched(input).sym_size(0),
                kName, ": grad_y and argmax must be of the output's size, got grad_y ",
                grad_y.sym_sizes(), " and argmax ", argmax.sym_sizes());
    for (const Tensor& t : {grad_y, input, weight})
      TORCH_CHECK_NOT_IMPLEMENTED(has_gemm_kernel(grad_y, t) && t.sym_numel() != 0, kName,
                                  ": tensors must be dense ", kGemmDTypes, " and not empty, got ",
                                  t.scalar_type(), " of ", t.sym_sizes());
    TORCH_CHECK(fits_cuda(input, weight, options), kName, ": tensors must be smaller, got input ",
                input.sym_sizes(), " and weight ", weight.sym_sizes());
    return new_gradients(input, weight, mask);
  }

  static void cpu(const Grads& grads, const Args& a) {
    const Geometry g(a.input, a.weight, a.options);
    const Tensor gy = batched(a.grad_y).contiguous(g.format());
    const Tensor elements = batched(a.argmax).contiguous(at::MemoryFormat::ChannelsLast);
    cpu::ImageView images = g.images(gy, g.K, g.OH / 2, g.OW / 2);
    images.H = g.OH, images.W = g.OW, images.on_load.argmax = elements.const_data_ptr<uint8_t>();
    gradients(g, images, a.input, a.weight, grads);
  }

  static void cuda(const Grads& grads, const Args& a) {
    const Geometry g(a.input, a.weight, a.options);
    gradients_cuda(kOp, g, a.grad_y, Tensor(), a.argmax, a.input, a.weight, grads);
  }
};

// ---- forward ------------------------------------------------------------------------------

// y ([N,] K, PH, PW), laid out as PyTorch's. argmax, of the same shape and channels last, is all
// that the gradient needs to know of what was pooled: a byte, 2 * row + column of the maximum in
// its window, or 255 where that is <= 0 and ReLU lets no gradient pass.
struct PooledConv2dForward : Op<PooledConv2dForward, Signature<TensorPair>> {
  static constexpr const char* kName = "conv2d_relu_max_pool2d_forward";
  static constexpr const char* kSchema =
      "(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[4] padding, "
      "SymInt[2] dilation, SymInt groups) -> (Tensor y, Tensor argmax)";
  static constexpr OpStats& stats = dlkernels::stats;
  using Args = conv::Args;

  static TensorPair new_outputs(const Args& a) {
    const auto& [input, weight, bias, options] = a;
    check_device(kOp, input, weight), check_device(kOp, input, bias);
    check_bias(kOp, weight, bias);
    auto sizes = output_sizes(input, weight, options);
    for (const int i : {0, 1}) sizes[2 + i] = pool::output_size(window(), i, sizes[2 + i]);
    const auto format = input.dim() == 3 ? at::MemoryFormat::Contiguous : layout(input, weight);
    const Tensor y = at::empty_symint(sizes, input.options(), format);
    const Tensor argmax =
        at::empty_symint(sizes, input.options().dtype(at::kByte), at::MemoryFormat::ChannelsLast);
    return input.dim() == 3 ? TensorPair(y.squeeze(0), argmax.squeeze(0)) : TensorPair(y, argmax);
  }

  static TensorPair meta(const Args& a) {
    TORCH_CHECK_NOT_IMPLEMENTED(conv::has_kernel(kOp, a), kName, ": tensors must be dense ",
                                kGemmDTypes, " and not empty, got input ", a.input.scalar_type(),
                                ", weight ", a.weight.scalar_type());
    return new_outputs(a);
  }

  static void cpu(const TensorPair& out, const Args& a) {
    const auto& [y, argmax] = out;
    const Geometry g(a.input, a.weight, a.options);
    const Tensor x = batched(a.input).contiguous(g.format());
    const Tensor bias = a.bias ? to_float32(*a.bias) : Tensor();
    cpu::Conv2d conv = g.forward(x);
    conv.h.out = g.OH / 2 * 2, conv.w.out = g.OW / 2 * 2;  // outputs in no window are not computed
    g.set_output(conv, y, g.images(y, g.K, g.OH / 2, g.OW / 2));
    conv.on_store.bias = a.bias ? bias.const_data_ptr<float>() : nullptr, conv.on_store.relu = true;
    conv.on_store.argmax = argmax.mutable_data_ptr<uint8_t>();
    convolve(g, conv, g.filter(a.weight));
  }

  static void cuda(const TensorPair& out, const Args& a) {
    const auto& [y, argmax] = out;
    const Geometry g(a.input, a.weight, a.options);
    const bool channels_last = g.channels_last && a.input.dim() == 4;  // as y is
    forward_cuda(kOp, g, a.input, a.weight, a.bias, channels_last, /*relu=*/true, y, argmax);
  }
};

struct PooledConv2d : Op<PooledConv2d, Signature<Tensor>> {
  using Backward = PooledConv2dBackward;
  static constexpr const char *kName = kOp, *kNode = "Conv2dReLUMaxPool2dBackward";
  static constexpr const char* kSchema =
      "(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[4] padding, "
      "SymInt[2] dilation, SymInt groups) -> Tensor";
  static constexpr Autocast kAutocast = Autocast::kLower;
  static constexpr bool kIsGemm = true;
  static constexpr OpStats& stats = dlkernels::stats;
  using Args = conv::Args;

  static bool has_kernel(const Args& a) { return conv::has_kernel(kName, a); }

  // Our ops, of which each decides for itself: at least the convolution is PyTorch's.
  static Tensor aten(const Args& a) {
    static const auto conv2d_relu = find_op<Signature<Tensor>>("conv2d_relu");
    static const auto max_pool2d =
        find_op<Tensor(const Tensor&, SymIntArrayRef, SymIntArrayRef, SymIntArrayRef,
                       SymIntArrayRef, bool)>("max_pool2d");
    static const std::array<SymInt, 1> size = {2}, none = {0}, one = {1};
    const Tensor y = a.apply([](auto&&... args) { return conv2d_relu.call(args...); });
    return max_pool2d.call(y, size, {}, none, one, /*ceil_mode=*/false);
  }

  static Tensor meta(const Args& a) { return std::get<0>(PooledConv2dForward::new_outputs(a)); }
  static Tensor cpu(const Args& a) {
    return std::get<0>(PooledConv2dForward::compute<Device::kCPU>(a));
  }
  static Tensor cuda(const Args& a) {
    return std::get<0>(PooledConv2dForward::compute<Device::kCUDA>(a));
  }

  // ---- gradient ---------------------------------------------------------------------------

  static Tensor forward(AutogradContext* ctx, const Args& a) {
    const auto [y, argmax] = a.apply(PooledConv2dForward::call_below_autograd);
    ctx->save_for_backward({a.input, a.weight, argmax});
    SavedOptions::save(ctx, a.options);
    ctx->saved_data["bias"] = a.bias.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const Tensor& grad_y) {
    const auto saved = ctx->get_saved_variables();
    const SavedOptions saved_options(ctx);
    const auto& [stride, padding, dilation, groups] = saved_options.get();
    auto [gx, gw, gb] = PooledConv2dBackward::call_below_autograd(
        grad_y, saved[2], saved[0], saved[1], stride, padding, dilation, groups, output_mask(ctx));
    return {gx, gw, gb};
  }

  // The gradient of the elements of the convolution that argmax names, as PyTorch's gather. Which
  // ones depends on all inputs, with derivatives of 0.
  static variable_list double_backward(AutogradContext* ctx, const Tensor& grad_y) {
    static const auto conv2d = find_op<Signature<Tensor>>("conv2d");
    static const auto max_pool2d_indices =
        find_op<Tensor(const Tensor&, SymIntArrayRef, at::IntArrayRef, bool)>("max_pool2d_indices");
    const auto saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &weight = saved[1], &argmax = saved[2];
    const SavedOptions saved_options(ctx);
    const Options options = saved_options.get();
    const Tensor indices = [&] {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      return max_pool2d_indices.call(argmax, plane(input, weight, options), window().sizes,
                                     /*ceil_mode=*/false);
    }();
    const Tensor at = indices.clamp_min(0).flatten(-2);
    Tensor g = grad_y.masked_fill(indices.lt(0), 0) + zero_of(input) + zero_of(weight);
    if (ctx->saved_data["bias"].toBool())
      g = g + zero_of(stand_in_for_input(2, at::empty_symint({weight.sym_size(0)}, g.options())));
    variable_list out = differentiable_backward(
        [&](const variable_list& in) {
          const Tensor y = conv2d.call(in[0], in[1], std::nullopt, options.stride, options.padding,
                                       options.dilation, options.groups);
          return y.flatten(-2).gather(-1, at).view_as(g);
        },
        {input, weight}, g);
    if (output_mask(ctx)[2]) out.push_back(batched(g).sum({0, 2, 3}));
    return out;
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(dlkernels, m) {
  register_ops<PooledConv2d, PooledConv2dForward, PooledConv2dBackward>(m);
}

}  // namespace dlkernels
