// The arguments of conv2d, the shapes and the index tables that follow from them, for conv2d.cpp.
#pragma once
#include "common.h"

namespace dlkernels::conv {

using c10::SymInt;
using c10::SymIntArrayRef;

// An argument in two dimensions, its least value, and PyTorch's text for what is less.
struct PairArgument {
  const char* name;
  int64_t least;
  const char* rule;
};
constexpr PairArgument kStride = {"stride", 1, "non-positive stride is not supported"};
constexpr PairArgument kPadding = {"padding", 0, "negative padding is not supported"};
constexpr PairArgument kDilation = {"dilation", 1, "dilation should be greater than zero"};

// (h, w), or one number for both.
inline std::array<SymInt, 2> pair(const PairArgument& a, SymIntArrayRef values) {
  TORCH_CHECK(values.size() == 1 || values.size() == 2, "conv2d: ", a.name,
              " must be one or two numbers, got ", values);
  for (const SymInt& v : values) {  // small enough that no product of two overflows
    TORCH_CHECK(v >= a.least, "conv2d: ", a.rule, ", got ", values);
    TORCH_CHECK(v <= INT32_MAX, "conv2d: ", a.name, " must be below 2**31, got ", values);
  }
  return {values[0], values.back()};
}

inline Tensor batched(const Tensor& input) { return input.dim() == 3 ? input.unsqueeze(0) : input; }

// As PyTorch: channels_last where the input or the weight is.
inline at::MemoryFormat layout(const Tensor& input, const Tensor& weight) {
  const auto last = at::MemoryFormat::ChannelsLast;
  return batched(input).suggest_memory_format() == last || weight.suggest_memory_format() == last
             ? last
             : at::MemoryFormat::Contiguous;
}

// input (N, C, H, W) or (C, H, W), weight (K, C / groups, KH, KW) -> sizes of (N, K, OH, OW)
inline std::array<SymInt, 4> output_sizes(const Tensor& input, const Tensor& weight,
                                          SymIntArrayRef stride, SymIntArrayRef padding,
                                          SymIntArrayRef dilation, const SymInt& groups) {
  TORCH_CHECK(input.dim() == 3 || input.dim() == 4,
              "conv2d: input must be (N, C, H, W) or (C, H, W), got ", input.sym_sizes());
  TORCH_CHECK(weight.dim() == 4, "conv2d: weight must be (K, C / groups, KH, KW), got ",
              weight.sym_sizes());
  const auto s = pair(kStride, stride), d = pair(kDilation, dilation);
  TORCH_CHECK(padding.size() == 4, "conv2d: padding must be (top, bottom, left, right), got ",
              padding);
  const auto top = pair(kPadding, padding.slice(0, 2));
  const auto left = pair(kPadding, padding.slice(2, 2));
  TORCH_CHECK(groups > 0 && groups <= INT32_MAX, "conv2d: groups must be positive, got ", groups);
  const SymInt K = weight.sym_size(0), C = weight.sym_size(1) * groups;
  TORCH_CHECK(K % groups == 0, "conv2d: weight.shape[0] must be a multiple of groups = ", groups,
              ", got weight ", weight.sym_sizes());
  TORCH_CHECK(input.sym_size(-3) == C, "conv2d: input must have ", C,
              " channels (groups = ", groups, ", weight is ", weight.sym_sizes(), "), got input ",
              input.sym_sizes());
  std::array<SymInt, 4> sizes = {input.dim() == 4 ? input.sym_size(0) : SymInt(1), K, 0, 0};
  for (int i = 0; i < 2; ++i) {
    const SymInt kernel = weight.sym_size(2 + i), size = input.sym_size(i - 2);
    TORCH_CHECK(kernel <= INT32_MAX, "conv2d: weight must be smaller, got ", weight.sym_sizes());
    const SymInt padded = size + (i ? left : top)[0] + (i ? left : top)[1];
    const SymInt window = d[i] * (kernel - 1) + 1;
    TORCH_CHECK(window <= padded, "conv2d: the dilated kernel must not be larger than the padded ",
                "input, got kernel size ", window, " and input size ", padded, " in dimension ",
                i - 2);
    sizes[2 + i] = (padded - window) / s[i] + 1;
  }
  return sizes;
}

// Whether the CUDA kernels can count it in 32 bits (what is larger is PyTorch's). True on other
// devices, and for arguments that output_sizes refuses.
inline bool fits_cuda(const Tensor& input, const Tensor& weight, SymIntArrayRef stride,
                      SymIntArrayRef padding, SymIntArrayRef dilation) {
  if (!input.is_cuda() || input.dim() < 3 || weight.dim() != 4 || padding.size() != 4) return true;
  constexpr int64_t kMost = int64_t{1} << 30, kMostOfAxis = kMost / 4;
  bool fits = true;
  for (const SymIntArrayRef& numbers : {stride, padding, dilation})
    for (const SymInt& v : numbers) {
      if (v < 0 || v > INT32_MAX) return true;
      fits = fits && v < kMostOfAxis;
    }
  const SymInt H = input.sym_size(-2) + padding[0] + padding[1];
  const SymInt W = input.sym_size(-1) + padding[2] + padding[3];
  const SymInt K = weight.sym_size(0), c = (weight.sym_size(1) + 7) / 8 * 8;
  return fits && H < kMostOfAxis && W < kMostOfAxis && H * W < kMost && K < 1 << 18 &&
         input.sym_size(-3) < 1 << 18 && weight.sym_size(2) < kMost && weight.sym_size(3) < kMost &&
         weight.sym_size(2) * weight.sym_size(3) < kMost / (K + 1) / (c + 1);
}

inline void check_bias(const char* op, const Tensor& weight, const optional<Tensor>& bias) {
  const SymInt K = weight.sym_size(0);
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->sym_size(0) == K), op, ": bias must be (", K,
              ") (weight is ", weight.sym_sizes(), "), got bias ", bias->sym_sizes());
}

// A checked call in plain numbers, and the passes that it is made of.
struct Geometry {
  int64_t N, C, H, W, K, KH, KW, OH, OW, groups, c, k;  // c, k: channels a group
  std::array<int64_t, 2> stride, padding, dilation;     // padding: top and left
  bool channels_last;

  Geometry(const Tensor& input, const Tensor& weight, SymIntArrayRef s, SymIntArrayRef p,
           SymIntArrayRef d, const SymInt& g) {
    const auto sizes = output_sizes(input, weight, s, p, d, g);
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

  // Images as one long row each, where the convolution has no more of a plane than that.
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
  static cpu::Images images(const Tensor& t, int64_t channels, int64_t h, int64_t w,
                            const void* relu_y = nullptr) {
    cpu::Images x = {t.const_data_ptr(), relu_y, channels, h, w, channels * h * w, h * w, w, 1};
    if (!t.is_contiguous()) x.sc = 1, x.sh = w * channels, x.sw = channels;
    x.dtype = dtype_of(t);
    return x;
  }

  // y = conv2d(x)
  cpu::Conv2d forward(const Tensor& x) const {
    return {.x = images(x, C, H, W),
            .h = {OH, KH, stride[0], padding[0], dilation[0]},
            .w = {OW, KW, stride[1], padding[1], dilation[1]},
            .groups = groups,
            .K = K};
  }
  // grad_input from grad_y: the taps in reverse, `stride` outputs of this pass to one of its
  // inputs.
  cpu::Conv2d backward(const cpu::Images& grad_y) const {
    const auto axis = [&](int i, int64_t size, int64_t taps) {
      const int64_t pad = dilation[i] * (taps - 1) - padding[i];
      return cpu::ConvAxis{size, taps, 1, pad, dilation[i], stride[i]};
    };
    return {.x = grad_y, .h = axis(0, H, KH), .w = axis(1, W, KW), .groups = groups, .K = C};
  }
  // Where a pass writes: `as` says how that lies.
  static void set_output(cpu::Conv2d& v, const Tensor& y, const cpu::Images& as) {
    v.y = y.mutable_data_ptr(), v.yn = as.sn, v.yc = as.sc, v.yh = as.sh, v.yw = as.sw;
  }
  // The weights (K, c, KH, KW) as either reads them.
  cpu::Filter filter(const Tensor& w) const {
    const auto s = w.strides();
    return {w.const_data_ptr(), k * s[0], s[0], s[1], s[2], s[3]};
  }
  cpu::Filter reversed(const Tensor& w) const {
    const auto s = w.strides();
    const int64_t from = ((KH - 1) * s[2] + (KW - 1) * s[3]) * w.element_size();
    const void* const last = static_cast<const char*>(w.const_data_ptr()) + from;
    return {last, k * s[0], s[1], s[0], -s[2], -s[3]};
  }
};

// A pass v of g, forward or grad_input, with the weights that it reads.
void convolve(const Geometry& g, const cpu::Conv2d& v, const cpu::Filter& filter);

using Grads = std::tuple<Tensor, Tensor, Tensor>;

// New tensors for the gradients of input, weight and bias, as far as the mask wants them.
Grads new_gradients(const Tensor& input, const Tensor& weight, std::array<bool, 3> mask);

// The same on CUDA: y, or y and argmax of the max-pool, in the layout that is given; and the
// gradients, where relu_y and argmax may be undefined.
void forward_cuda(const char* op, const Geometry& g, const Tensor& input, const Tensor& weight,
                  const optional<Tensor>& bias, bool channels_last, bool relu, const Tensor& y,
                  const optional<Tensor>& argmax);
void gradients_cuda(const char* op, const Geometry& g, const Tensor& grad_y, const Tensor& relu_y,
                    const Tensor& argmax, const Tensor& input, const Tensor& weight,
                    const Grads& out);

// Fills those that are defined.
void gradients(const Geometry& g, const cpu::Images& grad_y, const Tensor& input,
               const Tensor& weight, const Grads& out);

}  // namespace dlkernels::conv
