// y[i] = max(0, x[i]); grad_x[i] = y[i] <= 0 ? 0 : grad_y[i].
// One pass over memory, which bounds it: 8 bytes an element forward, 12 backward.
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
  each_vector(begin, end, [&](int64_t i, int64_t n) {  // NaN is not <= 0
    store(select(load(y + i, n) <= Vec::zero(), Vec::zero(), load(grad_y + i, n)), grad_x + i, n);
  });
}

}  // namespace
}  // namespace dlkernels::cpu
