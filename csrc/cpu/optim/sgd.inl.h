// momentum_buffer[i] = momentum * momentum_buffer[i] + (1 - dampening) * g, or g in the first step
// param[i] = param[i] - lr * (momentum_buffer[i], with Nesterov's g + momentum * that, or just g)
#pragma once
#include "cpu/simd/vec.h"
#include "cpu/optim/optim.inl.h"

namespace dlkernels::cpu {
namespace {

static void sgd(const OptimTensor& t, const SgdScalars& s, int64_t begin, int64_t end) {
  const Vec minus_lr = Vec::fill(-s.lr), momentum = Vec::fill(s.momentum);
  const Vec undamped = Vec::fill(s.one_minus_dampening);
  const bool nesterov = s.nesterov, is_first_step = s.is_first_step;
  if (!t.state[0])
    return each_update<0>(t, begin, end, [=](Vec& p, Vec g, Vec*) __attribute__((always_inline)) {
      p = fma(minus_lr, g, p);
    });
  each_update<1>(t, begin, end, [=](Vec& p, Vec g, Vec* state) __attribute__((always_inline)) {
    Vec& b = state[0];
    b = fma(undamped, g, momentum * b);
    if (is_first_step) b = g;
    Vec step = b;
    if (nesterov) step = fma(momentum, b, g);
    p = fma(minus_lr, step, p);
  });
}

}  // namespace
}  // namespace dlkernels::cpu
