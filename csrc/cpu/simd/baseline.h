// Vec for any machine: 4 floats in the compiler's own vector type, SSE2 on x86-64 and NEON on Arm.
// Same names as simd_avx2.h and simd_avx512.h.
#pragma once
#include <cstdint>

#include "cpu/simd/reduced_float.h"

namespace dlkernels::cpu {
namespace {

// GEMM register tile: 10 accumulators, two vectors of B and one broadcast of A fit 16 registers,
// with some to spare for the separate multiply and add.
constexpr int64_t kTileRows = 5;
constexpr int64_t kTileVecs = 2;

struct Vec {
  static constexpr int64_t kWidth = 4;
  typedef float Floats __attribute__((vector_size(16)));
  typedef int32_t Mask __attribute__((vector_size(16)));  // -1 or 0 a lane
  Floats v;

  static Vec zero() { return fill(0); }
  static Vec fill(float x) { return {Floats{x, x, x, x}}; }
  static Vec load(const float* p) {
    Vec a;
    __builtin_memcpy(&a, p, sizeof a);
    return a;
  }
  template <class T>  // float, BFloat16 or Float16, here and in the other two
  static Vec load(const T* p, int64_t n = kWidth) {
    Vec a = zero();
    for (int64_t i = 0; i < n; ++i) a.v[i] = static_cast<float>(p[i]);
    return a;
  }
  void store(float* p) const { __builtin_memcpy(p, &v, sizeof v); }
  template <class T>
  void store(T* p, int64_t n = kWidth) const {
    for (int64_t i = 0; i < n; ++i) p[i] = static_cast<T>(v[i]);
  }
  // Lanes as bytes: exact for whole numbers from 0 to 255.
  static Vec load_bytes(const uint8_t* p, int64_t n) {
    if (n == 4) return {Floats{float(p[0]), float(p[1]), float(p[2]), float(p[3])}};
    Vec a = zero();
    for (int64_t i = 0; i < n; ++i) a.v[i] = p[i];
    return a;
  }
  void store_bytes(uint8_t* p, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) p[i] = static_cast<uint8_t>(v[i]);
  }
};
template <class F>
inline Vec each(F f) {
  return {Vec::Floats{f(0), f(1), f(2), f(3)}};
}
inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
inline Vec sqrt(Vec a) {
  return each([=](int i) { return __builtin_sqrtf(a.v[i]); });
}
// |a| < 2^22: above, floats of that size have no room for a fraction.
inline Vec round(Vec a) {
  const Vec big = Vec::fill(0x1.8p23f);
  return a + big - big;
}
// a * 2^n for whole numbers n below 128, 0 where 2^n is below the smallest normal number.
inline Vec ldexp(Vec a, Vec n) {
  typedef uint32_t Bits __attribute__((vector_size(16)));
  const Vec::Mask i = __builtin_convertvector(max(n, Vec::fill(-127)).v, Vec::Mask);
  return {a.v * reinterpret_cast<Vec::Floats>(reinterpret_cast<Bits>(i + 127) << 23)};
}

// Comparisons are false where a lane is NaN; is_nan finds those.
inline Vec::Mask operator>(Vec a, Vec b) { return a.v > b.v; }
inline Vec::Mask operator<=(Vec a, Vec b) { return a.v <= b.v; }
inline Vec::Mask operator==(Vec a, Vec b) { return a.v == b.v; }
inline Vec::Mask is_nan(Vec a) { return a.v != a.v; }
inline Vec select(Vec::Mask m, Vec yes, Vec no) { return {m ? yes.v : no.v}; }

inline float reduce_sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float reduce_max(Vec a) {
  const Vec m = max(a, {Vec::Floats{a.v[2], a.v[3], a.v[0], a.v[1]}});
  return m.v[0] > m.v[1] ? m.v[0] : m.v[1];
}

// r[i].lane[j] <-> r[j].lane[i]
inline void transpose(Vec (&r)[4]) {
  const Vec a = r[0], b = r[1], c = r[2], d = r[3];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) r[j].v = Vec::Floats{a.v[j], b.v[j], c.v[j], d.v[j]};
}

// p[2 * i] for i < n, n > 0, in an order that in_order puts right; p[2 * n - 2] is the last that is
// touched.
inline Vec load_even(const float* p, int64_t n) {
  if (n < 4) return {Vec::Floats{p[0], n > 1 ? p[2] : 0, n > 2 ? p[4] : 0, 0}};
  const Vec a = Vec::load(p), b = Vec::load(p + 3);
  return {Vec::Floats{a.v[0], a.v[2], b.v[1], b.v[3]}};
}
inline Vec in_order(Vec a) { return a; }
// a[0] b[0] a[1] b[1] ...: the first half to a, the second to b.
inline void interleave(Vec& a, Vec& b) {
  const Vec x = a, y = b;
  a.v = Vec::Floats{x.v[0], y.v[0], x.v[1], y.v[1]};
  b.v = Vec::Floats{x.v[2], y.v[2], x.v[3], y.v[3]};
}

// p[i] for i < n, the lanes of rest from there on.
inline Vec load_or(const float* p, int64_t n, Vec rest) {
  for (int64_t i = 0; i < n; ++i) rest.v[i] = p[i];
  return rest;
}

}  // namespace
}  // namespace dlkernels::cpu
