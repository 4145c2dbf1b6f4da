// g = sign * grad[i] / grad_scale + weight_decay * param[i]
// exp_avg[i] = exp_avg[i] + (1 - beta1) * (g - exp_avg[i])
// exp_avg_sq[i] = beta2 * exp_avg_sq[i] + (1 - beta2) * g^2
// param[i] = shrink * param[i] - step_size * exp_avg[i] / (sqrt(exp_avg_sq[i]) * rsqrt_bias + eps)

// n elements from i; a whole vector of them where kWhole.
template <bool kWhole>
static inline void adam_at(const AdamTensor& t, int64_t i, int64_t n) {
  const auto load = [=](const float* p) { return kWhole ? Vec::load(p + i) : Vec::load(p + i, n); };
  const auto store = [=](Vec v, float* p) { kWhole ? v.store(p + i) : v.store(p + i, n); };
  Vec p = load(t.param), g = load(t.grad);
  if (t.unscaled) {
    g = g / Vec::fill(t.grad_scale);
    store(g, t.unscaled);
  }
  g = Vec::fill(t.sign) * g;
  // Not without weight decay: an infinite parameter would make 0 * inf.
  if (t.weight_decay != 0) g = fma(Vec::fill(t.weight_decay), p, g);
  // m - w * m + w * g is exact for w = 1, where m + w * (g - m) loses a g far below m.
  const Vec w = Vec::fill(t.one_minus_beta1), m_old = load(t.exp_avg);
  const Vec m = fma(w, g, fma(Vec::zero() - w, m_old, m_old));
  // Not in that form: it would turn a square that has overflowed to infinity into NaN.
  const Vec v = fma(Vec::fill(t.one_minus_beta2) * g, g, Vec::fill(t.beta2) * load(t.exp_avg_sq));
  const Vec update = m / fma(sqrt(v), Vec::fill(t.rsqrt_bias), Vec::fill(t.eps));
  p = fma(Vec::zero() - Vec::fill(t.step_size), update, Vec::fill(t.shrink) * p);
  store(m, t.exp_avg);
  store(v, t.exp_avg_sq);
  store(p, t.param);
}

static void adam(const AdamTensor& tensor, int64_t begin, int64_t end) {
  const AdamTensor t = tensor;  // a copy, which the stores provably leave alone
  int64_t i = begin;
  for (; i + Vec::kWidth <= end; i += Vec::kWidth) adam_at<true>(t, i, Vec::kWidth);
  if (i < end) adam_at<false>(t, i, end - i);
}
