// conv2d, its gradients, and with ReLU and max-pool, against sums in float64: every way, layout and
// type.
#include "cuda_test.h"

#include "cuda/conv2d/conv2d.cu"

namespace dlkernels::test {
namespace {

using cuda::Conv2d;
using cuda::Conv2dAlgorithm;

ConvAxis axis(int64_t in, int64_t taps, int64_t stride = 1, int64_t pad = 0, int64_t dilation = 1) {
  return {in, (in + 2 * pad - dilation * (taps - 1) - 1) / stride + 1, taps, stride, pad, dilation};
}
int64_t input(const ConvAxis& a, int64_t o, int64_t tap) {  // -1 outside
  const int64_t at = o * a.stride - a.pad + tap * a.dilation;
  return at >= 0 && at < a.in ? at : -1;
}

// Everything about one convolution, indexed by plain numbers.
template <class T>
struct Case {
  Conv2d s;
  int64_t c, k, taps;
  CudaBuffer<T> x, weight, bias, y, grad_y;

  explicit Case(const Conv2d& s)
      : s(s),
        c(s.C / s.groups),
        k(s.K / s.groups),
        taps(s.h.taps * s.w.taps),
        x(s.N * s.C * s.h.in * s.w.in, 1),
        weight(s.K * c * taps, 2),
        bias(s.K, 3),
        y(s.N * s.K * s.h.out * s.w.out),
        grad_y(y.size(), 4) {}

  int64_t at(int64_t n, int64_t ch, int64_t i, int64_t j, int64_t C, int64_t H, int64_t W) const {
    return s.channels_last ? ((n * H + i) * W + j) * C + ch : ((n * C + ch) * H + i) * W + j;
  }
  int64_t at_y(int64_t n, int64_t o, int64_t i, int64_t j) const {
    return at(n, o, i, j, s.K, s.h.out, s.w.out);
  }
  int64_t at_weight(int64_t o, int64_t i, int64_t kh, int64_t kw) const {
    const int64_t tap = kh * s.w.taps + kw;
    return s.weight_channels_last ? (o * taps + tap) * c + i : (o * c + i) * taps + tap;
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
        const int64_t h = input(s.h, oh, kh), w = input(s.w, ow, kw);
        if (h < 0 || w < 0) continue;
        for (int64_t i = 0; i < c; ++i)
          f(at(n, o / k * c + i, h, w, s.C, s.h.in, s.w.in), at_weight(o, i, kh, kw));
      }
  }

  // How far a sum of n products in [-1, 1] may be off: as float32 sums are, and rounded to T; where
  // factors are rounded to TF32, by that.
  double tolerance(double n, double value) const {
    const double products = s.allow_tf32 && s.algorithm == Conv2dAlgorithm::kGemm ? 0x1p-10 * n : 0;
    return 2 * kEps<float> * (n + 4) + products + 2 * kEps<T> * std::fabs(value);
  }

  int run(const cuda::Conv2dForward& t) const {
    CudaBuffer<char> workspace(conv2d_workspace(s, t));
    return cuda::conv2d(s, t, workspace.data(), nullptr) != 0;
  }
  int run(const cuda::Conv2dBackward& t) const {
    CudaBuffer<char> workspace(conv2d_backward_workspace(s, t));
    return cuda::conv2d_backward(s, t, workspace.data(), nullptr) != 0;
  }

  int forward(bool relu) {
    int wrong =
        run({x.data(), weight.data(), relu ? bias.data() : nullptr, y.data(), nullptr, relu});
    each_output(s.h.out, s.w.out, [&](int64_t n, int64_t o, int64_t i, int64_t j) {
      double z = relu ? bias.at(o) : 0, terms = 1;
      each_product(n, o, i, j, [&](int64_t a, int64_t w) { z += x.at(a) * weight.at(w), ++terms; });
      if (relu) z = std::fmax(0, z);
      const double got = y.at(at_y(n, o, i, j));
      wrong += std::isinf(z) ? got != z : !close(got, z, tolerance(terms, z));
    });
    return wrong;
  }

  // What the pool makes of y, element for element, where no two are close.
  int pooled() {
    const int64_t PH = s.h.out / 2, PW = s.w.out / 2, P = s.N * s.K * PH * PW;
    CudaBuffer<T> pool_y(P);
    CudaBuffer<uint8_t> argmax(P);
    int wrong =
        run({x.data(), weight.data(), bias.data(), pool_y.data(), argmax.data(), /*relu=*/true});
    CudaBuffer<T> grad(P, 5), expanded(y.size());
    expanded.fill(cuda::from_float<T>(0));
    each_output(PH, PW, [&](int64_t n, int64_t o, int64_t i, int64_t j) {
      double best = 0, allowed = 0;
      for (int64_t e = 0; e < 4; ++e) {
        double z = bias.at(o), terms = 1;
        each_product(n, o, 2 * i + e / 2, 2 * j + e % 2,
                     [&](int64_t a, int64_t w) { z += x.at(a) * weight.at(w), ++terms; });
        best = std::fmax(best, z), allowed = std::fmax(allowed, tolerance(terms, z));
      }
      const int64_t p = at(n, o, i, j, s.K, PH, PW);
      wrong += !close(pool_y.at(p), best, allowed);
      const int element = argmax[((n * PH + i) * PW + j) * s.K + o];
      wrong += (element == cuda::conv::kNoElement) != (pool_y.at(p) == 0);
      if (element == cuda::conv::kNoElement) return;
      if (element > 3) return void(++wrong);
      const int64_t at = at_y(n, o, 2 * i + element / 2, 2 * j + element % 2);
      wrong += !close(y.at(at), pool_y.at(p), 2 * allowed);  // forward() has just filled y
      expanded[at] = grad[p];
    });
    // Its gradient is that of the expanded one, bit for bit.
    CudaBuffer<T> gx(x.size()), gb(s.K), ex(x.size()), eb(s.K);
    wrong += run({grad.data(), nullptr, argmax.data(), x.data(), weight.data(), gx.data(), nullptr,
                  gb.data()});
    wrong += run({expanded.data(), nullptr, nullptr, x.data(), weight.data(), ex.data(), nullptr,
                  eb.data()});
    for (int64_t i = 0; i < x.size(); ++i) wrong += gx.at(i) != ex.at(i);
    for (int64_t i = 0; i < s.K; ++i) wrong += gb.at(i) != eb.at(i);
    return wrong;
  }

  int backward(bool relu) {
    std::vector<double> gx(x.size()), gw(weight.size()), gb(s.K), terms(x.size());
    each_output(s.h.out, s.w.out, [&](int64_t n, int64_t o, int64_t i, int64_t j) {
      const int64_t p = at_y(n, o, i, j);
      const double g = relu && y.at(p) <= 0 ? 0 : grad_y.at(p);
      gb[o] += g;
      each_product(n, o, i, j, [&](int64_t a, int64_t w) {
        gx[a] += g * weight.at(w), gw[w] += g * x.at(a), ++terms[a];
      });
    });
    CudaBuffer<T> grad_x(x.size()), grad_weight(weight.size()), grad_bias(s.K);
    const void* mask = relu ? y.data() : nullptr;
    int wrong = run(
        {grad_y.data(), mask, nullptr, x.data(), weight.data(), grad_x.data(), nullptr, nullptr});
    wrong += run({grad_y.data(), mask, nullptr, x.data(), weight.data(), nullptr,
                  grad_weight.data(), relu ? grad_bias.data() : nullptr});
    if (!relu)
      wrong += run({grad_y.data(), mask, nullptr, x.data(), weight.data(), nullptr, nullptr,
                    grad_bias.data()});
    const double pixels = s.N * s.h.out * s.w.out;
    for (int64_t i = 0; i < x.size(); ++i)
      wrong += !close(grad_x.at(i), gx[i], tolerance(terms[i], gx[i]));
    for (int64_t i = 0; i < weight.size(); ++i)
      wrong += !close(grad_weight.at(i), gw[i], tolerance(pixels, gw[i]));
    for (int64_t i = 0; i < s.K; ++i)
      wrong += !close(grad_bias.at(i), gb[i], tolerance(pixels, gb[i]));
    return wrong;
  }
};

struct Shape {
  int64_t N, C, K;
  ConvAxis h, w;
  int64_t groups = 1;
};

template <class T>
int wrong_results(const Shape& shape, bool last, bool weight_last, bool relu, bool tf32,
                  Conv2dAlgorithm way) {
  const Conv2d s = {kDType<T>, shape.N, shape.C,     shape.K, shape.groups, shape.h,
                    shape.w,   last,    weight_last, tf32,    way};
  Case<T> c(s);
  const int y = c.forward(relu), g = c.backward(relu), p = relu ? c.pooled() : 0;
  if (y + g + p)
    std::printf(
        "%zu bytes C=%ld K=%ld H=%ld W=%ld last=%d %d way=%d relu=%d: %d, gradients %d, "
        "pool %d\n",
        sizeof(T), long(s.C), long(s.K), long(s.h.in), long(s.w.in), last, weight_last, int(way),
        relu, y, g, p);
  return y + g + p;
}

const Shape shapes[] = {
    {1, 1, 1, axis(1, 1), axis(1, 1)},
    {1, 16, 70, axis(4, 1), axis(4, 2, 1, 1)},  // a wide tile of float32
    {2, 3, 4, axis(5, 3, 1, 1), axis(7, 3, 1, 1)},
    {2, 1, 16, axis(5, 3, 1, 1), axis(6, 3, 1, 1)},
    {2, 4, 5, axis(5, 3, 2, 1), axis(7, 3, 2, 1)},
    {2, 8, 66, axis(4, 1), axis(5, 1)},  // and of bfloat16
    {1, 5, 7, axis(7, 2, 1, 3, 2), axis(6, 2, 1, 3, 2)},
    {1, 2, 2, axis(3, 3, 1, 5), axis(3, 3, 1, 5)},
    {1, 9, 17, axis(6, 1, 2), axis(7, 1, 3)},
    {1, 3, 6, axis(9, 2, 4, 3, 6), axis(7, 2, 2, 4, 6)},  // strides and dilations share factors
    {1, 6, 12, axis(6, 3, 1, 1), axis(5, 3, 2, 1), 3},
    {2, 10, 10, axis(7, 3, 2, 1), axis(6, 5, 1, 2), 10},
};

// Two shapes, in layouts, with and without ReLU and TF32, that take turns.
template <class T>
int two_shapes(Conv2dAlgorithm way, int turn) {
  int wrong = 0;
  for (int i = turn; i < turn + 2; ++i) {
    const int as = i + static_cast<int>(kDType<T>);
    wrong +=
        wrong_results<T>(shapes[i % std::size(shapes)], as % 2, as / 2 % 2, as % 3, i % 2, way);
  }
  return wrong;
}

// main calls a test six times, and fibres are slow: so that is when all shapes have been met, each
// by one type or another, and by another on each way.
int in_turn(Conv2dAlgorithm way, int call) {
  const int turn = 2 * call;
  switch ((call + static_cast<int>(way)) % 3) {
    case 0:
      return two_shapes<cuda::half>(way, turn);
    case 1:
      return two_shapes<cuda::bf16>(way, turn);
    default:
      return two_shapes<float>(way, turn);
  }
}

const CudaTest direct_test("conv2d, direct", [] {
  static int calls = 0;
  return in_turn(Conv2dAlgorithm::kDirect, calls++);
});

const CudaTest gemm_test("conv2d, by matrices", [] {
  static int calls = 0;
  return in_turn(Conv2dAlgorithm::kGemm, calls++);
});

// An infinite pixel makes its outputs infinite, and no other.
const CudaTest infinite_test("conv2d, an infinity", [] {
  int wrong = 0;
  for (const Conv2dAlgorithm way : {Conv2dAlgorithm::kDirect, Conv2dAlgorithm::kGemm}) {
    Case<float> c({cuda::DType::kFloat32, 1, 4, 5, 1, axis(4, 3, 1, 1), axis(5, 2), true, true,
                   /*allow_tf32=*/false, way});
    c.x[9] = INFINITY;
    wrong += c.forward(/*relu=*/false);
  }
  return wrong;
});

// A gradient's gathers meet each input, output and tap that belong together, once.
int wrong_gathers(const ConvAxis& a) {
  const cuda::conv::PassAxis axis(a, /*gradient=*/true);
  int wrong = 0, expected = 0, met = 0, inputs = 0;
  for (int64_t o = 0; o < a.out; ++o)
    for (int64_t tap = 0; tap < a.taps; ++tap) expected += input(a, o, tap) >= 0;
  for (int residue = 0; residue < axis.residues; ++residue) {
    const auto g = axis.gather(residue, /*gradient=*/true);
    wrong += g.count > axis.rows || (g.taps && static_cast<int>(g.by_taps.divisor) != g.taps);
    for (int i = 0; i < g.count; ++i) {
      ++inputs;
      for (int t = 0; t < g.taps; ++t) {
        const int o = g.input(i) + t * g.step, tap = g.tap + t * g.tap_step;
        if (!g.inside(o)) continue;
        wrong += tap >= a.taps || input(a, o, tap) != g.first + i * g.every;
        ++met;
      }
    }
  }
  return wrong + (met != expected) + (inputs != a.in);
}

const CudaTest gather_test("the gathers of a gradient", [] {
  int wrong = 0;
  for (int64_t i = 0; i < 9 * 5 * 7 * 7 * 6; i += 11) {
    const int64_t in = i % 9 + 1, taps = i / 9 % 5 + 1, stride = i / 45 % 7 + 1;
    const int64_t pad = i / 315 % 7, dilation = i / 2205 % 6 + 1;
    if (dilation * (taps - 1) < in + 2 * pad)
      wrong += wrong_gathers(axis(in, taps, stride, pad, dilation));
  }
  return wrong;
});

// Rows far behind what 32 bits count, without the tensors that have so many.
const CudaTest rows_test("rows of huge tensors", [] {
  int wrong = 0;
  for (const bool pools : {false, true})
    for (const int64_t size : {1, 2, 3, 62, 8191}) {
      const int64_t N = (int64_t{1} << 36) / (size * size);
      const Conv2d s = {cuda::DType::kFloat32, N,    4,   4, 1, axis(size, 1),
                        axis(size, 1),         true, true};
      const cuda::conv::Pass pass(s, /*gradient=*/false, pools);
      const int64_t out = pools ? size / 2 * 2 : size, rows = N * out * out;
      wrong += pass.rows() != rows;
      if (rows == 0) continue;
      for (const int64_t begin : {int64_t{0}, rows / 3 / 128 * 128, (rows - 1) / 128 * 128}) {
        const cuda::conv::Rows tile(pass, begin);
        for (const int row : {0, 1, 2, 3, 77, 127}) {
          const auto p = tile.place(pass, row);
          const int64_t n = (begin + row) / (out * out), at = (begin + row) % (out * out);
          const int64_t q = at / 4, width = out / 2;
          wrong += p.n >= tile.images ? begin + row < rows : tile.first_image + p.n != n;
          wrong += p.a != (pools ? q / width * 2 + at % 4 / 2 : at / out);
          wrong += p.b != (pools ? q % width * 2 + at % 2 : at % out);
        }
      }
    }
  return wrong;
});

// First layers and depthwise ones are direct, but for large windows; all else is for tensor cores.
const CudaTest way_test("which way", [] {
  struct Layer {
    int64_t N, C, K, size, taps, stride, pad, groups;
    bool gemm;
  };
  const Layer layers[] = {
      {64, 1, 32, 28, 3, 1, 1, 1, false},      {64, 3, 64, 224, 7, 2, 3, 1, true},
      {64, 32, 64, 14, 3, 1, 1, 1, true},      {32, 256, 64, 28, 1, 1, 0, 1, true},
      {32, 512, 512, 14, 3, 1, 1, 512, false}, {32, 256, 512, 28, 3, 2, 1, 1, true},
  };
  int wrong = 0;
  for (const Layer& l : layers)
    for (const cuda::DType dtype : {cuda::DType::kFloat32, cuda::DType::kBFloat16}) {
      const ConvAxis a = axis(l.size, l.taps, l.stride, l.pad);
      const Conv2d c = {dtype, l.N, l.C, l.K, l.groups, a, a, true, true, /*allow_tf32=*/true};
      wrong += cuda::by_gemm(c, cuda::estimate(c, /*gradient=*/false)) != l.gemm;
      if (l.gemm) wrong += !cuda::by_gemm(c, cuda::estimate_weight(c));
    }
  return wrong;
});

const CudaTest window_test("the maximum of a window", [] {
  struct Window {
    float z[4];
    float value;
    int element;
  };
  const Window windows[] = {{{1, 3, 3, 2}, 3, 1},
                            {{-1, -2, -3, -4}, 0, cuda::conv::kNoElement},
                            {{NAN, 9, NAN, 1}, NAN, 2},
                            {{-INFINITY, 0, 0, 5}, 5, 3},
                            {{0, 0, 0, 0}, 0, cuda::conv::kNoElement}};
  int wrong = 0;
  for (const Window& w : windows) {
    const auto best = cuda::conv::pool_window(w.z);
    wrong += !close(best.value, w.value, 0) || best.element != w.element;
  }
  return wrong;
});

}  // namespace
}  // namespace dlkernels::test
