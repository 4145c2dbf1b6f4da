// Softmax cross-entropy of a row of logits and its gradient, while the row is in L1.

// e^x, off by at most 1.27 ulp (measured against float64 at every third float of -104 .. 88.7, with
// the same result on all instruction sets); 0 below -104, inf above 88.8, NaN kept. x = n ln2 + r
// with |r| <= ln2 / 2, and e^r from the polynomial of the Cephes library.
static Vec exp(Vec x) {
  x = max(Vec::fill(-104), min(Vec::fill(89), x));  // these orders of arguments keep NaN
  const Vec n = round(x * Vec::fill(1.44269504f));
  Vec r = fma(n, Vec::fill(-0.693359375f), x);
  r = fma(n, Vec::fill(2.12194440e-4f), r);
  Vec p = Vec::fill(1.9875691500e-4f);
  p = fma(p, r, Vec::fill(1.3981999507e-3f));
  p = fma(p, r, Vec::fill(8.3334519073e-3f));
  p = fma(p, r, Vec::fill(4.1665795894e-2f));
  p = fma(p, r, Vec::fill(1.6666665459e-1f));
  p = fma(p, r, Vec::fill(5.0000001201e-1f));
  return scale2(fma(p * r, r, r + Vec::fill(1)), n);
}

// A row's distribution a (see CrossEntropy), lanes that are not there 0.
struct Distribution {
  const float *p, *weight;  // the row's probabilities or null; class weights or null
  int64_t target;           // -1 where p is given
  float sharp, flat;        // 1 - smoothing, smoothing / C

  Vec at(int64_t c, int64_t n) const {
    Vec a = Vec::load(kOnes, n) * Vec::fill(flat);
    if (p) a = fma(Vec::load(p + c, n), Vec::fill(sharp), a);
    return weight ? a * Vec::load(weight + c, n) : a;
  }
  // What `at` leaves out, because it is in one place only.
  float at_target() const { return p ? 0 : weight ? sharp * weight[target] : sharp; }
  bool only_target() const { return !p && flat == 0; }

  static constexpr float kOnes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
};

// Returns the row's loss; writes its gradient unless grad is null.
static float cross_entropy_row(const float* x, int64_t C, const Distribution& a, float scale,
                               float* grad) {
  constexpr int64_t V = Vec::kWidth;
  const float none = -__builtin_inff();
  Vec top = Vec::fill(none);
  for (int64_t c = 0; c < C; c += V) top = max(top, Vec::load(x + c, least(C - c, V), none));
  const float largest = max_lane(top);

  Vec total = Vec::zero();
  for (int64_t c = 0; c < C; c += V) {
    const int64_t n = least(C - c, V);
    const Vec e = exp(Vec::load(x + c, n, none) - Vec::fill(largest));
    total = total + e;
    if (grad) e.store(grad + c, n);
  }
  const float sum_exp = sum(total), log_sum = __builtin_logf(sum_exp);

  float mass = a.at_target(), loss = 0;  // mass: sum of a
  if (mass != 0 || a.only_target()) loss = mass * (log_sum - (x[a.target] - largest));
  if (!a.only_target()) {
    Vec sum_a = Vec::zero(), sum_ax = Vec::zero();
    for (int64_t c = 0; c < C; c += V) {
      const int64_t n = least(C - c, V);
      const Vec ac = a.at(c, n), z = Vec::load(x + c, n, largest) - Vec::fill(largest);
      sum_a = sum_a + ac;
      sum_ax = sum_ax + ac * z;
    }
    loss += sum(sum_a) * log_sum - sum(sum_ax);
    mass += sum(sum_a);
  }
  if (!grad) return loss;

  const Vec factor = Vec::fill(scale * mass / sum_exp);
  for (int64_t c = 0; c < C; c += V) {
    const int64_t n = least(C - c, V);
    Vec g = Vec::load(grad + c, n) * factor;
    if (!a.only_target()) g = g - Vec::fill(scale) * a.at(c, n);
    g.store(grad + c, n);
  }
  if (!a.p) grad[a.target] -= scale * a.at_target();
  return loss;
}

static void cross_entropy(const CrossEntropy& job, int64_t begin, int64_t end) {
  const int64_t C = job.C;
  for (int64_t r = begin; r < end; ++r) {
    float* grad = job.grad ? job.grad + r * C : nullptr;
    if (job.target && job.target[r] == job.ignore_index) {
      job.loss[r] = 0;
      for (int64_t c = 0; grad && c < C; ++c) grad[c] = 0;
      continue;
    }
    const Distribution a = {job.probabilities ? job.probabilities + r * C : nullptr, job.weight,
                            job.target ? job.target[r] : -1, 1 - job.smoothing,
                            job.smoothing / static_cast<float>(C)};
    job.loss[r] = cross_entropy_row(job.x + r * C, C, a, job.scale, grad);
  }
}

static void scale_rows(const float* x, const float* factor, int64_t step, float* y, int64_t C,
                       int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const Vec f = Vec::fill(factor[r * step]);
    for (int64_t c = r * C; c < (r + 1) * C; c += Vec::kWidth) {
      const int64_t n = least((r + 1) * C - c, Vec::kWidth);
      const Vec v = Vec::load(x + c, n);
      select(v == Vec::zero(), v, v * f).store(y + c, n);
    }
  }
}
