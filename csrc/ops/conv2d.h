// The arguments of conv2d, the shapes and the index tables that follow from them, for conv2d.cpp.
#pragma once
#include "common.h"

namespace dlkernels::conv {

using c10::SymInt;
using c10::SymIntArrayRef;

// One argument in two dimensions: (h, w), or one number for both.
inline std::array<SymInt, 2> pair(const char* name, SymIntArrayRef values, int64_t least) {
  TORCH_CHECK(values.size() == 1 || values.size() == 2, "conv2d: ", name,
              " must be one or two numbers, got ", values);
  for (const SymInt& v : values)  // small enough that no product of two overflows
    TORCH_CHECK(v >= least && v <= INT32_MAX, "conv2d: ", name, " must be at least ", least,
                " and below 2**31, got ", values);
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
  const auto s = pair("stride", stride, 1), d = pair("dilation", dilation, 1);
  TORCH_CHECK(padding.size() == 4, "conv2d: padding must be (top, bottom, left, right), got ",
              padding);
  const auto top = pair("padding", padding.slice(0, 2), 0);
  const auto left = pair("padding", padding.slice(2, 2), 0);
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

// A checked call in plain numbers, and the index tables of its windows.
struct Geometry {
  int64_t N, C, H, W, K, KH, KW, OH, OW, groups, c, k;  // c, k: channels a group
  std::array<int64_t, 2> stride, padding, dilation;     // padding: top and left
  bool channels_last;

  Geometry(const Tensor& input, const Tensor& weight, SymIntArrayRef s, SymIntArrayRef p,
           SymIntArrayRef d, const SymInt& g) {
    const auto sizes = output_sizes(input, weight, s, p, d, g);
    const auto number = [](const SymInt& x) { return x.expect_int(); };
    N = number(sizes[0]), OH = number(sizes[2]), OW = number(sizes[3]);
    C = input.size(-3), H = input.size(-2), W = input.size(-1);
    K = weight.size(0), KH = weight.size(2), KW = weight.size(3);
    groups = number(g), c = C / groups, k = K / groups;
    stride = {number(s[0]), number(s.back())}, dilation = {number(d[0]), number(d.back())};
    padding = {number(p[0]), number(p[2])};
    channels_last = layout(input, weight) == at::MemoryFormat::ChannelsLast;
  }

  // (outputs, window): the input row (or column) under each tap of a window, -1 outside.
  std::vector<int64_t> taps(int i, int64_t outputs, int64_t window, int64_t size) const {
    std::vector<int64_t> table;
    table.reserve(outputs * window);
    for (int64_t o = 0; o < outputs; ++o)
      for (int64_t t = 0; t < window; ++t) {
        const int64_t at = o * stride[i] - padding[i] + t * dilation[i];
        table.push_back(at >= 0 && at < size ? at : -1);
      }
    return table;
  }

  // (size, window): the output row that reaches an input row through each tap, -1 where none does.
  std::vector<int64_t> reverse_taps(int i, int64_t size, int64_t window, int64_t outputs) const {
    std::vector<int64_t> table;
    table.reserve(size * window);
    for (int64_t at = 0; at < size; ++at)
      for (int64_t t = 0; t < window; ++t) {
        const int64_t o = at + padding[i] - t * dilation[i];
        table.push_back(o >= 0 && o % stride[i] == 0 && o / stride[i] < outputs ? o / stride[i]
                                                                                : -1);
      }
    return table;
  }

  at::MemoryFormat format() const {
    return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  }
};

// An (N, channels, H, W) tensor in one of the two layouts, and what a group or an image of it is.
struct Images {
  int64_t sn, sc, sh, sw;
  Images(bool channels_last, int64_t channels, int64_t H, int64_t W)
      : sn(channels * H * W),
        sc(channels_last ? 1 : H * W),
        sh(channels_last ? W * channels : W),
        sw(channels_last ? channels : 1) {}
};

// The windows of one pass over the images x: the index tables, and what points into them.
struct Windows {
  std::vector<int64_t> h, w;
  cpu::Patches patches;

  // Of the forward pass, over the input.
  static Windows of_input(const Geometry& g, const Tensor& x) {
    Windows v(g, x, {g.channels_last, g.C, g.H, g.W}, g.taps(0, g.OH, g.KH, g.H),
              g.taps(1, g.OW, g.KW, g.W));
    v.patches.C = g.c, v.patches.OH = g.OH, v.patches.OW = g.OW;
    if (g.stride[1] != 1) return v;
    const auto inside = [&](int64_t ow) {  // all taps of this column lie in x
      return v.w[ow * g.KW] >= 0 && v.w[ow * g.KW + g.KW - 1] >= 0;
    };
    int64_t &begin = v.patches.w_begin, &end = v.patches.w_end;
    while (begin < g.OW && !inside(begin)) ++begin;
    for (end = begin; end < g.OW && inside(end);) ++end;
    return v;
  }

  // Of grad_input, over the output's gradient.
  static Windows of_output(const Geometry& g, const Tensor& grad_y, const float* relu_y) {
    Windows v(g, grad_y, {g.channels_last, g.K, g.OH, g.OW}, g.reverse_taps(0, g.H, g.KH, g.OH),
              g.reverse_taps(1, g.W, g.KW, g.OW));
    v.patches.C = g.k, v.patches.OH = g.H, v.patches.OW = g.W;
    v.patches.relu_y = relu_y;
    return v;
  }

 private:
  Windows(const Geometry& g, const Tensor& x, const Images& from, std::vector<int64_t> h,
          std::vector<int64_t> w)
      : h(std::move(h)), w(std::move(w)) {
    patches.x = x.const_data_ptr<float>();
    patches.sn = from.sn, patches.sc = from.sc, patches.sh = from.sh, patches.sw = from.sw;
    patches.KH = g.KH, patches.KW = g.KW;
    patches.h = this->h.data(), patches.w = this->w.data();
  }
};

}  // namespace dlkernels::conv
