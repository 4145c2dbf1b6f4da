#include "kernels_test.h"

using namespace dlkernels;
using namespace dlkernels::test;

// One element in double; NaN where the kernel must give NaN.
static void expect(const cpu::AdamTensor& t, double& p, double& g, double& m, double& v) {
  if (t.unscaled) g /= t.grad_scale;
  const double step = t.sign * g + (t.weight_decay != 0 ? t.weight_decay * p : 0);
  m += t.one_minus_beta1 * (step - m);
  v = t.beta2 * v + t.one_minus_beta2 * step * step;
  p = t.shrink * p - t.step_size * m / (std::sqrt(v) * t.rsqrt_bias + t.eps);
}

static int run(const cpu::Kernels& table, const cpu::AdamTensor& scalars, bool unscale, int64_t n,
               int64_t begin, int64_t end) {
  Buffer<float> p(n, 1), g(n, 2), m(n, 3), v(n, 4), p0(n, 1), g0(n, 2), m0(n, 3), v0(n, 4);
  for (int64_t i = 0; i < n; ++i) v[i] = v0[i] = std::fabs(v[i]);
  cpu::AdamTensor t = scalars;
  t.param = p.data(), t.exp_avg = m.data(), t.exp_avg_sq = v.data(), t.grad = g.data();
  t.unscaled = unscale ? g.data() : nullptr;
  const int64_t middle = begin + (end - begin) / 3;
  together([&] { table.adam(t, begin, middle); }, [&] { table.adam(t, middle, end); });
  int wrong = 0;
  for (int64_t i = 0; i < n; ++i) {
    double pi = p0[i], gi = g0[i], mi = m0[i], vi = v0[i];
    if (i >= begin && i < end) expect(t, pi, gi, mi, vi);
    wrong += !close(p[i], pi, 1e-6 * (1 + std::fabs(pi))) || !close(g[i], gi, 1e-6);
    wrong += !close(m[i], mi, 1e-6) || !close(v[i], vi, 1e-6);
  }
  return wrong;
}

static int adam(const cpu::Kernels& table) {
  cpu::AdamTensor plain = {};
  plain.grad_scale = plain.sign = plain.shrink = 1;
  plain.one_minus_beta1 = 0.1f, plain.beta2 = 0.999f, plain.one_minus_beta2 = 0.001f;
  plain.eps = 1e-8f, plain.rsqrt_bias = 30, plain.step_size = 0.01f;
  cpu::AdamTensor other = plain;
  other.grad_scale = 3, other.sign = -1, other.weight_decay = 0.1f, other.shrink = 0.9f;
  other.one_minus_beta1 = 1, other.beta2 = 0, other.one_minus_beta2 = 1;
  int wrong = 0;
  for (int64_t n = 0; n <= 67; ++n) {
    wrong += run(table, plain, false, n, 0, n) + run(table, other, true, n, 0, n);
    wrong += run(table, other, false, n, n / 3, n - n / 5);
  }
  Random random;
  for (int i = 0; i < random_cases; ++i) {
    const int64_t n = random(0, 5000), begin = random(0, n);
    wrong += run(table, random(0, 1) ? plain : other, random(0, 1), n, begin, random(begin, n));
  }
  return wrong;
}
static const Test adam_test("adam", adam);

// A square that has overflowed freezes its element; an infinite parameter stays what it is.
static int adam_extremes(const cpu::Kernels& table) {
  Buffer<float> p(17), g(17), m(17), v(17);
  p.fill(1), g.fill(1e30f), m.fill(0), v.fill(INFINITY);
  cpu::AdamTensor t = {};
  t.param = p.data(), t.exp_avg = m.data(), t.exp_avg_sq = v.data(), t.grad = g.data();
  t.sign = t.shrink = t.rsqrt_bias = t.one_minus_beta1 = 1;
  t.beta2 = 0.5f, t.one_minus_beta2 = 0.5f, t.step_size = 1;
  table.adam(t, 0, 17);
  int wrong = 0;
  for (int64_t i = 0; i < 17; ++i) wrong += p[i] != 1 || m[i] != 1e30f || v[i] != INFINITY;
  p.fill(INFINITY), g.fill(0), m.fill(0), v.fill(1);
  table.adam(t, 0, 17);
  for (int64_t i = 0; i < 17; ++i) wrong += p[i] != INFINITY || m[i] != 0 || v[i] != 0.5f;
  return wrong;
}
static const Test adam_extremes_test("adam_extremes", adam_extremes);
