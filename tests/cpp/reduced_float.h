// The dtypes of linear layers and convolutions, as their tests see them.
#pragma once
#include <type_traits>

#include "cpu/simd/reduced_float.h"
#include "kernels_test.h"

namespace dlkernels::test {

using cpu::BFloat16;
using cpu::Float16;

template <class T>
constexpr DType kDType = std::is_same_v<T, float>      ? DType::kFloat32
                         : std::is_same_v<T, BFloat16> ? DType::kBFloat16
                                                       : DType::kFloat16;

// How far a number may be from x for having been rounded to T once.
template <class T>
double rounding(double x) {
  if (std::is_same_v<T, float>) return 0;
  return std::is_same_v<T, BFloat16> ? std::fabs(x) * 0x1p-8 : std::fabs(x) * 0x1p-11 + 0x1p-25;
}

}  // namespace dlkernels::test
