// Vec for AVX2 + FMA + F16C: 8 floats. Same names as simd_avx512.h and simd_baseline.h.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "cpu/simd/reduced_float.h"

namespace dlkernels::cpu {
namespace {

// GEMM register tile: 12 accumulators, two vectors of B and one broadcast of A fill 15 of 16.
constexpr int64_t kTileRows = 6;
constexpr int64_t kTileVecs = 2;

struct Vec {
  static constexpr int64_t kWidth = 8;
  struct Mask {
    __m256 v;
  };
  __m256 v;

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec fill(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const float* p, int64_t n) { return {_mm256_maskload_ps(p, first(n))}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  // Four, two and one at a time: a masked store takes AMD's processors four times as long.
  void store(float* p, int64_t n) const {
    __m128 rest = _mm256_castps256_ps128(v);
    if (n == kWidth) return store(p);
    if (n & 4) {
      _mm_storeu_ps(p, rest);
      rest = _mm256_extractf128_ps(v, 1);
      p += 4;
    }
    if (n & 2) {
      _mm_storel_pi(reinterpret_cast<__m64*>(p), rest);
      rest = _mm_movehl_ps(rest, rest);
      p += 2;
    }
    if (n & 1) _mm_store_ss(p, rest);
  }
  static Vec load(const BFloat16* p, int64_t n = kWidth) {
    const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(&p->bits, n)), 16);
    return {_mm256_castsi256_ps(bits)};
  }
  static Vec load(const Float16* p, int64_t n = kWidth) {
    return {_mm256_cvtph_ps(load_halves(&p->bits, n))};
  }
  void store(BFloat16* p, int64_t n = kWidth) const {
    const __m256i bits = _mm256_castps_si256(v), odd = _mm256_slli_epi32(bits, 15);
    const __m256i half = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), _mm256_srli_epi32(odd, 31));
    const __m256 rounded = _mm256_castsi256_ps(_mm256_add_epi32(bits, half));
    const __m256 quiet = _mm256_or_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(1 << 22)));
    const __m256 kept = _mm256_blendv_ps(rounded, quiet, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i w = _mm256_srli_epi32(_mm256_castps_si256(kept), 16);
    store_halves(_mm_packus_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)),
                 &p->bits, n);
  }
  void store(Float16* p, int64_t n = kWidth) const {
    store_halves(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), &p->bits, n);
  }
  // Lanes as bytes: exact for whole numbers from 0 to 255. No byte masks here: moves that overlap.
  static Vec load_bytes(const uint8_t* p, int64_t n) {
    uint64_t bytes = 0;
    uint32_t lo, hi;
    if (n == 8) {
      __builtin_memcpy(&bytes, p, 8);
    } else if (n >= 4) {
      __builtin_memcpy(&lo, p, 4);
      __builtin_memcpy(&hi, p + n - 4, 4);
      bytes = lo | static_cast<uint64_t>(hi) << (8 * (n - 4));
    } else {
      bytes = load_few(p, n);
    }
    const __m128i b = _mm_cvtsi64_si128(static_cast<int64_t>(bytes));
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(b))};
  }
  void store_bytes(uint8_t* p, int64_t n) const {
    const __m256i i = _mm256_cvtps_epi32(v);
    const __m128i w = _mm_packus_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
    const uint64_t bytes = static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_packus_epi16(w, w)));
    if (n == 8) {
      __builtin_memcpy(p, &bytes, 8);
    } else if (n >= 4) {
      const uint32_t lo = static_cast<uint32_t>(bytes);
      const uint32_t hi = static_cast<uint32_t>(bytes >> (8 * (n - 4)));
      __builtin_memcpy(p, &lo, 4);
      __builtin_memcpy(p + n - 4, &hi, 4);
    } else {
      for (int64_t k = 0; k < n; ++k) p[k] = static_cast<uint8_t>(bytes >> (8 * k));
    }
  }
  // 16 bits a lane. No masks for these either.
  static __m128i load_halves(const uint16_t* p, int64_t n) {
    if (n == 8) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    uint64_t lo, hi = 0;
    if (n >= 4) {
      __builtin_memcpy(&lo, p, 8);
      __builtin_memcpy(&hi, p + n - 4, 8);
      hi = n > 4 ? hi >> (16 * (8 - n)) : 0;
    } else {
      lo = load_few(p, n);
    }
    return _mm_set_epi64x(static_cast<int64_t>(hi), static_cast<int64_t>(lo));
  }
  static void store_halves(__m128i v, uint16_t* p, int64_t n) {
    if (n == 8) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v);
    uint16_t halves[8];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(halves), v);
    for (int64_t i = 0; i < n; ++i) p[i] = halves[i];
  }
  // p[i] for i < n < 4.
  template <class T>
  static uint64_t load_few(const T* p, int64_t n) {
    constexpr int64_t kBits = 8 * sizeof(T);
    if (n == 0) return 0;
    return p[0] | static_cast<uint64_t>(p[n / 2]) << (kBits * (n / 2)) |
           static_cast<uint64_t>(p[n - 1]) << (kBits * (n - 1));
  }
  static __m256i first(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
};
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }                // a > b ? a : b
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
inline Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
inline Vec round(Vec a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a * 2^n for whole numbers n below 128, 0 where 2^n is below the smallest normal number.
inline Vec ldexp(Vec a, Vec n) {
  const __m256i i = _mm256_cvtps_epi32(max(n, Vec::fill(-127)).v);
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(i, _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(power))};
}

// Comparisons are false where a lane is NaN; is_nan finds those.
inline Vec::Mask operator>(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
inline Vec::Mask operator<=(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
inline Vec::Mask operator==(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
inline Vec::Mask is_nan(Vec a) { return {_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)}; }
inline Vec::Mask operator|(Vec::Mask a, Vec::Mask b) { return {_mm256_or_ps(a.v, b.v)}; }
inline Vec select(Vec::Mask m, Vec yes, Vec no) { return {_mm256_blendv_ps(no.v, yes.v, m.v)}; }

inline float reduce_sum(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float reduce_max(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

// r[i].lane[j] <-> r[j].lane[i]: 2x2 blocks of floats, then of pairs, then of 128-bit halves.
inline void transpose(Vec (&r)[8]) {
  __m256 t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
  }
#pragma GCC unroll 2
  for (int g = 0; g < 8; g += 4)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m256d lo = _mm256_castps_pd(t[g + h]), hi = _mm256_castps_pd(t[g + h + 2]);
      u[g + 2 * h] = _mm256_castpd_ps(_mm256_unpacklo_pd(lo, hi));
      u[g + 2 * h + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(lo, hi));
    }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    r[j].v = _mm256_permute2f128_ps(u[j], u[4 + j], 0x20);
    r[4 + j].v = _mm256_permute2f128_ps(u[j], u[4 + j], 0x31);
  }
}

// p[2 * i] for i < n, n > 0, in an order that in_order puts right; p[2 * n - 2] is the last that is
// touched.
inline Vec load_even(const float* p, int64_t n) {
  const bool whole = n == 8;
  const __m256 a = whole ? Vec::load(p).v : Vec::load(p, n > 4 ? 8 : 2 * n - 1).v;
  const __m256 b = whole ? Vec::load(p + 7).v : Vec::load(p + 7, n > 4 ? 2 * n - 8 : 0).v;
  return {_mm256_shuffle_ps(a, b, _MM_SHUFFLE(3, 1, 2, 0))};
}
inline Vec in_order(Vec a) {  // twice is not at all
  const __m256d pairs = _mm256_castps_pd(a.v);
  return {_mm256_castpd_ps(_mm256_permute4x64_pd(pairs, _MM_SHUFFLE(3, 1, 2, 0)))};
}
// a[0] b[0] a[1] b[1] ...: the first half to a, the second to b.
inline void interleave(Vec& a, Vec& b) {
  const __m256 lo = _mm256_unpacklo_ps(a.v, b.v), hi = _mm256_unpackhi_ps(a.v, b.v);
  a.v = _mm256_permute2f128_ps(lo, hi, 0x20);
  b.v = _mm256_permute2f128_ps(lo, hi, 0x31);
}

// p[i] for i < n, the lanes of rest from there on.
inline Vec load_or(const float* p, int64_t n, Vec rest) {
  const __m256 here = _mm256_castsi256_ps(Vec::first(n));
  return {_mm256_blendv_ps(rest.v, Vec::load(p, n).v, here)};
}

}  // namespace
}  // namespace dlkernels::cpu
