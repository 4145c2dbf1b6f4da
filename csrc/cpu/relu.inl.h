// y[i] = max(0, x[i]) and its gradient.
#pragma once
#include "cpu/simd/vec.h"

namespace dlkernels::cpu {
namespace {

static void relu(const float* x, float* y, int64_t begin, int64_t end) {
  each_vector(begin, end, [&](int64_t i, int64_t n) {  // this order of max keeps NaN and -0.0
    store(max(Vec::zero(), load(x + i, n)), y + i, n);
  });
}

static void relu_backward(const float* grad_y, const float* y, float* grad_x, int64_t begin,
                          int64_t end) {
  const Source<float> grad(grad_y, y);
  each_vector(begin, end, [&](int64_t i, int64_t n) { store(grad.at(i, n), grad_x + i, n); });
}

}  // namespace
}  // namespace dlkernels::cpu
