// conv2d and conv2d_relu: schema, shapes, CPU, CUDA and gradient. The arithmetic is in
// cpu/conv2d.inl.h and cuda/conv2d.cu.
#include "ops/torch_headers.h"

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/threshold_backward.h>

#include "conv2d.h"
#include "gradient.h"

namespace dlkernels {

// padding is (top, bottom, left, right), so that 'same' with an even window needs no padded copy.
TORCH_LIBRARY_FRAGMENT(dlkernels, m) {
  m.def(
      "conv2d(Tensor input, Tensor weight, Tensor? bias=None, SymInt[2] stride=1, "
      "SymInt[4] padding=0, SymInt[2] dilation=1, SymInt groups=1) -> Tensor");
  m.def(
      "conv2d_relu(Tensor input, Tensor weight, Tensor? bias=None, SymInt[2] stride=1, "
      "SymInt[4] padding=0, SymInt[2] dilation=1, SymInt groups=1) -> Tensor");
  // y is conv2d_relu's output, absent for conv2d. Gradients nobody asked for come back undefined.
  m.def(
      "conv2d_backward(Tensor grad_y, Tensor input, Tensor weight, Tensor? y, SymInt[2] stride, "
      "SymInt[4] padding, SymInt[2] dilation, SymInt groups, bool[3] output_mask) "
      "-> (Tensor, Tensor, Tensor)");
}

// ---- cpu: the passes, shared with conv2d_relu_max_pool2d -----------------------------------

namespace conv {
namespace {

// The algorithm of a pass over N images, from the shape alone: the one with the fewest products for
// a pair of channels, where packing one weight takes the time of some hundred of these. Few
// channels do not make up for the transforms. What was measured is in benchmarks/NOTES.md.
const cpu::Conv2dKernels& choose(int64_t N, const cpu::Conv2d& v) {
  const cpu::Kernels& table = cpu::kernels();
  const auto is_plain_3x3 = [](const cpu::ConvAxis& a) {
    return a.taps == 3 && a.stride == 1 && a.dilation == 1 && a.up == 1;
  };
  const ConvAlgorithm forced = conv_algorithm();
  if (forced == ConvAlgorithm::kDirect) return table.conv2d;
  if (v.groups != 1) {
    const int64_t few = 8 * v.groups;  // above, direct's tiles fill their lanes as well
    return v.x.C <= few && v.K <= few ? table.depthwise : table.conv2d;
  }
  if (!is_plain_3x3(v.h) || !is_plain_3x3(v.w)) return table.conv2d;
  if (forced == ConvAlgorithm::kWinograd2) return table.winograd_2x2;
  if (forced == ConvAlgorithm::kWinograd4) return table.winograd_4x4;
  if (precision_is_ieee || v.x.C < 8 || v.K < 8 || v.x.C * v.K < 256) return table.conv2d;
  const auto products = [&](int64_t tile, double packing) {
    const auto tiles = [&](int64_t out) { return static_cast<double>((out + tile - 1) / tile); };
    const auto points = static_cast<double>((tile + 2) * (tile + 2));
    return static_cast<double>(N) * tiles(v.h.out) * tiles(v.w.out) * points + packing;
  };
  const double direct = products(1, 450), two = products(2, 400), four = products(4, 1600);
  if (four < two && four < direct) return table.winograd_4x4;
  return two < direct ? table.winograd_2x2 : table.conv2d;
}

double flops(const Geometry& g) {
  return 2.0 * static_cast<double>(g.N * g.K) * static_cast<double>(g.OH * g.OW) *
         static_cast<double>(g.c * g.KH * g.KW);
}

// `units` of work, `flops` in all, each on all panels: f(unit, panel, panel_end, scratch).
using Pass = c10::function_ref<void(int64_t, int64_t, int64_t, float*)>;
void parallel_units(int64_t units, int64_t panels, int64_t floats, double flops, Pass f) {
  // Where there are few, several threads share one, each with some of its panels.
  const int64_t parts = std::clamp<int64_t>(2 * at::get_num_threads() / units, 1, panels);
  const auto grain = static_cast<int64_t>(1 + 2e6 / (flops / (units * parts) + 1));
  parallel_chunks(units * parts, grain, [&](int64_t begin, int64_t end) {
    float* const memory = scratch(floats);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i % parts;
      f(i / parts, panels * part / parts, panels * (part + 1) / parts, memory);
    }
  });
}

// Sums over all pixels of all images. The blocks are cut into chunks, each with sums of its own, by
// a rule of the shape alone: same bits always.
void sum_gradients(const Geometry& g, const cpu::Images& grad_y, const Tensor& x,
                   const Tensor& grad_weight, const Tensor& grad_bias) {
  const cpu::Conv2d v = g.forward(x);
  const cpu::Conv2dKernels& kernels = choose(g.N, v);
  const int64_t blocks = g.N * kernels.blocks(v), batch = kernels.batch(v);
  const int64_t batches = (blocks + batch - 1) / batch, panels = kernels.panels(v);
  const int64_t size = grad_weight.defined() ? kernels.sum_floats(v) : 0;
  const int64_t bias_size = grad_bias.defined() ? g.K : 0;
  const int64_t chunks =
      std::clamp<int64_t>((int64_t{1} << 22) / (size + 1), 1, std::min<int64_t>(batches, 8));
  const Tensor sums = at::empty({chunks, size}, at::kFloat);
  const Tensor bias_sums = at::empty({chunks, bias_size}, at::kFloat);
  float* const to = size ? sums.mutable_data_ptr<float>() : nullptr;
  float* const bias_to = bias_size ? bias_sums.mutable_data_ptr<float>() : nullptr;
  parallel_units(chunks, panels, kernels.scratch(v), flops(g),
                 [&](int64_t i, int64_t panel, int64_t panel_end, float* memory) {
                   const int64_t begin = batches * i / chunks * batch;
                   const int64_t end = std::min(batches * (i + 1) / chunks * batch, blocks);
                   kernels.grad_weight(v, grad_y, begin, end, panel, panel_end,
                                       to ? to + i * size : nullptr,
                                       bias_to ? bias_to + i * bias_size : nullptr, memory);
                 });
  // All chunks into the first: each element is read before it is written.
  const auto reduce = [&](float* partial, int64_t n, float* result) {
    parallel_chunks(n, 65536, [&](int64_t begin, int64_t end) {
      cpu::kernels().sum_rows(partial, chunks, n, result, begin, end);
    });
  };
  if (bias_to) {
    const Tensor total = widened_empty(grad_bias);
    reduce(bias_to, bias_size, total.mutable_data_ptr<float>());
    if (!total.is_same(grad_bias)) grad_bias.copy_(total);
  }
  if (to) {
    reduce(to, size, to);
    void* const result = grad_weight.mutable_data_ptr();
    parallel_chunks(panels, 1 + 20000 * panels / size, [&](int64_t begin, int64_t end) {
      kernels.unpack(v, to, g.filter(grad_weight), result, begin, end);
    });
  }
}

}  // namespace

void convolve(const Geometry& g, const cpu::Conv2d& v, const cpu::Filter& filter) {
  const cpu::Conv2dKernels& kernels = choose(g.N, v);
  const int64_t panels = kernels.panels(v), panel_floats = kernels.panel_floats(v);
  const Tensor packed = at::empty({panels * panel_floats}, at::kFloat);
  float* const weights = packed.mutable_data_ptr<float>();
  parallel_chunks(panels, 1 + 20000 / panel_floats, [&](int64_t begin, int64_t end) {
    kernels.pack(v, filter, weights, begin, end);
  });
  const int64_t blocks = g.N * kernels.blocks(v), batch = kernels.batch(v);
  parallel_units((blocks + batch - 1) / batch, panels, kernels.scratch(v), flops(g),
                 [&](int64_t i, int64_t panel, int64_t panel_end, float* memory) {
                   const int64_t end = std::min((i + 1) * batch, blocks);
                   kernels.forward(v, weights, i * batch, end, panel, panel_end, memory);
                 });
}

Grads new_gradients(const Tensor& input, const Tensor& weight, std::array<bool, 3> mask) {
  const auto format = layout(input, weight);
  const auto empty = [&](const Tensor& like) {
    const Tensor x = at::empty_symint(batched(like).sym_sizes(), input.options(), format);
    return like.dim() == 3 ? x.squeeze(0) : x;
  };
  return {mask[0] ? empty(input) : Tensor(), mask[1] ? empty(weight) : Tensor(),
          mask[2] ? at::empty_symint({weight.sym_size(0)}, input.options()) : Tensor()};
}

void gradients(const Geometry& g, const cpu::Images& grad_y, const Tensor& input,
               const Tensor& weight, const Grads& out) {
  const auto& [grad_input, grad_weight, grad_bias] = out;
  if (grad_input.defined()) {
    cpu::Conv2d v = g.backward(grad_y);
    g.set_output(v, huge(grad_input), g.images(grad_input, g.C, g.H, g.W));
    convolve(g, v, g.reversed(weight));
  }
  if (grad_weight.defined() || grad_bias.defined())
    sum_gradients(g, grad_y, batched(input).contiguous(g.format()), grad_weight, grad_bias);
}

}  // namespace conv

namespace {

using namespace conv;

OpStats conv2d_stats("conv2d"), conv2d_relu_stats("conv2d_relu"),
    conv2d_backward_stats("conv2d_backward");

template <bool kRelu>
constexpr const char* kName = kRelu ? "conv2d_relu" : "conv2d";

using Conv2d = Tensor(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
                      SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                      SymInt groups);
using Conv2dBackward = Grads(const Tensor& grad_y, const Tensor& input, const Tensor& weight,
                             const optional<Tensor>& y, SymIntArrayRef stride,
                             SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups,
                             std::array<bool, 3> mask);

// PyTorch's own, for what is not ours.
Tensor by_torch(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
                SymIntArrayRef stride, SymIntArrayRef p, SymIntArrayRef dilation, SymInt groups) {
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

template <bool kRelu>
Tensor conv2d_torch(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
                    SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                    SymInt groups) {
  (kRelu ? conv2d_relu_stats : conv2d_stats).torch_ran();
  const Tensor y = by_torch(input, weight, bias, stride, padding, dilation, groups);
  return kRelu ? at::relu(y) : y;
}

// Not empty: what PyTorch makes of empty channels is PyTorch's.
template <bool kRelu>
bool ours(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
          SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation) {
  check_device(kName<kRelu>, input, weight);
  check_device(kName<kRelu>, input, bias);
  return are_for_products(input, weight, bias) && input.sym_numel() != 0 &&
         weight.sym_numel() != 0 && fits_cuda(input, weight, stride, padding, dilation);
}

// ---- shapes: shared by every device and by torch.compile, hence SymInt --------------------

template <bool kRelu>
Tensor conv2d_meta(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
                   SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                   SymInt groups) {
  check_device(kName<kRelu>, input, weight), check_device(kName<kRelu>, input, bias);
  const auto sizes = output_sizes(input, weight, stride, padding, dilation, groups);
  check_bias(kName<kRelu>, weight, bias);
  const Tensor y = at::empty_symint(sizes, input.options(), layout(input, weight));
  return input.dim() == 3 ? y.squeeze(0) : y;
}

Grads conv2d_backward_meta(const Tensor& grad_y, const Tensor& input, const Tensor& weight,
                           const optional<Tensor>& y, SymIntArrayRef stride, SymIntArrayRef padding,
                           SymIntArrayRef dilation, SymInt groups, std::array<bool, 3> mask) {
  check_device("conv2d_backward", input, grad_y);
  check_device("conv2d_backward", input, weight);
  check_device("conv2d_backward", input, y);
  const auto all = output_sizes(input, weight, stride, padding, dilation, groups);
  const auto sizes = SymIntArrayRef(all).slice(input.dim() == 3);
  TORCH_CHECK(grad_y.sym_sizes() == sizes && (!y || y->sym_sizes() == sizes),
              "conv2d_backward: grad_y and y must be ", sizes, ", got grad_y ", grad_y.sym_sizes(),
              y ? " and y " : "", y ? y->sym_sizes() : SymIntArrayRef());
  TORCH_CHECK_NOT_IMPLEMENTED(are_for_products(grad_y, input, weight, y) &&
                                  input.sym_numel() != 0 && weight.sym_numel() != 0,
                              "conv2d_backward: tensors must be dense ", kProductDTypes,
                              " and not empty, got grad_y ", grad_y.scalar_type(), ", input ",
                              input.scalar_type(), ", weight ", weight.scalar_type());
  TORCH_CHECK(fits_cuda(input, weight, stride, padding, dilation),
              "conv2d_backward: tensors must be smaller, got input ", input.sym_sizes(),
              " and weight ", weight.sym_sizes());
  return new_gradients(input, weight, mask);
}

// ---- cpu ----------------------------------------------------------------------------------

template <bool kRelu>
Tensor conv2d_cpu(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
                  SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                  SymInt groups) {
  if (!ours<kRelu>(input, weight, bias, stride, padding, dilation))
    return conv2d_torch<kRelu>(input, weight, bias, stride, padding, dilation, groups);
  Tensor y = huge(conv2d_meta<kRelu>(input, weight, bias, stride, padding, dilation, groups));
  (kRelu ? conv2d_relu_stats : conv2d_stats).kernel_ran();
  const Geometry g = Geometry(input, weight, stride, padding, dilation, groups).in_a_row();
  const Tensor x = batched(input).contiguous(g.format());
  const Tensor b = bias ? widened(*bias) : Tensor();
  cpu::Conv2d v = g.forward(x);
  g.set_output(v, y, g.images(y, g.K, g.OH, g.OW));
  v.bias = bias ? b.const_data_ptr<float>() : nullptr, v.relu = kRelu;
  convolve(g, v, g.filter(weight));
  return y;
}

Grads conv2d_backward_cpu(const Tensor& grad_y, const Tensor& input, const Tensor& weight,
                          const optional<Tensor>& y, SymIntArrayRef stride, SymIntArrayRef padding,
                          SymIntArrayRef dilation, SymInt groups, std::array<bool, 3> mask) {
  const Grads grads =
      conv2d_backward_meta(grad_y, input, weight, y, stride, padding, dilation, groups, mask);
  conv2d_backward_stats.kernel_ran();
  const Geometry g = Geometry(input, weight, stride, padding, dilation, groups).in_a_row();
  const Tensor gy = batched(grad_y).contiguous(g.format());
  const Tensor yc = y ? batched(*y).contiguous(g.format()) : Tensor();
  const void* const relu_y = y ? yc.const_data_ptr() : nullptr;
  const cpu::Images images = g.images(gy, g.K, g.OH, g.OW, relu_y);
  gradients(g, images, input, weight, grads);
  return grads;
}

// ---- cuda ---------------------------------------------------------------------------------

template <bool kRelu>
Tensor conv2d_cuda(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
                   SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                   SymInt groups) {
  if (!ours<kRelu>(input, weight, bias, stride, padding, dilation))
    return conv2d_torch<kRelu>(input, weight, bias, stride, padding, dilation, groups);
  const Tensor y = conv2d_meta<kRelu>(input, weight, bias, stride, padding, dilation, groups);
  (kRelu ? conv2d_relu_stats : conv2d_stats).kernel_ran();
  const Geometry g = Geometry(input, weight, stride, padding, dilation, groups).in_a_row();
  forward_cuda(kName<kRelu>, g, input, weight, bias, g.channels_last, kRelu, y, {});
  return y;
}

Grads conv2d_backward_cuda(const Tensor& grad_y, const Tensor& input, const Tensor& weight,
                           const optional<Tensor>& y, SymIntArrayRef stride, SymIntArrayRef padding,
                           SymIntArrayRef dilation, SymInt groups, std::array<bool, 3> mask) {
  const Grads grads =
      conv2d_backward_meta(grad_y, input, weight, y, stride, padding, dilation, groups, mask);
  conv2d_backward_stats.kernel_ran();
  const Geometry g = Geometry(input, weight, stride, padding, dilation, groups).in_a_row();
  gradients_cuda("conv2d_backward", g, grad_y, y.value_or(Tensor()), Tensor(), input, weight,
                 grads);
  return grads;
}

// ---- gradient -----------------------------------------------------------------------------

template <bool kRelu>
const BelowAutograd<Conv2d>& conv2d_op() {
  static const BelowAutograd<Conv2d> op(kRelu ? "dlkernels::conv2d_relu" : "dlkernels::conv2d");
  return op;
}

template <bool kRelu>
struct Conv2dFunction : Function<Conv2dFunction<kRelu>> {
  static constexpr const char* kNode = kRelu ? "Conv2dReLUBackward" : "Conv2dBackward";

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                        const optional<Tensor>& bias, SymIntArrayRef stride, SymIntArrayRef padding,
                        SymIntArrayRef dilation, SymInt groups) {
    const Tensor y = conv2d_op<kRelu>()(input, weight, bias, stride, padding, dilation, groups);
    ctx->save_for_backward({input, weight, kRelu ? y : Tensor()});
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["dilation"] = dilation;
    ctx->saved_data["groups"] = groups;
    ctx->saved_data["bias"] = bias.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const BelowAutograd<Conv2dBackward> op("dlkernels::conv2d_backward");
    const auto saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &weight = saved[1], &y = saved[2];
    const auto stride = ctx->saved_data["stride"].toSymIntVector();
    const auto padding = ctx->saved_data["padding"].toSymIntVector();
    const auto dilation = ctx->saved_data["dilation"].toSymIntVector();
    const auto groups = ctx->saved_data["groups"].toSymInt();
    // needs_input_grad counts tensors, not arguments: an absent bias has no slot of its own.
    const bool grad_bias = ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(2);
    if (is_differentiated(grads[0], conv2d_backward_stats)) {
      const Tensor g = kRelu ? at::threshold_backward(grads[0], y, 0) : grads[0];
      auto out = differentiable_backward(
          [&](const variable_list& in) {
            return by_torch(in[0], in[1], {}, stride, padding, dilation, groups);
          },
          {input, weight}, g);
      out.resize(7);
      if (grad_bias) out[2] = batched(g).sum({0, 2, 3});
      return out;
    }
    auto [gx, gw, gb] =
        op(grads[0], input, weight, kRelu ? optional<Tensor>(y) : std::nullopt, stride, padding,
           dilation, groups, {ctx->needs_input_grad(0), ctx->needs_input_grad(1), grad_bias});
    return {gx, gw, gb, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

template <bool kRelu>
Tensor conv2d_autograd(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
                       SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                       SymInt groups) {
  if (!ours<kRelu>(input, weight, bias, stride, padding, dilation))
    return conv2d_torch<kRelu>(input, weight, bias, stride, padding, dilation, groups);
  if (any_requires_grad(input, weight, bias))
    return Conv2dFunction<kRelu>::apply(input, weight, bias, stride, padding, dilation, groups);
  return conv2d_op<kRelu>()(input, weight, bias, stride, padding, dilation, groups);
}

const bool torch_paths =
    (register_torch_path("conv2d", conv2d_torch<false>, /*on_autocast_cpu=*/false),
     register_torch_path("conv2d_relu", conv2d_torch<true>, /*on_autocast_cpu=*/false), true);

}  // namespace

TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("conv2d", conv2d_cpu<false>);
  m.impl("conv2d_relu", conv2d_cpu<true>);
  m.impl("conv2d_backward", conv2d_backward_cpu);
}
TORCH_LIBRARY_IMPL(dlkernels, CUDA, m) {
  m.impl("conv2d", conv2d_cuda<false>);
  m.impl("conv2d_relu", conv2d_cuda<true>);
  m.impl("conv2d_backward", conv2d_backward_cuda);
}
TORCH_LIBRARY_IMPL(dlkernels, AutocastCPU, m) {
  register_autocast_cpu(m, "conv2d");
  register_autocast_cpu(m, "conv2d_relu");
}
TORCH_LIBRARY_IMPL(dlkernels, AutocastCUDA, m) {
  register_autocast_cuda<true>(m, "conv2d");
  register_autocast_cuda<true>(m, "conv2d_relu");
}
TORCH_LIBRARY_IMPL(dlkernels, Meta, m) {
  m.impl("conv2d", conv2d_meta<false>);
  m.impl("conv2d_relu", conv2d_meta<true>);
  m.impl("conv2d_backward", conv2d_backward_meta);
}
TORCH_LIBRARY_IMPL(dlkernels, Autograd, m) {
  m.impl("conv2d", conv2d_autograd<false>);
  m.impl("conv2d_relu", conv2d_autograd<true>);
}

}  // namespace dlkernels
