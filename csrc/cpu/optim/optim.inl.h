// The loop over a tensor that every optimizer's kernel is written in.
#pragma once
#include "cpu/simd/vec.h"

namespace dlkernels::cpu {
namespace {

// update(p, g, state) on vectors of the parameter, of g (see OptimTensor) and of the first kStates
// arrays of state; p and state are stored as it leaves them.
template <int kStates, class Update>
static inline void each_update(const OptimTensor& tensor, int64_t begin, int64_t end,
                               const Update& update) {
  const OptimTensor t = tensor;  // a copy, which the stores provably leave alone
  const Vec grad_scale = Vec::fill(t.grad_scale), sign = Vec::fill(t.sign);
  const Vec weight_decay = Vec::fill(t.weight_decay);
  each_vector(begin, end, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    Vec p = load(t.param + i, n), g = load(t.grad + i, n), state[kStates + 1];
    for (int k = 0; k < kStates; ++k) state[k] = load(t.state[k] + i, n);
    if (t.unscaled) {
      g = g / grad_scale;
      store(g, t.unscaled + i, n);
    }
    g = sign * g;
    // Not without weight decay: an infinite parameter would make 0 * inf.
    if (t.weight_decay != 0) g = fma(weight_decay, p, g);
    update(p, g, state);
    store(p, t.param + i, n);
    for (int k = 0; k < kStates; ++k) store(state[k], t.state[k] + i, n);
  });
}

// Goes from a to b by w: a where they are the same, b for w = 1 however much greater a is.
struct Lerp {
  const Vec coefficient;
  const Vec::Mask from_b;  // not a bool: for that GCC chooses an address, through memory

  explicit Lerp(float w)
      : coefficient(Vec::fill(w < 0.5f ? w : w - 1)), from_b(Vec::fill(0.5f) <= Vec::fill(w)) {}
  Vec operator()(Vec a, Vec b) const { return fma(coefficient, b - a, select(from_b, b, a)); }
};

// decay * a + w * b^2. Not as lerp: it would turn a square that has overflowed to infinity into
// NaN.
static inline Vec decayed_square(Vec decay, Vec a, Vec w, Vec b) {
  return fma(w * b, b, decay * a);
}

}  // namespace
}  // namespace dlkernels::cpu
