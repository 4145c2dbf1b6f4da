// A convolution of one shape in one layout and dtype, indexed by plain numbers.
#pragma once
#include "reduced_float.h"

namespace dlkernels::test {

struct Axis {
  int64_t in, taps, stride = 1, pad = 0, dilation = 1;
  int64_t out() const { return (in + 2 * pad - dilation * (taps - 1) - 1) / stride + 1; }
  int64_t input(int64_t o, int64_t tap) const {  // -1 outside
    const int64_t at = o * stride - pad + tap * dilation;
    return at >= 0 && at < in ? at : -1;
  }
};

struct Shape {
  int64_t N, C, K;
  Axis h, w;
  int64_t groups = 1;
};

// An algorithm, or the direct one for passes that it does not support.
struct Way {
  const cpu::Conv2dAlgorithm &algorithm, &direct;
  const cpu::Conv2dAlgorithm& operator()(const cpu::Conv2d& conv) const {
    return algorithm.supports(conv) ? algorithm : direct;
  }
};

// Everything about one shape in one layout and dtype, indexed by plain numbers.
template <class T>
struct Case {
  Shape s;
  bool last;  // channels_last
  int64_t c, k, H, W, OH, OW, PH, PW;
  Buffer<T> x, weight, y, grad_y;
  Buffer<float> bias;

  Case(const Shape& s, bool last)
      : s(s),
        last(last),
        c(s.C / s.groups),
        k(s.K / s.groups),
        H(s.h.in),
        W(s.w.in),
        OH(s.h.out()),
        OW(s.w.out()),
        PH(OH / 2),
        PW(OW / 2),
        x(s.N * s.C * H * W, 1),
        weight(s.K * c * s.h.taps * s.w.taps, 2),
        y(s.N * s.K * OH * OW),
        grad_y(y.size(), 4),
        bias(s.K, 3) {}

  int64_t at(int64_t n, int64_t ch, int64_t i, int64_t j, int64_t C, int64_t H, int64_t W) const {
    return last ? ((n * H + i) * W + j) * C + ch : ((n * C + ch) * H + i) * W + j;
  }
  int64_t weight_at(int64_t o, int64_t i, int64_t kh, int64_t kw) const {
    return last ? ((o * s.h.taps + kh) * s.w.taps + kw) * c + i
                : ((o * c + i) * s.h.taps + kh) * s.w.taps + kw;
  }
  cpu::ImageView images(const T* data, int64_t C, int64_t H, int64_t W,
                        const T* relu_y = nullptr) const {
    const int64_t sc = last ? 1 : H * W, sh = last ? W * C : W, sw = last ? C : 1;
    return {data, C, H, W, C * H * W, sc, sh, sw, kDType<T>, {relu_y}};
  }
  cpu::Conv2d forward() const {
    const auto axis = [](const Axis& a) {
      return ConvAxis{a.in, a.out(), a.taps, a.stride, a.pad, a.dilation};
    };
    return {.x = images(const_cast<Case*>(this)->x.data(), s.C, H, W),
            .h = axis(s.h),
            .w = axis(s.w),
            .groups = s.groups,
            .K = s.K};
  }
  cpu::Conv2d backward(const cpu::ImageView& grad) const {
    const auto axis = [](const Axis& a) {
      return ConvAxis{a.out(),    a.in,    a.taps, 1, a.dilation * (a.taps - 1) - a.pad,
                      a.dilation, a.stride};
    };
    return {.x = grad, .h = axis(s.h), .w = axis(s.w), .groups = s.groups, .K = s.C};
  }
  cpu::WeightView filter(bool reversed) {
    const int64_t taps = s.h.taps * s.w.taps, tap = last ? c : 1, row = s.w.taps * tap;
    const int64_t input = last ? 1 : taps, group = k * c * taps, output = c * taps;
    if (reversed) return {weight.data() + (taps - 1) * tap, group, input, output, -row, -tap};
    return {weight.data(), group, output, input, row, tap};
  }
  static void set_output(cpu::Conv2d& conv, T* y, const cpu::ImageView& as) {
    conv.y = y, conv.yn = as.sn, conv.yc = as.sc, conv.yh = as.sh, conv.yw = as.sw;
  }

  // A pass in several parts.
  void run(const Way& way, const cpu::Conv2d& conv, const cpu::WeightView& f) {
    const cpu::Conv2dAlgorithm& t = way(conv);
    Buffer<float> packed(t.panels(conv) * t.panel_floats(conv));
    const int64_t panels = t.panels(conv), blocks = s.N * t.blocks(conv);
    together([&] { t.pack(conv, f, packed.data(), panels / 2, panels); },
             [&] { t.pack(conv, f, packed.data(), 0, panels / 2); });
    const auto part = [&](int64_t b, int64_t e, int64_t p, int64_t q) {
      Buffer<float> scratch(t.scratch(conv));
      t.forward(conv, packed.data(), b, e, p, q, scratch.data());
    };
    together([&] { part(blocks / 2, blocks, panels / 2, panels); },
             [&] { part(blocks / 2, blocks, 0, panels / 2); },
             [&] { part(0, blocks / 2, panels / 2, panels); },
             [&] { part(0, blocks / 2, 0, panels / 2); });
  }

  template <class F>  // f(n, o, oh, ow)
  void each_output(int64_t rows, int64_t cols, const F& f) const {
    for (int64_t n = 0; n < s.N; ++n)
      for (int64_t o = 0; o < s.K; ++o)
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < cols; ++j) f(n, o, i, j);
  }
  template <class F>  // f(index of x, index of weight) for every product in output (n, o, oh, ow)
  void each_product(int64_t n, int64_t o, int64_t oh, int64_t ow, const F& f) const {
    for (int64_t kh = 0; kh < s.h.taps; ++kh)
      for (int64_t kw = 0; kw < s.w.taps; ++kw) {
        const int64_t h = s.h.input(oh, kh), w = s.w.input(ow, kw);
        if (h < 0 || w < 0) continue;
        for (int64_t i = 0; i < c; ++i)
          f(at(n, o / k * c + i, h, w, s.C, H, W), weight_at(o, i, kh, kw));
      }
  }
};

}  // namespace dlkernels::test
