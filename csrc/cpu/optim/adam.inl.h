// exp_avg[i] = exp_avg[i] + (1 - beta1) * (g - exp_avg[i])
// exp_avg_sq[i] = beta2 * exp_avg_sq[i] + (1 - beta2) * g^2
// param[i] = shrink * param[i] - step_size * exp_avg[i] / (sqrt(exp_avg_sq[i]) * rsqrt_bias + eps)
#pragma once
#include "cpu/simd/vec.h"
#include "cpu/optim/optim.inl.h"

namespace dlkernels::cpu {
namespace {

static void adam(const OptimTensor& t, const AdamScalars& s, int64_t begin, int64_t end) {
  const Lerp average(s.one_minus_beta1);
  const Vec beta2 = Vec::fill(s.beta2), w = Vec::fill(s.one_minus_beta2);
  const Vec eps = Vec::fill(s.eps), shrink = Vec::fill(s.shrink);
  const Vec rsqrt_bias = Vec::fill(s.rsqrt_bias), minus_step = Vec::fill(-s.step_size);
  each_update<2>(t, begin, end, [=](Vec& p, Vec g, Vec* state) __attribute__((always_inline)) {
    Vec &m = state[0], &v = state[1];
    m = average(m, g);
    v = decayed_square(beta2, v, w, g);
    p = fma(minus_step, m / fma(sqrt(v), rsqrt_bias, eps), shrink * p);
  });
}

}  // namespace
}  // namespace dlkernels::cpu
