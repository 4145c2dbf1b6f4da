// A convolution in plain numbers, and its passes on the CPU and on CUDA.
#pragma once
#include "ops/conv2d/arguments.h"

namespace dlkernels::conv {

// A checked call in plain numbers, and the passes that it is made of.
struct Geometry {
  int64_t N, C, H, W, K, KH, KW, OH, OW, groups, c, k;  // c, k: channels a group
  std::array<int64_t, 2> stride, padding, dilation;     // padding: top and left
  bool channels_last;

  Geometry(const Tensor& input, const Tensor& weight, const Options& options) {
    const auto sizes = output_sizes(input, weight, options);
    const auto& [s, p, d, g] = options;
    // An expanded weight may have any size. So the kernels' sizes, some 2^15 times this, fit.
    TORCH_CHECK(weight.numel() <= int64_t{1} << 40,
                "conv2d: weight must have at most 2**40 elements, got ", weight.sizes());
    const auto number = [](const SymInt& x) { return x.expect_int(); };
    N = number(sizes[0]), OH = number(sizes[2]), OW = number(sizes[3]);
    C = input.size(-3), H = input.size(-2), W = input.size(-1);
    K = weight.size(0), KH = weight.size(2), KW = weight.size(3);
    groups = number(g), c = C / groups, k = K / groups;
    stride = {number(s[0]), number(s.back())}, dilation = {number(d[0]), number(d.back())};
    padding = {number(p[0]), number(p[2])};
    channels_last = layout(input, weight) == at::MemoryFormat::ChannelsLast;
  }

  // ImageView as one long row each, where the convolution has no more of a plane than that.
  Geometry in_a_row() const {
    Geometry row = *this;
    if (KH == 1 && KW == 1 && stride[0] == 1 && stride[1] == 1 && OH == H && OW == W)
      row.OW = row.W = H * W, row.OH = row.H = 1;
    return row;
  }

  at::MemoryFormat format() const {
    return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  }

  // A dense (N, channels, H, W) tensor in either layout.
  static cpu::ImageView images(const Tensor& t, int64_t channels, int64_t h, int64_t w,
                               const void* relu_y = nullptr) {
    cpu::ImageView x = {t.const_data_ptr(), channels, h, w, channels * h * w, h * w, w, 1};
    if (!t.is_contiguous()) x.sc = 1, x.sh = w * channels, x.sw = channels;
    x.dtype = dtype_of(t), x.on_load.relu_y = relu_y;
    return x;
  }

  // y = conv2d(x)
  cpu::Conv2d forward(const Tensor& x) const {
    return {.x = images(x, C, H, W),
            .h = {H, OH, KH, stride[0], padding[0], dilation[0]},
            .w = {W, OW, KW, stride[1], padding[1], dilation[1]},
            .groups = groups,
            .K = K};
  }
  // grad_input from grad_y: the taps in reverse, `stride` outputs of this pass to one of its
  // inputs.
  cpu::Conv2d backward(const cpu::ImageView& grad_y) const {
    const auto axis = [&](int i, int64_t in, int64_t out, int64_t taps) {
      const int64_t pad = dilation[i] * (taps - 1) - padding[i];
      return ConvAxis{in, out, taps, 1, pad, dilation[i], stride[i]};
    };
    return {
        .x = grad_y, .h = axis(0, OH, H, KH), .w = axis(1, OW, W, KW), .groups = groups, .K = C};
  }
  // Where a pass writes, in the layout of `as`.
  static void set_output(cpu::Conv2d& conv, const Tensor& y, const cpu::ImageView& as) {
    conv.y = y.mutable_data_ptr(), conv.yn = as.sn, conv.yc = as.sc, conv.yh = as.sh,
    conv.yw = as.sw;
  }
  // The weights (K, c, KH, KW) as either reads them.
  cpu::WeightView filter(const Tensor& w) const {
    const auto s = w.strides();
    return {w.const_data_ptr(), k * s[0], s[0], s[1], s[2], s[3]};
  }
  cpu::WeightView reversed(const Tensor& w) const {
    const auto s = w.strides();
    const int64_t from = ((KH - 1) * s[2] + (KW - 1) * s[3]) * w.element_size();
    const void* const last = static_cast<const char*>(w.const_data_ptr()) + from;
    return {last, k * s[0], s[1], s[0], -s[2], -s[3]};
  }
};

// A pass v of g, forward or grad_input, with the weights that it reads.
void convolve(const Geometry& g, const cpu::Conv2d& conv, const cpu::WeightView& filter);

// Fills the gradients that are defined.
void gradients(const Geometry& g, const cpu::ImageView& grad_y, const Tensor& input,
               const Tensor& weight, const Grads& out);

// The same on CUDA: y, or y and argmax of the max-pool, in the layout that is given; and the
// gradients, where relu_y and argmax may be undefined.
void forward_cuda(const char* op, const Geometry& g, const Tensor& input, const Tensor& weight,
                  const optional<Tensor>& bias, bool channels_last, bool relu, const Tensor& y,
                  const optional<Tensor>& argmax);
void gradients_cuda(const char* op, const Geometry& g, const Tensor& grad_y, const Tensor& relu_y,
                    const Tensor& argmax, const Tensor& input, const Tensor& weight,
                    const Grads& out);

}  // namespace dlkernels::conv
