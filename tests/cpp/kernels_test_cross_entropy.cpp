#include "kernels_test.h"

using namespace dlkernels;
using namespace dlkernels::test;

namespace {

constexpr int64_t kIgnored = 1000000;

struct Options {
  bool classes, weighted, losses, grad;
  float smoothing, spread;  // spread: the logits lie in [-spread, spread)
};

// Logits with the second row ignored, and everything the kernel can be told.
struct Case {
  int64_t N, C, inner;  // N rows in all
  Options o;
  Buffer<float> x, probabilities, weight, losses, grad;
  Buffer<int64_t> target;
  cpu::CrossEntropy args;

  Case(int64_t N, int64_t C, const Options& o, int64_t inner = 1)
      : N(N),
        C(C),
        inner(inner),
        o(o),
        x(N * C, 1),
        probabilities(o.classes ? 0 : N * C, 2),
        weight(o.weighted ? C : 0, 3),
        losses(o.losses ? N : 0),
        grad(o.grad ? N * C : 0),
        target(o.classes ? N : 0) {
    for (int64_t i = 0; i < N * C; ++i) x[i] *= o.spread;
    double sum = o.weighted ? 0 : static_cast<double>(C);
    for (int64_t c = 0; c < weight.size(); ++c) sum += weight[c] = std::fabs(weight[c]);
    for (int64_t n = 0; n < target.size(); ++n) target[n] = n == 1 ? kIgnored : n * 7 % C;
    args = {.x = x.data(),
            .target = o.classes ? target.data() : nullptr,
            .probabilities = probabilities.data(),
            .weight = o.weighted ? weight.data() : nullptr,
            .C = C,
            .inner = inner,
            .ignore_index = kIgnored,
            .smoothing = o.smoothing,
            .weight_sum = static_cast<float>(sum),
            .grad_scale = 0.25f,
            .losses = o.losses ? losses.data() : nullptr,
            .grad = o.grad ? grad.data() : nullptr};
  }

  int64_t at(int64_t n, int64_t c) const { return (n / inner * C + c) * inner + n % inner; }

  double g(int64_t n, int64_t c) {
    if (o.classes && target[n] == kIgnored) return 0;
    const double t = o.classes ? target[n] == c : probabilities[at(n, c)];
    return (o.weighted ? weight[c] : 1) * ((1 - o.smoothing) * t + o.smoothing / C);
  }

  // The formulas of the header in double, with the gradient compared on the way.
  double expected_loss(int64_t n, int& wrong) {
    double top = -INFINITY, s = 0, loss = 0, g_sum = 0, size = 0;
    for (int64_t c = 0; c < C; ++c) top = std::fmax(top, x[at(n, c)]);
    for (int64_t c = 0; c < C; ++c) s += std::exp(x[at(n, c)] - top);
    for (int64_t c = 0; c < C; ++c) {
      loss += g(n, c) * (std::log(s) + top - x[at(n, c)]);
      g_sum += g(n, c), size += std::fabs(g(n, c));
    }
    for (int64_t c = 0; c < grad.size() / N; ++c) {
      const double p = std::exp(x[at(n, c)] - top) / s;
      const double expected = args.grad_scale * (p * g_sum - g(n, c));
      wrong += !close(grad[at(n, c)], expected, 1e-6 * size);
    }
    return loss;
  }
};

int run(const cpu::Kernels& table, int64_t N, int64_t C, const Options& o, int64_t inner = 1) {
  Case all(N, C, o, inner);
  double sums[2] = {};
  together([&] { sums[0] = table.cross_entropy(all.args, 0, N / 3); },
           [&] { sums[1] = table.cross_entropy(all.args, N / 3, N); });
  const double sum = sums[0] + sums[1];
  int wrong = 0;
  double total = 0;
  for (int64_t n = 0; n < N; ++n) {
    const double loss = all.expected_loss(n, wrong), size = C * (1 + o.spread);
    if (o.losses) wrong += !close(all.losses[n], loss, 1e-6 * size);
    total += loss;
  }
  return wrong + !close(sum, total, 1e-6 * N * C * (1 + o.spread));
}

int cross_entropy(const cpu::Kernels& table) {
  int wrong = 0;
  for (int64_t C : {1, 2, 3, 4, 5, 7, 8, 9, 10, 15, 16, 17, 31, 33, 64, 67, 1000, 4099})
    for (int options = 0; options < 16; ++options) {
      const bool classes = options & 1, weighted = options & 2, extras = options & 4;
      const float smoothing = options & 8 ? 0.1f : 0.0f;
      for (const float spread : {5.0f, 100.0f})
        for (const int64_t N : {5, 35})  // a part of the rows that fill a vector, and more than one
          if (N * C < 1e5)
            wrong += run(table, N, C, {classes, weighted, extras, extras, smoothing, spread});
    }
  return wrong;
}
const Test cross_entropy_test("cross_entropy", cross_entropy);

// Rows side by side, as in (N, C, d1).
int cross_entropy_inner(const cpu::Kernels& table) {
  int wrong = 0;
  for (const int64_t inner : {2, 3, 4, 8, 16, 21})
    for (int64_t C : {1, 3, 17, 40})
      for (int options = 0; options < 16; ++options) {
        const bool classes = options & 1, weighted = options & 2, extras = options & 4;
        const float smoothing = options & 8 ? 0.1f : 0.0f;
        wrong +=
            run(table, 3 * inner, C, {classes, weighted, extras, extras, smoothing, 5.0f}, inner);
      }
  return wrong;
}
const Test cross_entropy_inner_test("cross_entropy_inner", cross_entropy_inner);

int cross_entropy_random(const cpu::Kernels& table) {
  Random random;
  int wrong = 0;
  for (int i = 0; i < random_cases; ++i) {
    const int64_t C = random(0, 9) ? random(1, 150) : random(1, 20000);
    const int64_t inner = random(0, 1) ? random(1, 40) : 1, most = 40000 / (C * inner);
    const int64_t N = inner * random(1, most < 1 ? 1 : most);
    const Options o = {.classes = random(0, 1) != 0,
                       .weighted = random(0, 1) != 0,
                       .losses = random(0, 1) != 0,
                       .grad = random(0, 1) != 0,
                       .smoothing = random(0, 1) ? 0.1f : 0,
                       .spread = random(0, 1) ? 5.0f : 80.0f};
    const int bad = run(table, N, C, o, inner);
    if (bad)
      std::printf("case %d: N=%ld C=%ld inner=%ld: %d\n", i, long(N), long(C), long(inner), bad);
    wrong += bad;
  }
  return wrong;
}
const Test cross_entropy_random_test("cross_entropy_random", cross_entropy_random);

// Infinities and NaN; a class of probability 0 has gradient 0 exactly.
int cross_entropy_extremes(const cpu::Kernels& table) {
  int wrong = 0;
  for (int64_t C : {3, 10, 16, 21, 70}) {
    const Options o = {.classes = true,
                       .weighted = false,
                       .losses = true,
                       .grad = true,
                       .smoothing = 0,
                       .spread = 5};
    Case all(6, C, o);
    all.target.fill(0);
    const auto row = [&](int64_t n) { return all.x.data() + n * C; };
    row(0)[C - 1] = -INFINITY;
    row(1)[C - 1] = INFINITY;
    row(2)[1] = NAN;
    for (int64_t c = 0; c < C; ++c) row(3)[c] = -INFINITY;
    for (int64_t c = 0; c < C; ++c) row(4)[c] = c ? -3e38f : 3e38f;
    row(5)[C - 1] = NAN, all.target[5] = kIgnored;
    table.cross_entropy(all.args, 0, 6);
    wrong += !std::isfinite(all.losses[0]) || all.grad[C - 1] != 0;
    for (int64_t n : {1, 2, 3}) {
      wrong += !std::isnan(all.losses[n]);
      for (int64_t c = 0; c < C; ++c) wrong += !std::isnan(all.grad[n * C + c]);
    }
    for (int64_t n : {4, 5}) {
      wrong += all.losses[n] != 0;
      for (int64_t c = 0; c < C; ++c) wrong += all.grad[n * C + c] != 0;
    }
  }
  return wrong;
}
const Test cross_entropy_extremes_test("cross_entropy_extremes", cross_entropy_extremes);

int cross_entropy_backward(const cpu::Kernels& table) {
  int wrong = 0;
  for (int64_t C : {1, 3, 16, 17, 70})
    for (const int64_t inner : {1, 2, 18})
      for (const int64_t step : {0, 1})
        for (const float first : {0.5f, INFINITY}) {
          const int64_t N = 3 * inner;
          Buffer<float> grad(N * C, 1), grad_y(step ? N : 1, 2), grad_x(N * C);
          Buffer<int64_t> target(N);
          target.fill(0);
          target[N - 1] = kIgnored;
          const auto at = [&](int64_t n, int64_t c) {
            return (n / inner * C + c) * inner + n % inner;
          };
          for (int64_t c = 0; c < C; ++c) grad[at(N - 1, c)] = 0;
          grad_y[0] = first;
          const cpu::CrossEntropy args = {.x = grad.data(),
                                          .target = target.data(),
                                          .C = C,
                                          .inner = inner,
                                          .ignore_index = kIgnored,
                                          .grad = grad_x.data()};
          together([&] { table.cross_entropy_backward(args, grad_y.data(), step, 0, 2); },
                   [&] { table.cross_entropy_backward(args, grad_y.data(), step, 2, N); });
          for (int64_t n = 0; n < N; ++n)
            for (int64_t c = 0; c < C; ++c) {
              const float expected = n == N - 1 ? 0 : grad[at(n, c)] * grad_y[n * step];
              wrong += grad_x[at(n, c)] != expected;
            }
        }
  return wrong;
}
const Test cross_entropy_backward_test("cross_entropy_backward", cross_entropy_backward);

}  // namespace
