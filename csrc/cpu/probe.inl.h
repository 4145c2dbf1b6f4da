// Multiply-adds on registers alone: the FMA peak of the roofline in benchmarks.
#pragma once
#include "cpu/simd/vec.h"

namespace dlkernels::cpu {
namespace {

constexpr int64_t kProbeChains = 12;  // latency 4-5 at two a cycle wants 10; 16 registers hold 12

// A chain's next element is 0.5 * x + 0.5, so that none overflows or is known beforehand.
static float multiply_add(int64_t times) {
  const Vec half = Vec::fill(0.5f);
  Vec chain[kProbeChains];
  for (int64_t c = 0; c < kProbeChains; ++c) chain[c] = Vec::fill(static_cast<float>(c));
  for (int64_t i = 0; i < times; ++i)
#pragma GCC unroll 12
    for (int64_t c = 0; c < kProbeChains; ++c) chain[c] = fma(chain[c], half, half);
  Vec total = Vec::zero();
  for (int64_t c = 0; c < kProbeChains; ++c) total = total + chain[c];
  return reduce_sum(total);
}

}  // namespace
}  // namespace dlkernels::cpu
