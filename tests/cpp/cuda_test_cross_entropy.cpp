// cross_entropy both ways against double: each way to lay rows on threads, all that it can be told.
#include "cuda_test.h"

#include "cuda/cross_entropy.cu"

namespace dlkernels::test {
namespace {

using cuda::Reduction;

constexpr int64_t kIgnored = 1000000;

struct Options {
  bool classes, weighted, grad;
  float smoothing;
  Reduction reduction = Reduction::kMean;
  int64_t skip = 0;            // elements from where x and grad are aligned
  bool apart = false;          // grad lies elsewhere between 16 bytes than x
  bool ignores_class = false;  // ignore_index is in [0, C)
};

// Logits with the second row ignored, and everything the kernel can be told.
template <class T>
struct Case {
  int64_t N, C, inner;  // N rows in all
  Options o;
  int64_t ignore_index;
  CudaBuffer<T> x, probabilities, weight, loss, grad;
  Buffer<int64_t> target;
  Buffer<int> no_class;
  cuda::CrossEntropy args;

  Case(int64_t N, int64_t C, const Options& o, int64_t inner = 1)
      : N(N),
        C(C),
        inner(inner),
        o(o),
        ignore_index(o.ignores_class ? C / 2 : kIgnored),
        x(N * C + o.skip, 1),
        probabilities(o.classes ? 0 : N * C + o.skip, 2),
        weight(o.weighted ? C : 0, 3),
        loss(o.reduction == Reduction::kNone ? N : 1),
        grad(o.grad ? N * C + o.skip + o.apart : 0),
        target(o.classes ? N : 0),
        no_class(1) {
    for (int64_t i = 0; i < x.size(); ++i)
      x[i] = cuda::from_float<T>(static_cast<float>(x.at(i) * 8));
    for (int64_t i = 0; i < weight.size(); ++i)
      weight[i] = cuda::from_float<T>(std::fabs(cuda::to_float(weight[i])));
    for (int64_t n = 0; n < target.size(); ++n) target[n] = n == 1 ? ignore_index : n * 7 % C;
    no_class[0] = 0;
    args = {.x = x.data() + o.skip,
            .target = o.classes ? target.data() : nullptr,
            .probabilities = probabilities.data() + o.skip,
            .weight = o.weighted ? weight.data() : nullptr,
            .rows = N,
            .C = C,
            .inner = inner,
            .ignore_index = ignore_index,
            .smoothing = o.smoothing,
            .reduction = o.reduction,
            .loss = loss.data(),
            .grad = o.grad ? grad.data() + o.skip + o.apart : nullptr,
            .no_class = no_class.data()};
  }

  int run() {
    const int64_t floats = cuda::cross_entropy_workspace(N, C, inner);
    Buffer<float> workspace(floats);
    workspace.fill(NAN);
    return cuda::cross_entropy(kDType<T>, args, workspace.data(), nullptr) != 0;
  }

  int64_t at(int64_t n, int64_t c) const { return (n / inner * C + c) * inner + n % inner; }
  double x_at(int64_t n, int64_t c) { return x.at(o.skip + at(n, c)); }
  double grad_at(int64_t n, int64_t c) { return grad.at(o.skip + o.apart + at(n, c)); }
  double weight_at(int64_t c) { return o.weighted ? weight.at(c) : 1; }
  bool ignored(int64_t n) { return o.classes && target[n] == ignore_index; }

  double g(int64_t n, int64_t c) {
    if (ignored(n)) return 0;
    const double t = o.classes ? target[n] == c : probabilities.at(o.skip + at(n, c));
    return weight_at(c) * ((1 - o.smoothing) * t + o.smoothing / C);
  }
  double divisor() {
    if (o.reduction != Reduction::kMean) return 1;
    double sum = 0;
    for (int64_t n = 0; n < N; ++n) sum += !o.classes ? 1 : ignored(n) ? 0 : weight_at(target[n]);
    return sum;
  }

  // The formulas of the header in double.
  int wrong() {
    int wrong = 0;
    double total = 0, total_size = 0;
    const double scale = 1 / divisor(), eps = kEps<T> + 1e-6;
    for (int64_t n = 0; n < N; ++n) {
      double top = -INFINITY, s = 0, row = 0, g_sum = 0, size = 0, loss_size = 0;
      for (int64_t c = 0; c < C; ++c) top = std::fmax(top, x_at(n, c));
      for (int64_t c = 0; c < C; ++c) s += std::exp(x_at(n, c) - top);
      for (int64_t c = 0; c < C; ++c) {
        const double of_class = g(n, c) * (std::log(s) + top - x_at(n, c));
        row += of_class, loss_size += std::fabs(of_class);
        g_sum += g(n, c), size += std::fabs(g(n, c));
      }
      for (int64_t c = 0; o.grad && c < C; ++c) {
        const double p = std::exp(x_at(n, c) - top) / s, got = grad_at(n, c);
        wrong += !close(got, scale * (p * g_sum - g(n, c)), 2 * eps * scale * size + 1e-7 * scale);
      }
      if (o.reduction == Reduction::kNone)
        wrong += !close(loss.at(n), row, 2 * eps * (loss_size + size));
      total += row, total_size += loss_size + size;
    }
    if (o.reduction != Reduction::kNone)
      wrong += !close(loss.at(0), scale * total, 2 * eps * scale * total_size);
    for (int64_t i = 0; o.grad && i < o.skip + o.apart; ++i) wrong += !std::isnan(grad.at(i));
    return wrong + no_class[0];
  }
};

template <class T>
int run(int64_t N, int64_t C, const Options& o, int64_t inner = 1) {
  Case<T> all(N, C, o, inner);
  const int wrong = all.run() + all.wrong();
  if (wrong)
    std::printf(
        "%ld rows, C %ld, inner %ld, classes %d, weighted %d, smoothing %g, reduction %d, "
        "skip %ld, apart %d, ignores a class %d: %d\n",
        long(N), long(C), long(inner), o.classes, o.weighted, o.smoothing,
        static_cast<int>(o.reduction), long(o.skip), o.apart, o.ignores_class, wrong);
  return wrong;
}

// Every option once, on rows of C classes.
template <class T>
int options(int64_t N, int64_t C, int64_t inner = 1) {
  int wrong = 0;
  for (int i = 0; i < 16; ++i) {
    Options o = {bool(i & 1), bool(i & 2), bool(i & 4), i & 8 ? 0.1f : 0};
    o.reduction = static_cast<Reduction>((i + C) % 3), o.skip = i % 5, o.apart = i % 8 == 7;
    o.ignores_class = o.classes && C > 1 && o.reduction == Reduction::kMean;
    wrong += run<T>(N, C, o, inner);
  }
  return wrong;
}

// Lanes: 1 to 32 of a warp, whole packs and parts of them.
const CudaTest lanes_test("cross_entropy, lanes", [] {
  int wrong = options<float>(130, 3) + options<cuda::bf16>(9, 10) + options<cuda::half>(3, 33);
  for (const int64_t C : {1, 5, 16, 70}) wrong += options<float>(3, C);
  const Options plain = {true, false, true, 0, Reduction::kMean};
  wrong += run<float>(40, 10, plain) + run<float>(6, 1000, plain) + run<float>(4200, 1, plain);
  return wrong + run<cuda::bf16>(6, 1000, plain) + run<cuda::half>(17, 64, plain);
});

// A block a row; more classes than shared memory keeps.
const CudaTest block_test("cross_entropy, blocks", [] {
  int wrong = 0;
  for (const Reduction r : {Reduction::kNone, Reduction::kMean, Reduction::kSum}) {
    wrong += run<float>(3, 1030, {true, true, true, 0, r, 1}) +
             run<cuda::bf16>(3, 2100, {true, false, true, 0.1f, r, 3}) +
             run<cuda::half>(3, 2100, {false, true, true, 0.1f, r, 0, true});
  }
  return wrong + run<float>(1, 24'701, {true, false, true, 0.1f, Reduction::kSum, 2});
});

// Rows side by side, as in (N, C, d1).
const CudaTest columns_test("cross_entropy, columns", [] {
  int wrong = options<float>(3 * 21, 3, 21) + options<cuda::bf16>(2 * 4, 40, 4);
  wrong += options<cuda::half>(2 * 3, 20, 3);
  const Options plain = {true, false, true, 0, Reduction::kMean};
  return wrong + run<float>(2 * 150, 5, plain, 150) + run<float>(2 * 17, 330, plain, 17);
});

// Infinities, NaN, targets that are no class; a class of probability 0 has gradient 0 exactly.
const CudaTest extremes_test("cross_entropy's extremes", [] {
  int wrong = 0;
  for (const int64_t inner : {1, 7})
    for (const int64_t C : {3, 70, 1100}) {
      if (inner > 1 && C > 70) continue;
      Case<float> all(7, C, {true, false, true, 0, Reduction::kNone}, inner);
      all.target.fill(0);
      const auto x = [&](int64_t n, int64_t c) -> float& { return all.x[all.at(n, c)]; };
      const auto all_grads = [&](int64_t n, auto f) {
        for (int64_t c = 0; c < C; ++c) wrong += !f(all.grad_at(n, c));
      };
      x(0, C - 1) = -INFINITY, x(1, C - 1) = INFINITY, x(2, 1) = NAN;
      for (int64_t c = 0; c < C; ++c) x(3, c) = -INFINITY;
      for (int64_t c = 0; c < C; ++c) x(4, c) = c ? -3e38f : 3e38f;
      x(5, C - 1) = NAN, all.target[5] = kIgnored;
      wrong += all.run() + all.no_class[0];
      wrong += !std::isfinite(all.loss[0]) || all.grad_at(0, C - 1) != 0;
      for (const int64_t n : {1, 2, 3}) {
        wrong += !std::isnan(all.loss[n]);
        all_grads(n, [](double g) { return std::isnan(g); });
      }
      for (const int64_t n : {4, 5}) {
        wrong += all.loss[n] != 0;
        all_grads(n, [](double g) { return g == 0; });
      }
      for (const int64_t bad : {int64_t{-1}, C}) {
        all.no_class[0] = 0, all.target[6] = bad;
        wrong += all.run() + (all.no_class[0] != 1) + !std::isnan(all.loss[6]);
        all_grads(6, [](double g) { return std::isnan(g); });
        wrong += !std::isfinite(all.loss[0]);
      }
    }
  for (const Reduction r : {Reduction::kMean, Reduction::kSum}) {
    Case<float> none(0, 3, {true, false, true, 0, r}), ignored(3, 3, {true, false, true, 0, r});
    ignored.target.fill(kIgnored);
    wrong += none.run() + ignored.run();
    for (const float loss : {none.loss[0], ignored.loss[0]})
      wrong += r == Reduction::kMean ? !std::isnan(loss) : loss != 0;
    for (int64_t i = 0; i < 9; ++i) wrong += ignored.grad[i] != 0;
    Case<float> bad(3, 5, {true, false, true, 0, r});
    bad.target[2] = r == Reduction::kMean ? INT64_MAX : INT64_MIN;
    wrong += bad.run() + !std::isnan(bad.loss[0]) + (bad.no_class[0] != 1);
    for (int64_t c = 0; c < 5; ++c) wrong += std::isnan(bad.grad[c]) + (bad.grad[5 + c] != 0);
  }
  return wrong;
});

template <class T>
int backward(int64_t C, int64_t inner, int64_t step, float first, bool in_place) {
  const int64_t N = 3 * inner;
  Case<T> all(N, C, {true, false, true, 0, Reduction::kNone}, inner);
  CudaBuffer<T> grad_y(step ? N : 1, 2), before(N * C, 1);
  grad_y[0] = cuda::from_float<T>(first);
  for (int64_t i = 0; i < N * C; ++i) before[i] = all.x[i];
  all.target[N - 1] = kIgnored;
  if (in_place) all.args.grad = all.x.data();
  T* grad = static_cast<T*>(all.args.grad);
  int wrong = cuda::cross_entropy_backward(kDType<T>, all.args, grad_y.data(), step, nullptr);
  for (int64_t n = 0; n < N; ++n)
    for (int64_t c = 0; c < C; ++c) {
      const int64_t i = all.at(n, c);
      const float product = cuda::to_float(before[i]) * cuda::to_float(grad_y[n * step]);
      const bool kept = in_place && step == 0 && first == 1;
      const float expected = kept ? cuda::to_float(before[i]) : all.ignored(n) ? 0 : product;
      wrong += !close(cuda::to_float(grad[i]), cuda::to_float(cuda::from_float<T>(expected)), 0);
    }
  return wrong;
}

const CudaTest backward_test("cross_entropy_backward", [] {
  int wrong = 0;
  for (const int64_t inner : {1, 18})
    for (const int64_t C : {3, 17, 1100})
      for (const int64_t step : {0, 1})
        for (const float first : {0.5f, 1.0f, INFINITY})
          if (C < 100 || (inner == 1 && first == 0.5f))
            wrong += backward<float>(C, inner, step, first, true) +
                     backward<float>(C, inner, step, first, false) +
                     backward<cuda::bf16>(C, inner, step, first, first == 1);
  return wrong + backward<cuda::half>(17, 1, 1, 2, false);
});

// What no test can run: every row and class has its place, and a block's shared memory is enough.
const CudaTest plan_test("cross_entropy's plans", [] {
  int wrong = 0;
  for (const int bytes : {2, 4})
    for (const int64_t inner : {int64_t{1}, int64_t{2}, int64_t{1} << 40})
      for (const int64_t C : {int64_t{1}, int64_t{16}, int64_t{1000}, int64_t{50257},
                              int64_t{1} << 20, cuda::kMaxClasses}) {
        const cuda::Plan p = cuda::plan_of(C, inner, bytes);
        wrong += p.threads != p.members * p.rows_a_block || p.shared > 99 << 10 || p.cached < 0;
        const int64_t rows = int64_t{1} << 33;
        wrong += cuda::blocks_of(p, rows) * p.rows_a_block < rows;
      }
  return wrong;
});

}  // namespace
}  // namespace dlkernels::test
