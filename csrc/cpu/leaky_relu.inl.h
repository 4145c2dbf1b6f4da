// y[i] = x[i] > 0 ? x[i] : x[i] * slope; grad_x[i] = x[i] > 0 ? grad_y[i] : grad_y[i] * slope.
// One pass over memory, which bounds it: 8 bytes an element forward, 12 backward.
#pragma once
#include "cpu/simd/vec.h"

namespace dlkernels::cpu {
namespace {

static void leaky_relu(const float* x, float* y, float slope, int64_t begin, int64_t end) {
  each_vector(begin, end, [&](int64_t i, int64_t n) {
    const Vec v = load(x + i, n);
    store(select(v > Vec::zero(), v, v * Vec::fill(slope)), y + i, n);
  });
}

static void leaky_relu_backward(const float* grad_y, const float* x, float* grad_x, float slope,
                                int64_t begin, int64_t end) {
  each_vector(begin, end, [&](int64_t i, int64_t n) {
    const Vec g = load(grad_y + i, n);
    store(select(load(x + i, n) > Vec::zero(), g, g * Vec::fill(slope)), grad_x + i, n);
  });
}

}  // namespace
}  // namespace dlkernels::cpu
