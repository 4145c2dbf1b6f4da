// Vec, the vector of the instruction set that an ISA file names, and rows of any length in vectors:
// what every kernel body begins with.
#pragma once
#include "cpu/kernels.h"

#ifndef VEC_HEADER
#define VEC_HEADER "cpu/simd/baseline.h"
#endif
#include VEC_HEADER

namespace dlkernels::cpu {
namespace {

static constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static constexpr int64_t round_up(int64_t n, int64_t to = Vec::kWidth) {
  return ceil_div(n, to) * to;
}

// n <= Vec::kWidth elements, with a plain load or store where that is a whole vector.
template <class T>
static inline Vec load(const T* p, int64_t n) {
  return n == Vec::kWidth ? Vec::load(p) : Vec::load(p, n);
}
template <class T>
static inline void store(Vec v, T* p, int64_t n) {
  n == Vec::kWidth ? v.store(p) : v.store(p, n);
}

// f<T>(), where elements of that dtype are T.
template <class F>
__attribute__((always_inline)) static inline void with_type(DType dtype, const F& f) {
  if (dtype == DType::kFloat32) return f.template operator()<float>();
  if (dtype == DType::kBFloat16) return f.template operator()<BFloat16>();
  f.template operator()<Float16>();
}

// f(i, n) for vectors of n elements from i, all of them whole but the last.
template <class F>
static inline void each_vector(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + Vec::kWidth <= end; i += Vec::kWidth) f(i, Vec::kWidth);
  if (i < end) f(i, end - i);
}

static void store_zeros(float* to, int64_t size) {
  each_vector(0, size, [&](int64_t i, int64_t n) { store(Vec::zero(), to + i, n); });
}

}  // namespace
}  // namespace dlkernels::cpu
