#include <array>

#include "kernels_test.h"

using namespace dlkernels;
using namespace dlkernels::test;

// One element in double, and the kernel's scalars beside the formula on them: what the frame does
// to the gradient is worked out in expect().
struct Element {
  double p, g;
  std::array<double, 3> state;
};

static double mix(double a, double b, double w) { return a + w * (b - a); }

template <class Scalars>
using Formula = void (*)(const Scalars&, Element&);

static void sgd_step(const cpu::SgdScalars& s, Element& e) {
  double& b = e.state[0];
  b = s.is_first_step ? e.g : s.momentum * b + s.one_minus_dampening * e.g;
  e.p -= s.lr * (s.nesterov ? e.g + s.momentum * b : b);
}

static void plain_sgd_step(const cpu::SgdScalars& s, Element& e) { e.p -= s.lr * e.g; }

static void adam_step(const cpu::AdamScalars& s, Element& e) {
  auto& [m, v, _] = e.state;
  m = mix(m, e.g, s.one_minus_beta1);
  v = s.beta2 * v + s.one_minus_beta2 * e.g * e.g;
  e.p = s.shrink * e.p - s.step_size * m / (std::sqrt(v) * s.rsqrt_bias + s.eps);
}

static void adagrad_step(const cpu::AdagradScalars& s, Element& e) {
  e.state[0] += e.g * e.g;
  e.p -= s.step_size * e.g / (std::sqrt(e.state[0]) + s.eps);
}

static void adadelta_step(const cpu::AdadeltaScalars& s, Element& e) {
  auto& [square_avg, acc_delta, _] = e.state;
  square_avg = s.rho * square_avg + s.one_minus_rho * e.g * e.g;
  const double delta = std::sqrt((acc_delta + s.eps) / (square_avg + s.eps)) * e.g;
  acc_delta = s.rho * acc_delta + s.one_minus_rho * delta * delta;
  e.p -= s.lr * delta;
}

template <bool kCentered, bool kMomentum>
static void rmsprop_step(const cpu::RmspropScalars& s, Element& e) {
  auto& [square_avg, grad_avg, buffer] = e.state;
  square_avg = s.alpha * square_avg + s.one_minus_alpha * e.g * e.g;
  if (kCentered) grad_avg = mix(grad_avg, e.g, s.one_minus_alpha);
  const double variance = square_avg - (kCentered ? grad_avg * grad_avg : 0);
  const double step = e.g / (std::sqrt(variance) + s.eps);
  if (kMomentum) buffer = s.momentum * buffer + step;
  e.p -= s.lr * (kMomentum ? buffer : step);
}

// A kernel, the formula, and which states it has.
template <class Scalars>
struct Case {
  cpu::OptimKernel<Scalars>* kernel;
  Formula<Scalars> formula;
  std::array<bool, 3> used;
};

template <class Scalars>
static int run(const Case<Scalars>& c, const Scalars& scalars, const cpu::OptimTensor& common,
               bool unscale, int64_t n, int64_t begin, int64_t end) {
  Buffer<float> p(n, 1), g(n, 2), p0(n, 1), g0(n, 2);
  Buffer<float> s0(n, 3), s1(n, 4), s2(n, 5), t0(n, 3), t1(n, 4), t2(n, 5);
  Buffer<float>*const states[] = {&s0, &s1, &s2}, *const before[] = {&t0, &t1, &t2};
  cpu::OptimTensor t = common;
  t.param = p.data(), t.grad = g.data(), t.unscaled = unscale ? g.data() : nullptr;
  for (int k = 0; k < 3; ++k) {
    t.state[k] = c.used[k] ? states[k]->data() : nullptr;
    // Squares, and means whose squares are less: each state serves as either.
    for (int64_t i = 0; i < n; ++i)
      for (auto* state : {states[k], before[k]})
        (*state)[i] = k == 0 ? 1 + std::fabs((*state)[i]) : 0.5f * std::fabs((*state)[i]);
  }
  const int64_t middle = begin + (end - begin) / 3;
  together([&] { c.kernel(t, scalars, begin, middle); },
           [&] { c.kernel(t, scalars, middle, end); });
  int wrong = 0;
  for (int64_t i = 0; i < n; ++i) {
    Element e = {p0[i], g0[i], {t0[i], t1[i], t2[i]}};
    double unscaled = e.g;
    if (i >= begin && i < end) {
      if (unscale) unscaled = e.g /= t.grad_scale;
      e.g = t.sign * e.g + t.weight_decay * e.p;
      c.formula(scalars, e);
    }
    wrong += !close(p[i], e.p, 2e-6 * (1 + std::fabs(e.p))) || !close(g[i], unscaled, 1e-6);
    for (int k = 0; k < 3; ++k)
      wrong += !close((*states[k])[i], e.state[k], 1e-6 * (1 + std::fabs(e.state[k])));
  }
  return wrong;
}

template <class Scalars>
static int run_all(const Case<Scalars>& c, const Scalars& scalars) {
  cpu::OptimTensor plain = {};
  plain.grad_scale = plain.sign = 1;
  cpu::OptimTensor other = {};
  other.grad_scale = 3, other.sign = -1, other.weight_decay = 0.1f;
  int wrong = 0;
  for (int64_t n = 0; n <= 67; ++n) {
    wrong += run(c, scalars, plain, false, n, 0, n) + run(c, scalars, other, true, n, 0, n);
    wrong += run(c, scalars, other, false, n, n / 3, n - n / 5);
  }
  Random random;
  for (int i = 0; i < random_cases; ++i) {
    const int64_t n = random(0, 5000), begin = random(0, n), end = random(begin, n);
    wrong += run(c, scalars, random(0, 1) ? plain : other, random(0, 1), n, begin, end);
  }
  return wrong;
}

static int sgd(const cpu::Kernels& table) {
  const Case<cpu::SgdScalars> momentum{table.sgd, sgd_step, {true}};
  const Case<cpu::SgdScalars> plain{table.sgd, plain_sgd_step, {}};
  return run_all(momentum, {0.1f, 0.9f, 0.7f, false, false}) +
         run_all(momentum, {0.1f, 0.9f, 1, true, false}) +
         run_all(momentum, {0.1f, 0.9f, 0.7f, false, true}) +
         run_all(plain, {0.1f, 0, 0, false, false});
}
static const Test sgd_test("sgd", sgd);

static int adam(const cpu::Kernels& table) {
  const Case<cpu::AdamScalars> c{table.adam, adam_step, {true, true}};
  return run_all(c, {0.1f, 0.999f, 0.001f, 1e-8f, 1, 30, 0.01f}) +
         run_all(c, {0.6f, 0.9f, 0.1f, 1e-8f, 0.9f, 2, 0.01f}) +
         run_all(c, {1, 0, 1, 1e-8f, 0.9f, 30, 0.01f});
}
static const Test adam_test("adam", adam);

static int adagrad(const cpu::Kernels& table) {
  return run_all<cpu::AdagradScalars>({table.adagrad, adagrad_step, {true}}, {0.1f, 1e-10f});
}
static const Test adagrad_test("adagrad", adagrad);

static int adadelta(const cpu::Kernels& table) {
  const Case<cpu::AdadeltaScalars> c{table.adadelta, adadelta_step, {true, true}};
  return run_all(c, {1, 0.9f, 0.1f, 1e-6f}) + run_all(c, {0.1f, 0, 1, 1e-3f});
}
static const Test adadelta_test("adadelta", adadelta);

static int rmsprop(const cpu::Kernels& table) {
  using C = Case<cpu::RmspropScalars>;
  const cpu::RmspropScalars s = {0.1f, 0.9f, 0.1f, 1e-8f, 0.5f};
  return run_all(C{table.rmsprop, rmsprop_step<false, false>, {true}}, s) +
         run_all(C{table.rmsprop, rmsprop_step<true, false>, {true, true}}, s) +
         run_all(C{table.rmsprop, rmsprop_step<false, true>, {true, false, true}}, s) +
         run_all(C{table.rmsprop, rmsprop_step<true, true>, {true, true, true}}, s);
}
static const Test rmsprop_test("rmsprop", rmsprop);

// A square that has overflowed freezes its element; an infinite parameter stays what it is.
static int adam_extremes(const cpu::Kernels& table) {
  Buffer<float> p(17), g(17), m(17), v(17);
  p.fill(1), g.fill(1e30f), m.fill(0), v.fill(INFINITY);
  cpu::OptimTensor t = {};
  t.param = p.data(), t.grad = g.data(), t.state[0] = m.data(), t.state[1] = v.data();
  t.sign = 1;
  cpu::AdamScalars s = {};
  s.shrink = s.rsqrt_bias = s.one_minus_beta1 = 1;
  s.beta2 = 0.5f, s.one_minus_beta2 = 0.5f, s.step_size = 1;
  table.adam(t, s, 0, 17);
  int wrong = 0;
  for (int64_t i = 0; i < 17; ++i) wrong += p[i] != 1 || m[i] != 1e30f || v[i] != INFINITY;
  p.fill(INFINITY), g.fill(0), m.fill(0), v.fill(1);
  table.adam(t, s, 0, 17);
  for (int64_t i = 0; i < 17; ++i) wrong += p[i] != INFINITY || m[i] != 0 || v[i] != 0.5f;
  return wrong;
}
static const Test adam_extremes_test("adam_extremes", adam_extremes);
