#include "kernels_test.h"

using namespace dlkernels;
using namespace dlkernels::test;

namespace {

struct Shape {
  int64_t N, C, H, W, K, kernel, stride, padding, dilation;
};

// x (N, C, H, W) in either layout, its windows, and what every element of the im2col matrix is.
struct Case {
  Shape s;
  bool last;  // channels_last
  int64_t OH, OW, pixels, J;
  Buffer<float> x, mask;
  Buffer<int64_t> rows, cols;
  cpu::Patches patches;

  Case(const Shape& s, bool last, bool masked)
      : s(s),
        last(last),
        OH((s.H + 2 * s.padding - s.dilation * (s.kernel - 1) - 1) / s.stride + 1),
        OW((s.W + 2 * s.padding - s.dilation * (s.kernel - 1) - 1) / s.stride + 1),
        pixels(s.N * OH * OW),
        J(s.kernel * s.kernel * s.C),
        x(s.N * s.C * s.H * s.W, 1),
        mask(x.size(), 2),
        rows(OH * s.kernel),
        cols(OW * s.kernel) {
    const auto fill = [&](Buffer<int64_t>& table, int64_t size) {
      for (int64_t i = 0; i < table.size(); ++i) {
        const int64_t at = i / s.kernel * s.stride - s.padding + i % s.kernel * s.dilation;
        table[i] = at >= 0 && at < size ? at : -1;
      }
    };
    fill(rows, s.H), fill(cols, s.W);
    patches = {.x = x.data(),
               .relu_y = masked ? mask.data() : nullptr,
               .sn = s.C * s.H * s.W,
               .sc = last ? 1 : s.H * s.W,
               .sh = last ? s.W * s.C : s.W,
               .sw = last ? s.C : 1,
               .C = s.C,
               .KH = s.kernel,
               .KW = s.kernel,
               .OH = OH,
               .OW = OW,
               .h = rows.data(),
               .w = cols.data()};
    const auto inside = [&](int64_t ow) {
      return cols[ow * s.kernel] >= 0 && cols[(ow + 1) * s.kernel - 1] >= 0;
    };
    while (s.stride == 1 && patches.w_begin < OW && !inside(patches.w_begin)) ++patches.w_begin;
    patches.w_end = patches.w_begin;
    while (s.stride == 1 && patches.w_end < OW && inside(patches.w_end)) ++patches.w_end;
  }

  double at(int64_t pixel, int64_t j) {
    const int64_t n = pixel / (OH * OW), oh = pixel / OW % OH, ow = pixel % OW;
    const int64_t c = j % s.C, kw = j / s.C % s.kernel, kh = j / s.C / s.kernel;
    const int64_t h = rows[oh * s.kernel + kh], w = cols[ow * s.kernel + kw];
    if (h < 0 || w < 0) return 0;
    const int64_t i = n * patches.sn + c * patches.sc + h * patches.sh + w * patches.sw;
    return patches.relu_y && mask[i] <= 0 ? 0 : x[i];
  }
  // Where a (pixel, k) element lies, in a tensor of K channels.
  int64_t index(int64_t pixel, int64_t k) {
    const int64_t n = pixel / (OH * OW), p = pixel % (OH * OW);
    return last ? pixel * s.K + k : (n * s.K + k) * OH * OW + p;
  }
};

int forward(const cpu::Kernels& t, Case& c) {
  const int64_t P = c.OH * c.OW, K = c.s.K;
  Buffer<float> weight(K * c.J, 3), y(c.pixels * K), bias(K, 4), scratch(t.gemm_scratch);
  y.fill(NAN);
  for (int64_t n = 0; n < (c.last ? 1 : c.s.N); ++n) {
    cpu::Patches p = c.patches;
    p.x += n * p.sn;
    if (p.relu_y) p.relu_y += n * p.sn;
    cpu::GemmOutput out = {.c = y.data() + n * K * P, .row = c.last ? K : P, .relu = true};
    (c.last ? out.col_bias : out.row_bias) = bias.data();
    const cpu::GemmPart part = {0, c.last ? c.pixels : K, 0, c.last ? K : P};
    t.conv2d(p, weight.data(), c.last, out, part, scratch.data());
  }
  int wrong = 0;
  for (int64_t p = 0; p < c.pixels; ++p)
    for (int64_t k = 0; k < K; ++k) {
      double z = bias[k];
      for (int64_t j = 0; j < c.J; ++j) z += c.at(p, j) * weight[k * c.J + j];
      wrong += !close(y[c.index(p, k)], std::fmax(0, z), 1e-6 * (c.J + 4));
    }
  return wrong;
}

int grad_weight(const cpu::Kernels& t, Case& c) {
  const int64_t P = c.OH * c.OW, K = c.s.K;
  Buffer<float> grad_y(c.pixels * K, 3), grad(K * c.J), sums(K), scratch(t.gemm_scratch);
  for (int64_t n = 0; n < (c.last ? 1 : c.s.N); ++n) {
    cpu::Patches p = c.patches;
    p.x += n * p.sn;
    if (p.relu_y) p.relu_y += n * p.sn;
    const cpu::Matrix g = {grad_y.data() + n * K * P, c.last ? 1 : P, c.last ? K : 1};
    const cpu::GemmOutput out = {
        .c = grad.data(), .row = c.J, .accumulate = n > 0, .row_sums = sums.data()};
    t.conv2d_grad_weight(g, p, c.last ? c.pixels : P, out, {0, K, 0, c.J}, scratch.data());
  }
  int wrong = 0;
  for (int64_t k = 0; k < K; ++k) {
    double sum = 0;
    for (int64_t p = 0; p < c.pixels; ++p) sum += grad_y[c.index(p, k)];
    wrong += !close(sums[k], sum, 1e-6 * (c.pixels + 4));
    for (int64_t j = 0; j < c.J; ++j) {
      double z = 0;
      for (int64_t p = 0; p < c.pixels; ++p) z += grad_y[c.index(p, k)] * c.at(p, j);
      wrong += !close(grad[k * c.J + j], z, 1e-6 * (c.pixels + 4));
    }
  }
  return wrong;
}

int conv2d(const cpu::Kernels& t) {
  const Shape shapes[] = {
      {1, 1, 1, 1, 1, 1, 1, 0, 1},  {2, 3, 5, 7, 4, 3, 1, 1, 1},    {1, 17, 4, 19, 33, 3, 1, 1, 1},
      {3, 1, 9, 9, 16, 3, 1, 1, 1}, {2, 15, 6, 35, 17, 1, 1, 0, 1}, {2, 4, 11, 13, 5, 3, 2, 1, 1},
      {1, 5, 9, 10, 7, 2, 1, 3, 2}, {1, 2, 3, 3, 2, 3, 1, 5, 1},    {2, 33, 5, 5, 3, 3, 3, 2, 2},
  };
  int wrong = 0;
  for (const Shape& s : shapes)
    for (const bool last : {false, true})
      for (const bool masked : {false, true}) {
        Case c(s, last, masked);
        const int bad = forward(t, c) + grad_weight(t, c);
        if (bad) std::printf("C=%ld K=%ld last=%d: %d\n", long(s.C), long(s.K), last, bad);
        wrong += bad;
      }
  Buffer<float> x(3 * 67, 1), y(67);
  t.sum_rows(x.data(), 3, 67, y.data(), 0, 67);
  for (int64_t i = 0; i < 67; ++i) wrong += y[i] != (x[i] + x[67 + i]) + x[134 + i];
  return wrong;
}
const Test conv2d_test("conv2d", conv2d);

}  // namespace
