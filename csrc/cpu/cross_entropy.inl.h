// p[n, c] = exp(x[n, c] - top) / s, top = max_c x[n, c], s = sum_c exp(x[n, c] - top)
// g[n, c] = weight[c] * ((1 - smoothing) * t[n, c] + smoothing / C), t the target's one-hot row or
// the probabilities; 0 for a row whose target is ignore_index
// loss[n] = -sum_c g[n, c] * log p[n, c] = sum_c g[n, c] * (log s + top - x[n, c])
// grad[n, c] = grad_scale * (p[n, c] * sum_c g[n, c] - g[n, c])
//
// All of a row is done while it is in cache: grad holds the exponentials in between.

// The sum of f(c, lanes), whose lanes that are not there must be 0. In blocks, so that rounding
// errors do not pile up along a row of many classes.
template <class F>
static inline float row_sum(int64_t C, const F& f) {
  constexpr int64_t kBlock = 64 * Vec::kWidth;
  Vec total = Vec::zero();
  for (int64_t begin = 0; begin < C; begin += kBlock) {
    Vec block = Vec::zero();
    each_vector(begin, least(C, begin + kBlock),
                [&](int64_t c, int64_t n) { block = block + f(c, n); });
    total = total + block;
  }
  return sum(total);
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
    top[0] = max(load_or(x + c, least(C - c, Vec::kWidth), none), top[0]);
  return max_lane(max(max(top[0], top[1]), max(top[2], top[3])));
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

// What of g a whole row has: all of it for probabilities, the smoothing for a class.
struct Spread {
  const float *probabilities, *weight;
  float keep, even, weight_sum;

  Vec at(int64_t c, int64_t n) const {
    Vec g = Vec::fill(even);
    if (probabilities) g = fma(Vec::fill(keep), load(probabilities + c, n), g);
    return weight ? g * load(weight + c, n) : g;
  }
  // sum_c g[c], smoothing apart: at() is not 0 in lanes that are not there.
  double sum(int64_t C) const {
    const double smooth = static_cast<double>(even) * weight_sum;
    if (!probabilities) return smooth;
    const float rest = row_sum(C, [&](int64_t c, int64_t n) {
      const Vec p = load(probabilities + c, n);
      return weight ? p * load(weight + c, n) : p;
    });
    return smooth + static_cast<double>(keep) * rest;
  }
  // sum_c g[c] * (top - x[c]); lanes that are not there count as x = top
  float loss(const float* x, float top, int64_t C) const {
    const Vec tops = Vec::fill(top);
    return row_sum(C, [&](int64_t c, int64_t n) {
      const Vec v = n == Vec::kWidth ? Vec::load(x + c) : load_or(x + c, n, tops);
      return at(c, n) * (tops - v);
    });
  }
};

static double cross_entropy_row(const CrossEntropy& a, int64_t row) {
  const int64_t C = a.C, t = a.target ? a.target[row] : -1;
  const float* x = a.x + row * C;
  float* grad = a.grad ? a.grad + row * C : nullptr;
  if (a.target && t == a.ignore_index) {
    if (grad) store_zeros(grad, C);
    return 0;
  }
  const float top = row_max(x, C);
  const float s = grad ? exp_sum<true>(x, top, grad, C) : exp_sum<false>(x, top, grad, C);
  const double log_s = __builtin_log(s);
  const float keep = 1 - a.smoothing, even = a.smoothing / static_cast<float>(C);

  double loss = 0, g_sum = 0;
  float g_t = 0;  // the target's own part of g
  if (a.target) {
    g_t = a.weight ? keep * a.weight[t] : keep;
    g_sum = g_t;
    loss = g_t * (log_s + (static_cast<double>(top) - x[t]));
  }
  const bool is_spread = !a.target || a.smoothing != 0;
  const Spread spread = {a.target ? nullptr : a.probabilities + row * C, a.weight, keep, even,
                         a.weight_sum};
  if (is_spread) {
    const double rest = spread.sum(C);
    g_sum += rest;
    loss += rest * log_s + spread.loss(x, top, C);
  }
  if (!grad) return loss;

  const Vec scale = Vec::fill(a.grad_scale);
  const Vec to_p = Vec::fill(static_cast<float>(a.grad_scale * g_sum / s));
  each_vector(0, C, [&](int64_t c, int64_t n) {
    Vec v = load(grad + c, n) * to_p;
    if (is_spread) v = v - scale * spread.at(c, n);
    store(v, grad + c, n);
  });
  if (a.target) grad[t] -= a.grad_scale * g_t;
  return loss;
}

static double cross_entropy(const CrossEntropy& rows, int64_t begin, int64_t end) {
  double total = 0;
  for (int64_t row = begin; row < end; ++row) {
    const double loss = cross_entropy_row(rows, row);
    if (rows.losses) rows.losses[row] = static_cast<float>(loss);
    total += loss;
  }
  return total;
}

static void cross_entropy_backward(const float* grad, const float* grad_y, int64_t step,
                                   const int64_t* target, int64_t ignore_index, float* grad_x,
                                   int64_t C, int64_t begin, int64_t end) {
  const auto scale = [&](int64_t from, int64_t to, float factor) {
    each_vector(from, to, [&](int64_t i, int64_t n) {
      store(Vec::fill(factor) * load(grad + i, n), grad_x + i, n);
    });
  };
  // An ignored row's gradient of 0 stays 0 under any finite factor.
  if (step == 0 && *grad_y - *grad_y == 0) return scale(begin * C, end * C, *grad_y);
  for (int64_t row = begin; row < end; ++row)
    if (target && target[row] == ignore_index)
      store_zeros(grad_x + row * C, C);
    else
      scale(row * C, row * C + C, grad_y[row * step]);
}
