// p[n, c] = exp(x[n, c] - top) / s, top = max_c x[n, c], s = sum_c exp(x[n, c] - top)
// g[n, c] = weight[c] * ((1 - smoothing) * t[n, c] + smoothing / C), t the target's one-hot row or
// the probabilities; 0 for a row whose target is ignore_index. Its gradient is 0, whatever it
// holds; in (N, C, inner) with inner > 1 it is 0 * p, NaN where PyTorch's is.
// loss[n] = -sum_c g[n, c] * log p[n, c] = sum_c g[n, c] * (log s + top - x[n, c])
// grad[n, c] = grad_scale * (p[n, c] * sum_c g[n, c] - g[n, c])
//
// All of a row is done while it is in cache: grad holds the exponentials in between.
#pragma once
#include "cpu/simd/vec.h"
#include "cpu/gemm/pack.inl.h"
#include "cpu/simd/exp.inl.h"

namespace dlkernels::cpu {
namespace {

// Of the target, and what every class gets.
static float one_minus_smoothing(const CrossEntropy& a) { return 1 - a.smoothing; }
static float smoothing_per_class(const CrossEntropy& a) {
  return a.smoothing / static_cast<float>(a.C);
}

// The sum of f(c, lanes), whose lanes that are not there must be 0. In blocks, so that rounding
// errors do not pile up along a row of many classes.
template <class F>
static inline float row_sum(int64_t C, const F& f) {
  constexpr int64_t kBlock = 64 * Vec::kWidth;
  Vec total = Vec::zero();
  for (int64_t begin = 0; begin < C; begin += kBlock) {
    Vec block = Vec::zero();
    each_vector(begin, min(C, begin + kBlock),
                [&](int64_t c, int64_t n) { block = block + f(c, n); });
    total = total + block;
  }
  return reduce_sum(total);
}

// The greatest element. NaN counts for nothing here: the exponentials bring it up.
static float row_max(const float* x, int64_t C) {
  constexpr int64_t V = 4;  // one at a time, each maximum would wait for the last
  const Vec none = Vec::fill(-__builtin_inff());
  Vec top[V] = {none, none, none, none};
  int64_t c = 0;
  for (; c + V * Vec::kWidth <= C; c += V * Vec::kWidth)
#pragma GCC unroll 4
    for (int64_t v = 0; v < V; ++v) top[v] = max(Vec::load(x + c + v * Vec::kWidth), top[v]);
  for (; c < C; c += Vec::kWidth)
    top[0] = max(load_or(x + c, min(C - c, Vec::kWidth), none), top[0]);
  return reduce_max(max(max(top[0], top[1]), max(top[2], top[3])));
}

// s, and the exponentials where somebody wants them. Lanes that are not there count as e^-inf = 0.
template <bool kKeep>
static float exp_sum(const float* x, float top, float* e, int64_t C) {
  const Vec none = Vec::fill(-__builtin_inff());
  return row_sum(C, [&](int64_t c, int64_t n) {
    const Vec v = n == Vec::kWidth ? Vec::load(x + c) : load_or(x + c, n, none);
    const Vec ec = exp(v - Vec::fill(top));
    if constexpr (kKeep) store(ec, e + c, n);
    return ec;
  });
}

// What of g a whole row has: all of it for probabilities, the smoothing for a class. Vectors of it
// along a row that begins at element `first`.
struct Spread {
  const CrossEntropy& a;
  int64_t first;

  bool any() const { return !a.target || a.smoothing != 0; }
  Vec at(int64_t c, int64_t n) const {
    Vec g = Vec::fill(smoothing_per_class(a));
    if (!a.target)
      g = fma(Vec::fill(one_minus_smoothing(a)), load(a.probabilities + first + c, n), g);
    return a.weight ? g * load(a.weight + c, n) : g;
  }
  // sum_c g[c], smoothing apart: at() is not 0 in lanes that are not there.
  double sum() const {
    const double smooth = static_cast<double>(smoothing_per_class(a)) * a.weight_sum;
    if (a.target) return smooth;
    const float rest = row_sum(a.C, [&](int64_t c, int64_t n) {
      const Vec p = load(a.probabilities + first + c, n);
      return a.weight ? p * load(a.weight + c, n) : p;
    });
    return smooth + static_cast<double>(one_minus_smoothing(a)) * rest;
  }
  // sum_c g[c] * (top - x[c]); lanes that are not there count as x = top
  float loss(float top) const {
    const Vec tops = Vec::fill(top);
    return row_sum(a.C, [&](int64_t c, int64_t n) {
      const float* x = a.x + first + c;
      return at(c, n) * (tops - (n == Vec::kWidth ? Vec::load(x) : load_or(x, n, tops)));
    });
  }
};

static bool is_ignored(const CrossEntropy& a, int64_t row) {
  return a.target && a.target[row] == a.ignore_index;
}

// The target's own part of g.
static float g_of(const CrossEntropy& a, int64_t t) {
  return a.weight ? one_minus_smoothing(a) * a.weight[t] : one_minus_smoothing(a);
}

// A row whose sums are known: its loss, and its gradient in place of the exponentials.
static double finish_row(const CrossEntropy& a, int64_t row, float top, float s) {
  const int64_t C = a.C, first = row * C;
  const float log_s = __builtin_logf(s);
  double loss = 0, g_sum = 0;
  if (a.target) {
    g_sum = g_of(a, a.target[row]);
    loss = g_sum * (log_s + (static_cast<double>(top) - a.x[first + a.target[row]]));
  }
  const Spread spread = {a, first};
  if (spread.any()) {
    const double rest = spread.sum();
    g_sum += rest;
    loss += rest * log_s + spread.loss(top);
  }
  if (!a.grad) return loss;

  float* grad = a.grad + first;
  const Vec scale = Vec::fill(a.grad_scale);
  const Vec to_p = Vec::fill(static_cast<float>(a.grad_scale * g_sum / s));
  each_vector(0, C, [&](int64_t c, int64_t n) {
    Vec v = load(grad + c, n) * to_p;
    if (spread.any()) v = v - scale * spread.at(c, n);
    store(v, grad + c, n);
  });
  if (a.target) grad[a.target[row]] -= a.grad_scale * g_of(a, a.target[row]);
  return loss;
}

// Rows along memory. A few at a time, as fit in L1, so that no row's sums wait for the row before.
static double contiguous_rows(const CrossEntropy& a, int64_t begin, int64_t end) {
  constexpr int64_t kRows = 8, kFit = 4096;
  const int64_t C = a.C, rows = C > kFit ? 1 : min(kRows, kFit / C);
  double total = 0;
  for (int64_t row = begin; row < end; row += rows) {
    const int64_t n = min(rows, end - row);
    float top[kRows], s[kRows];
    for (int64_t i = 0; i < n; ++i) top[i] = row_max(a.x + (row + i) * C, C);
    for (int64_t i = 0; i < n; ++i) {
      const float* x = a.x + (row + i) * C;
      s[i] = a.grad ? exp_sum<true>(x, top[i], a.grad + (row + i) * C, C)
                    : exp_sum<false>(x, top[i], nullptr, C);
    }
    for (int64_t i = 0; i < n; ++i) {
      const bool ignored = is_ignored(a, row + i);
      const double loss = ignored ? 0 : finish_row(a, row + i, top[i], s[i]);
      if (ignored && a.grad) store_zeros(a.grad + (row + i) * C, C);
      if (a.losses) a.losses[row + i] = static_cast<float>(loss);
      total += loss;
    }
  }
  return total;
}

// Interleaved rows: class c of n <= kWidth of them at x + c * step, a lane each; so the
// probabilities, and the gradient in e (null if nobody wants it, and may be x).
struct Lanes {
  const float *x, *probabilities;
  float* e;
  int64_t step;
};

static double strided_rows(const CrossEntropy& a, int64_t row, int64_t n, const Lanes& at) {
  const bool is_spread = !a.target || a.smoothing != 0;
  const auto g = [&](int64_t c) {
    Vec v = Vec::fill(smoothing_per_class(a));
    if (!a.target)
      v = fma(Vec::fill(one_minus_smoothing(a)), load(at.probabilities + c * at.step, n), v);
    return a.weight ? v * Vec::fill(a.weight[c]) : v;
  };
  float x_t[Vec::kWidth];  // of the targets, before e overwrites them
  for (int64_t i = 0; i < n; ++i)
    x_t[i] = a.target && !is_ignored(a, row + i) ? at.x[a.target[row + i] * at.step + i] : 0;

  Vec top = Vec::fill(-__builtin_inff()), s = Vec::zero(), g_sum = s, other_loss = s;
  for (int64_t c = 0; c < a.C; ++c) top = max(load(at.x + c * at.step, n), top);
  for (int64_t c = 0; c < a.C; ++c) {
    const Vec below = load(at.x + c * at.step, n) - top, e = exp(below);
    if (at.e) store(e, at.e + c * at.step, n);
    s = s + e;
    if (!is_spread) continue;
    g_sum = g_sum + g(c);
    other_loss = other_loss - g(c) * below;
  }

  float tops[Vec::kWidth], sums[Vec::kWidth], g_sums[Vec::kWidth], other_losses[Vec::kWidth];
  top.store(tops), s.store(sums), g_sum.store(g_sums), other_loss.store(other_losses);
  float to_p[Vec::kWidth], scale[Vec::kWidth];  // 0 in an ignored row, or to_p NaN: see above
  double total = 0;
  for (int64_t i = 0; i < n; ++i) {
    const bool ignored = is_ignored(a, row + i);
    double loss = 0;
    if (!ignored) {
      const float log_s = __builtin_logf(sums[i]), g_t = a.target ? g_of(a, a.target[row + i]) : 0;
      loss = (static_cast<double>(g_t) + g_sums[i]) * log_s + other_losses[i];
      if (a.target) loss += g_t * (static_cast<double>(tops[i]) - x_t[i]);
      g_sums[i] += g_t;
    }
    scale[i] = ignored ? 0 : a.grad_scale;
    const float none = a.inner > 1 ? 0 * sums[i] : 0;
    to_p[i] = ignored ? none : a.grad_scale * g_sums[i] / sums[i];
    if (a.losses) a.losses[row + i] = static_cast<float>(loss);
    total += loss;
  }
  if (!at.e) return total;

  const Vec scales = load(scale, n), to_ps = load(to_p, n);
  const Vec::Mask ignored = scales == Vec::zero();
  for (int64_t c = 0; c < a.C; ++c) {
    Vec v = load(at.e + c * at.step, n) * to_ps;
    if (is_spread) v = v - scales * g(c);
    store(select(ignored, to_ps, v), at.e + c * at.step, n);
  }
  if (a.target)
    for (int64_t i = 0; i < n; ++i)
      if (!is_ignored(a, row + i))
        at.e[a.target[row + i] * at.step + i] -= a.grad_scale * g_of(a, a.target[row + i]);
  return total;
}

constexpr int64_t kShort = 16;

// n rows of up to kShort classes, transposed.
static double rows_turned(const CrossEntropy& a, int64_t row, int64_t n) {
  constexpr int64_t W = Vec::kWidth;
  float x[kShort * W], probabilities[kShort * W];
  const int64_t first = row * a.C;
  pack_panel<W>(MaskedInput<float>(a.x), first, a.C, 1, n, a.C, x);
  if (!a.target)
    pack_panel<W>(MaskedInput<float>(a.probabilities), first, a.C, 1, n, a.C, probabilities);
  const double loss = strided_rows(a, row, n, {x, probabilities, a.grad ? x : nullptr, W});
  for (int64_t c = 0; a.grad && c < a.C; c += W) {
    Vec r[W];
    for (int64_t j = 0; j < W; ++j) r[j] = c + j < a.C ? Vec::load(x + (c + j) * W) : Vec::zero();
    transpose(r);
    for (int64_t i = 0; i < n; ++i) store(r[i], a.grad + first + i * a.C + c, min(a.C - c, W));
  }
  return loss;
}

// Where class 0 of a row is, and how many rows are interleaved from there on: at most a vector.
static int64_t first_of(const CrossEntropy& a, int64_t row) {
  return row / a.inner * a.C * a.inner + row % a.inner;
}
static int64_t rows_per_vector(const CrossEntropy& a, int64_t row, int64_t end) {
  const int64_t n = min(Vec::kWidth, end - row);
  return a.inner == 1 ? n : min(n, a.inner - row % a.inner);
}

static double cross_entropy(const CrossEntropy& a, int64_t begin, int64_t end) {
  if (a.inner == 1 && a.C > kShort) return contiguous_rows(a, begin, end);
  double total = 0;
  for (int64_t row = begin, n; row < end; row += n) {
    n = rows_per_vector(a, row, end);
    const int64_t first = first_of(a, row);
    const Lanes at = {a.x + first, a.target ? nullptr : a.probabilities + first,
                      a.grad ? a.grad + first : nullptr, a.inner};
    total += a.inner == 1 ? rows_turned(a, row, n) : strided_rows(a, row, n, at);
  }
  return total;
}

static void cross_entropy_backward(const CrossEntropy& a, const float* grad_y, int64_t step,
                                   int64_t begin, int64_t end) {
  const auto factor = [&](int64_t row) {  // whatever becomes of an ignored row's loss
    return is_ignored(a, row) ? 0 : grad_y[row * step];
  };
  for (int64_t row = begin, n; row < end; row += n) {
    n = rows_per_vector(a, row, end);
    const int64_t first = first_of(a, row);
    if (a.inner == 1) {
      n = 1;
      const Vec f = Vec::fill(factor(row));
      each_vector(first, first + a.C, [&](int64_t i, int64_t lanes) {
        store(f * load(a.x + i, lanes), a.grad + i, lanes);
      });
      continue;
    }
    float lanes[Vec::kWidth];
    for (int64_t i = 0; i < n; ++i) lanes[i] = factor(row + i);
    const Vec f = load(lanes, n);
    for (int64_t c = 0; c < a.C; ++c) {
      const int64_t i = first + c * a.inner;
      store(f * load(a.x + i, n), a.grad + i, n);
    }
  }
}

}  // namespace
}  // namespace dlkernels::cpu
