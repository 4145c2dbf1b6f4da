// square_avg[i] = alpha * square_avg[i] + (1 - alpha) * g^2
// centered: grad_avg[i] = grad_avg[i] + (1 - alpha) * (g - grad_avg[i])
// step = g / (sqrt(square_avg[i] - grad_avg[i]^2) + eps), without that square where not centered
// with momentum: momentum_buffer[i] = step = momentum * momentum_buffer[i] + step
// param[i] = param[i] - lr * step
#pragma once
#include "cpu/simd/vec.h"
#include "cpu/optim/optim.inl.h"

namespace dlkernels::cpu {
namespace {

template <bool kCentered, bool kMomentum>
static void rmsprop_with(const OptimTensor& t, const RmspropScalars& s, int64_t begin,
                         int64_t end) {
  const Vec minus_lr = Vec::fill(-s.lr), eps = Vec::fill(s.eps);
  const Vec alpha = Vec::fill(s.alpha), w = Vec::fill(s.one_minus_alpha);
  const Vec momentum = Vec::fill(s.momentum);
  const Lerp average(s.one_minus_alpha);
  each_update<1 + kCentered + kMomentum>(
      t, begin, end, [=](Vec& p, Vec g, Vec* state) __attribute__((always_inline)) {
        Vec variance = state[0] = decayed_square(alpha, state[0], w, g);
        if constexpr (kCentered) {
          state[1] = average(state[1], g);
          variance = fma(Vec::zero() - state[1], state[1], variance);
        }
        Vec step = g / (sqrt(variance) + eps);
        if constexpr (kMomentum)
          step = state[1 + kCentered] = fma(momentum, state[1 + kCentered], step);
        p = fma(minus_lr, step, p);
      });
}

static void rmsprop(const OptimTensor& tensor, const RmspropScalars& s, int64_t begin,
                    int64_t end) {
  OptimTensor t = tensor;
  const bool centered = t.state[1], momentum = t.state[2];
  if (!centered) t.state[1] = t.state[2];
  const auto run = centered ? (momentum ? rmsprop_with<true, true> : rmsprop_with<true, false>)
                            : (momentum ? rmsprop_with<false, true> : rmsprop_with<false, false>);
  run(t, s, begin, end);
}

}  // namespace
}  // namespace dlkernels::cpu
