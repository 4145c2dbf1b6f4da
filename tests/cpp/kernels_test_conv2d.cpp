#include <algorithm>

#include "conv2d_case.h"

using namespace dlkernels;
using namespace dlkernels::test;

namespace {

template <class T>
int forward(const Way& way, Case<T>& c, bool biased) {  // and through a ReLU
  cpu::Conv2d conv = c.forward();
  c.set_output(conv, c.y.data(), c.images(c.y.data(), c.s.K, c.OH, c.OW));
  if (biased) conv.on_store.bias = c.bias.data(), conv.on_store.relu = true;
  c.y.fill(T(NAN));
  c.run(way, conv, c.filter(false));
  int wrong = 0;
  c.each_output(c.OH, c.OW, [&](int64_t n, int64_t o, int64_t i, int64_t j) {
    double z = biased ? c.bias[o] : 0, size = 1;
    c.each_product(n, o, i, j, [&](int64_t x, int64_t w) { z += c.x[x] * c.weight[w], ++size; });
    if (biased && z < 0) z = 0;  // NaN stays
    wrong +=
        !close(c.y[c.at(n, o, i, j, c.s.K, c.OH, c.OW)], z, 1e-6 * (size + 4) + rounding<T>(z));
  });
  return wrong;
}

// What the pool makes of y, bit for bit, and its gradient as grad_weight and grad_input read it. A
// narrow y may have ties where the sums had none.
template <class T>
int pooled(const Way& way, Case<T>& c) {
  const int64_t P = c.s.N * c.s.K * c.PH * c.PW;
  if (P == 0) return 0;
  Buffer<T> y(P), grad(P, 5), expanded(c.y.size());
  Buffer<uint8_t> argmax(P);
  cpu::Conv2d conv = c.forward();
  conv.h.out = 2 * c.PH, conv.w.out = 2 * c.PW;
  c.set_output(conv, y.data(), c.images(y.data(), c.s.K, c.PH, c.PW));
  conv.on_store.bias = c.bias.data(), conv.on_store.relu = true,
  conv.on_store.argmax = argmax.data();
  y.fill(T(NAN));
  c.run(way, conv, c.filter(false));
  int wrong = 0;
  expanded.fill(T(0));
  c.each_output(c.PH, c.PW, [&](int64_t n, int64_t o, int64_t i, int64_t j) {
    float best = -1;
    int64_t element = 0;
    const auto at = [&](int64_t e) {
      return c.at(n, o, 2 * i + e / 2, 2 * j + e % 2, c.s.K, c.OH, c.OW);
    };
    for (int64_t e = 0; e < 4; ++e)
      if (c.y[at(e)] > best) best = c.y[at(e)], element = e;
    if (best <= 0) element = kNoElement;
    const int64_t p = c.at(n, o, i, j, c.s.K, c.PH, c.PW);
    wrong += y[p] != best;
    const int64_t got = argmax[((n * c.PH + i) * c.PW + j) * c.s.K + o];
    if (kDType<T> != DType::kFloat32 && (got < 4 ? c.y[at(got)] == best : best == 0)) element = got;
    wrong += got != element;
    if (element != kNoElement) expanded[at(element)] = grad[p];
  });
  cpu::ImageView g = c.images(grad.data(), c.s.K, c.PH, c.PW);
  g.H = c.OH, g.W = c.OW, g.on_load.argmax = argmax.data();
  // The same as from the expanded gradient: element for element in a block, so bit for bit.
  const cpu::ImageView e = c.images(expanded.data(), c.s.K, c.OH, c.OW);
  Buffer<T> from_pool(c.x.size()), from_expanded(c.x.size());
  for (const auto& [images, to] : {std::pair{g, &from_pool}, {e, &from_expanded}}) {
    cpu::Conv2d b = c.backward(images);
    c.set_output(b, to->data(), c.images(nullptr, c.s.C, c.H, c.W));
    c.run(way, b, c.filter(true));
  }
  for (int64_t i = 0; i < c.x.size(); ++i) wrong += from_pool[i] != from_expanded[i];
  return wrong;
}

template <class T>
int gradients(const Way& way, Case<T>& c) {
  int wrong = 0;
  const T* mask = c.y.data();
  const cpu::ImageView grad = c.images(c.grad_y.data(), c.s.K, c.OH, c.OW, mask);
  Buffer<T> grad_x(c.x.size()), grad_weight(c.weight.size());
  std::vector<double> gx(c.x.size()), gw(c.weight.size()), gb(c.s.K), terms(c.x.size());
  c.each_output(c.OH, c.OW, [&](int64_t n, int64_t o, int64_t i, int64_t j) {
    const int64_t at = c.at(n, o, i, j, c.s.K, c.OH, c.OW);
    const double g = mask[at] <= 0 ? 0.0f : static_cast<float>(c.grad_y[at]);
    gb[o] += g;
    c.each_product(n, o, i, j, [&](int64_t x, int64_t w) {
      gx[x] += g * c.weight[w], gw[w] += g * c.x[x], ++terms[x];
    });
  });
  cpu::Conv2d conv = c.backward(grad);
  c.set_output(conv, grad_x.data(), c.images(nullptr, c.s.C, c.H, c.W));
  grad_x.fill(T(NAN));
  c.run(way, conv, c.filter(true));
  for (int64_t i = 0; i < c.x.size(); ++i)
    wrong += !close(grad_x[i], gx[i], 1e-6 * (terms[i] + 4) + rounding<T>(gx[i]));

  conv = c.forward();
  const cpu::Conv2dAlgorithm& t = way(conv);
  const int64_t blocks = c.s.N * t.blocks(conv), panels = t.panels(conv);
  const int64_t size = t.sum_floats(conv);
  Buffer<float> sums(2 * size), bias_sums(2 * c.s.K);
  Buffer<float> total(size), bias_total(c.s.K);
  const int64_t half = blocks / 2 + 1;
  if (half >= blocks) sums.fill(0), bias_sums.fill(0);  // no part will write the second
  const auto part = [&](int64_t b, int64_t e, int64_t p, int64_t q) {
    Buffer<float> scratch(t.scratch(conv));
    if (b < e)
      t.grad_weight(conv, grad, b, e, p, q, sums.data() + (b ? size : 0),
                    bias_sums.data() + (b ? c.s.K : 0), scratch.data());
  };
  together([&] { part(0, half, panels / 2, panels); }, [&] { part(0, half, 0, panels / 2); },
           [&] { part(half, blocks, panels / 2, panels); },
           [&] { part(half, blocks, 0, panels / 2); });
  for (int64_t i = 0; i < size; ++i) total[i] = sums[i] + sums[size + i];
  for (int64_t i = 0; i < c.s.K; ++i) bias_total[i] = bias_sums[i] + bias_sums[c.s.K + i];
  const auto unpack = [&](int64_t p, int64_t q) {
    t.unpack(conv, total.data(), c.filter(false), grad_weight.data(), p, q);
  };
  together([&] { unpack(panels / 2, panels); }, [&] { unpack(0, panels / 2); });
  const double tolerance = 1e-6 * (c.s.N * c.OH * c.OW + 4);
  for (int64_t i = 0; i < c.weight.size(); ++i)
    wrong += !close(grad_weight[i], gw[i], tolerance + rounding<T>(gw[i]));
  for (int64_t i = 0; i < c.s.K; ++i) wrong += !close(bias_total[i], gb[i], tolerance);
  return wrong;
}

// All algorithms that support a pass of the shape.
template <class T>
int every_way(const cpu::Kernels& t, const Shape& s, bool last) {
  const std::pair<const char*, const cpu::Conv2dAlgorithm*> algorithms[] = {
      {"direct", &t.direct},       {"small_k", &t.small_k},  {"scatter", &t.scatter},
      {"depthwise", &t.depthwise}, {"4x4", &t.winograd_4x4}, {"2x2", &t.winograd_2x2}};
  int wrong = 0;
  for (const auto& [name, algorithm] : algorithms) {
    Case<T> c(s, last);
    const cpu::ImageView grad = c.images(c.grad_y.data(), s.K, c.OH, c.OW);
    if (!algorithm->supports(c.forward()) && !algorithm->supports(c.backward(grad))) continue;
    const Way way = {*algorithm, t.direct};
    int y = 0;
    if (algorithm == &t.scatter) y += forward(way, c, false);  // for sums alone
    y += forward(way, c, true);  // last, for the y that the others take
    const int g = gradients(way, c), p = pooled(way, c);
    if (y + g + p)
      std::printf("%s dtype %d C=%ld K=%ld H=%ld W=%ld last=%d: %d, gradients %d, pool %d\n", name,
                  int(kDType<T>), long(s.C), long(s.K), long(c.H), long(c.W), last, y, g, p);
    wrong += y + g + p;
  }
  return wrong;
}

// In float32, and in one of the narrow dtypes.
int every_way(const cpu::Kernels& t, const Shape& s, bool last, int64_t index) {
  return every_way<float>(t, s, last) +
         (index % 2 ? every_way<BFloat16>(t, s, last) : every_way<Float16>(t, s, last));
}

int conv2d_random(const cpu::Kernels& t) {
  Random random;
  int wrong = 0;
  for (int done = 0; done < random_cases;) {
    const bool plain = random(0, 2) == 0;
    const auto axis = [&]() -> Axis {
      const int64_t in = random(1, 40);
      if (plain) return {in, 3, 1, random(0, 2)};
      if (random(0, 5)) return {in, random(1, 6), random(1, 4), random(0, 6), random(1, 4)};
      const int64_t far = int64_t{1} << random(5, 30), taps = random(1, 4);
      if (random(0, 1)) return {in, taps, far, random(0, 6), random(1, 3)};
      return {in, taps, random(1, 3), far * (taps - 1) / 2 + random(0, 2), far};
    };
    const int64_t groups = plain || random(0, 1) ? 1 : random(1, 4);
    const Shape s = {random(1, 3), groups * random(1, 20), groups * random(1, 40), axis(), axis(),
                     groups};
    if (s.h.in + 2 * s.h.pad <= s.h.dilation * (s.h.taps - 1) ||
        s.w.in + 2 * s.w.pad <= s.w.dilation * (s.w.taps - 1))
      continue;  // the window is larger than the image
    if (s.N * s.K * s.h.out() * s.w.out() * s.C / groups * s.h.taps * s.w.taps > 1000000) continue;
    wrong += every_way(t, s, random(0, 1), ++done / 2);
  }
  return wrong;
}
const Test conv2d_random_test("conv2d_random", conv2d_random);

// NaN and infinity reach the results that meet them, and no zero beside an image does.
int conv2d_not_finite(const cpu::Kernels& t) {
  const Shape shapes[] = {
      {1, 2, 5, {7, 3, 1, 1}, {6, 5, 1, 2}},            // few outputs
      {2, 3, 9, {7, 3, 1, 1}, {6, 5, 1, 2}},            // taps that are joined in a sum,
      {1, 9, 11, {5, 3, 1, 1}, {20, 3, 1, 1}},          // and those that are not
      {1, 4, 9, {9, 3, 2, 2}, {8, 3, 2, 1}},            // strided
      {1, 4, 40, {9, 3, 1, 2, 2}, {8, 3, 1, 2, 2}, 2},  // dilated, in groups
      {1, 12, 6, {9, 2, 3, 8, 11}, {17, 2, 4, 3, 12}},  // taps apart
      {1, 2, 2, {3, 3, 1, 5}, {3, 3, 1, 5}},            // windows outside
      {1, 35, 35, {9, 5, 1, 2}, {8, 5, 1, 2}, 35},      // depthwise
      {2, 6, 9, {9, 3, 2, 1}, {8, 3, 2, 1}, 3},         // and nearly
      {1, 2, 9, {150, 3, 1, 2}, {30, 3, 1, 1}},         // several blocks
      {1, 16, 1, {6, 5}, {6, 5}},                       // scattered
  };
  Random random;
  int wrong = 0;
  for (const Shape& s : shapes)
    for (int i = 0; i < 24; ++i) {
      const auto& wanted = s.groups != 1 && i % 8 >= 2 ? t.depthwise
                           : i % 4 < 2                 ? t.small_k
                                                       : t.scatter;
      const Way way = {wanted, t.direct};
      Case<float> c(s, i % 2);
      Buffer<float>& some = i % 3 == 0 ? c.x : i % 3 == 1 ? c.weight : c.grad_y;
      some[random(0, some.size() - 1)] = i % 5 ? NAN : INFINITY;
      const int y = forward(way, c, i / 3 % 2), g = gradients(way, c);
      if (y + g)
        std::printf("not finite: C=%ld K=%ld H=%ld W=%ld i=%d: %d, gradients %d\n", long(s.C),
                    long(s.K), long(c.H), long(c.W), i, y, g);
      wrong += y + g;
    }
  return wrong;
}
const Test conv2d_not_finite_test("conv2d_not_finite", conv2d_not_finite);

int conv2d(const cpu::Kernels& t) {
  const Shape shapes[] = {
      {1, 1, 1, {1, 1}, {1, 1}},
      {2, 3, 4, {5, 3, 1, 1}, {7, 3, 1, 1}},
      {1, 17, 33, {4, 3, 1, 1}, {19, 3, 1, 1}},
      {3, 1, 16, {9, 3, 1, 1}, {9, 3, 1, 1}},
      {2, 15, 17, {1, 1}, {210, 1}},
      {2, 4, 5, {11, 3, 2, 1}, {13, 3, 2, 1}},
      {1, 5, 7, {9, 2, 1, 3, 2}, {10, 2, 1, 3, 2}},
      {1, 2, 2, {3, 3, 1, 5}, {3, 3, 1, 5}},
      {2, 33, 3, {5, 3, 3, 2, 2}, {5, 3, 3, 2, 2}},
      {2, 9, 34, {8, 1, 2}, {9, 1, 3}},                 // taps apart: wide strides
      {1, 4, 3, {30, 2, 1, 0, 20}, {41, 3, 2, 9, 20}},  // and dilations
      {1, 3, 6, {9, 2, 3, 8, 11}, {17, 2, 4, 3, 12}},   // and the gradients of both
      {1, 24, 60, {6, 3, 1, 1}, {5, 3, 2, 1}, 3},
      {2, 18, 18, {7, 3, 2, 1}, {6, 5, 1, 2}, 18},
      {1, 6, 2, {40, 5, 1, 2}, {300, 5, 1, 2}},  // several blocks each way
      {9, 3, 5, {9, 3, 1, 1}, {10, 3, 1, 0}},    // several batches of blocks
      {1, 2, 9, {150, 3, 1, 2}, {30, 3, 1, 1}},
      {1, 1, 2, {6, 3, 1, 0}, {150, 3, 1, 2}},
      {1, 131, 65, {4, 3, 1, 1}, {3, 3, 1, 2}},
      {2, 16, 32, {1, 3, 1, 1}, {1, 3, 1, 2}},
      {1, 7, 16, {2, 3, 1, 2}, {3, 3, 1, 0}},
      {1, 32, 15, {33, 3, 1, 1}, {1, 3, 1, 1}},
      {1, 4, 8, {5, 3, 1, 1}, {102, 3, 1, 1}},          // an odd number of tiles
      {1, 16, 4, {32, 3, 1, 5, 5}, {100, 3, 1, 5, 5}},  // a last block less than a dilation
      {2, 6, 16, {14, 5}, {14, 5}},                     // few channels, their gradient scattered,
      {1, 3, 20, {70, 5}, {30, 5, 1, 1}},               // in several blocks,
      {1, 7, 19, {11, 3, 1, 0, 2}, {12, 4}},            // and dilated,
      {1, 17, 3, {5, 4, 1, 6}, {4, 2, 1, 7}},           // or themselves, far into the padding
  };
  int wrong = 0;
  int64_t index = 0;
  for (const Shape& s : shapes)
    for (const bool last : {false, true}) wrong += every_way(t, s, last, index++ / 2 + last);
  Buffer<float> x(3 * 67, 1), y(67);
  t.sum_rows(x.data(), 3, 67, y.data(), 0, 67);
  for (int64_t i = 0; i < 67; ++i) wrong += y[i] != (x[i] + x[67 + i]) + x[134 + i];
  return wrong;
}
const Test conv2d_test("conv2d", conv2d);

// Which algorithm is taken for which shape.
int conv2d_choice(const cpu::Kernels& t) {
  using enum cpu::Conv2dForce;
  const auto choose = [&](const Shape& s, bool exact, cpu::Conv2dForce force) {
    return &cpu::choose_conv2d(t, s.N, Case<float>(s, false).forward(), exact, force);
  };
  const Shape large = {8, 64, 64, {56, 3, 1, 1}, {56, 3, 1, 1}},
              small = {1, 64, 64, {4, 3}, {4, 3}};
  const Shape strided = {8, 64, 64, {56, 3, 2, 1}, {56, 3, 2, 1}};
  const Shape depthwise = {2, 64, 64, {14, 3, 1, 1}, {14, 3, 1, 1}, 64};
  const Shape groups = {2, 64, 64, {14, 3, 1, 1}, {14, 3, 1, 1}, 2};
  const Shape few = {2, 3, 4, {14, 3, 1, 1}, {14, 3, 1, 1}};
  const Shape far = {2, 16, 4, {6, 5, 1, 4}, {6, 5, 1, 4}};
  return (choose(large, false, kAny) != &t.winograd_4x4) +
         (choose(large, true, kAny) != &t.direct) +
         (choose(large, true, kWinograd2x2) != &t.winograd_2x2) +
         (choose(large, false, kDirect) != &t.direct) +
         (choose(small, false, kAny) != &t.winograd_2x2) +
         (choose(strided, false, kWinograd4x4) != &t.direct) +
         (choose(depthwise, false, kAny) != &t.depthwise) +
         (choose(depthwise, false, kDirect) != &t.direct) +
         (choose(groups, false, kAny) != &t.direct) + (choose(few, false, kAny) != &t.small_k) +
         (choose(far, false, kAny) != &t.scatter);
}
const Test conv2d_choice_test("conv2d_choice", conv2d_choice);

}  // namespace
