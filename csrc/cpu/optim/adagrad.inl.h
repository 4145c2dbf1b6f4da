// sum[i] = sum[i] + g^2
// param[i] = param[i] - step_size * g / (sqrt(sum[i]) + eps)
#pragma once
#include "cpu/simd/vec.h"
#include "cpu/optim/optim.inl.h"

namespace dlkernels::cpu {
namespace {

static void adagrad(const OptimTensor& t, const AdagradScalars& s, int64_t begin, int64_t end) {
  const Vec minus_step = Vec::fill(-s.step_size), eps = Vec::fill(s.eps);
  each_update<1>(t, begin, end, [=](Vec& p, Vec g, Vec* state) __attribute__((always_inline)) {
    Vec& sum = state[0];
    sum = fma(g, g, sum);
    p = fma(minus_step, g / (sqrt(sum) + eps), p);
  });
}

}  // namespace
}  // namespace dlkernels::cpu
