// e^x = 2^n * e^r, n = round(x / ln 2), r = x - n * ln 2, |r| <= ln 2 / 2
// e^r = 1 + r * (1 + r * q(r)), q a minimax polynomial (relative error of e^r 4e-9)
//
// For x <= 0, or NaN, which stays NaN. Against float64, over all such floats: at most 0.89 units in
// the last place off (1.18 without fma) where the result is a normal number. Below, at most that
// number off and perhaps 0; for x < -104, and so for -infinity, 0.
#pragma once
#include "cpu/simd/vec.h"

namespace dlkernels::cpu {
namespace {

static inline Vec exp(Vec x) {
  x = max(Vec::fill(-104), x);  // n stays small enough for scale2; in this order a NaN of x is kept
  const Vec n = round(x * Vec::fill(0x1.715476p+0f));
  // ln 2 in two terms: the first has 10 bits, so that its product with n is exact without fma too.
  const Vec r = fma(n, Vec::fill(2.12194440e-4f), fma(n, Vec::fill(-0.693359375f), x));
  Vec q = Vec::fill(0x1.6a23dp-10f);
  q = fma(q, r, Vec::fill(0x1.123a2p-7f));
  q = fma(q, r, Vec::fill(0x1.5558f2p-5f));
  q = fma(q, r, Vec::fill(0x1.555492p-3f));
  q = fma(q, r, Vec::fill(0x1.fffffcp-2f));
  q = fma(q, r, Vec::fill(1));
  return ldexp(fma(q, r, Vec::fill(1)), n);
}

}  // namespace
}  // namespace dlkernels::cpu
