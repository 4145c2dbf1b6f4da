// square_avg[i] = rho * square_avg[i] + (1 - rho) * g^2
// delta = sqrt(acc_delta[i] + eps) / sqrt(square_avg[i] + eps) * g
// acc_delta[i] = rho * acc_delta[i] + (1 - rho) * delta^2
// param[i] = param[i] - lr * delta
#pragma once
#include "cpu/simd/vec.h"
#include "cpu/optim/optim.inl.h"

namespace dlkernels::cpu {
namespace {

static void adadelta(const OptimTensor& t, const AdadeltaScalars& s, int64_t begin, int64_t end) {
  const Vec minus_lr = Vec::fill(-s.lr), eps = Vec::fill(s.eps);
  const Vec rho = Vec::fill(s.rho), w = Vec::fill(s.one_minus_rho);
  each_update<2>(t, begin, end, [=](Vec& p, Vec g, Vec* state) __attribute__((always_inline)) {
    Vec &square_avg = state[0], &acc_delta = state[1];
    square_avg = decayed_square(rho, square_avg, w, g);
    // Two roots: their squares' quotient may underflow.
    const Vec delta = sqrt(acc_delta + eps) / sqrt(square_avg + eps) * g;
    acc_delta = decayed_square(rho, acc_delta, w, delta);
    p = fma(minus_lr, delta, p);
  });
}

}  // namespace
}  // namespace dlkernels::cpu
