// Vec for AVX-512: 16 floats. Same names as simd_avx2.h and simd_baseline.h.
#pragma once
// GCC 12's own header leaves the unused operand of an unmasked intrinsic undefined, and warns.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>

#include "cpu/simd/reduced_float.h"

namespace dlkernels::cpu {
namespace {

// GEMM register tile: 28 accumulators, two vectors of B and one broadcast of A fill 31 of 32.
constexpr int64_t kTileRows = 14;
constexpr int64_t kTileVecs = 2;

struct Vec {
  static constexpr int64_t kWidth = 16;
  using Mask = __mmask16;
  __m512 v;

  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec fill(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  static Vec load(const BFloat16* p, int64_t n = kWidth) {
    const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(load_halves(p, n)), 16);
    return {_mm512_castsi512_ps(bits)};
  }
  static Vec load(const Float16* p, int64_t n = kWidth) {
    return {_mm512_cvtph_ps(load_halves(p, n))};
  }
  void store(BFloat16* p, int64_t n = kWidth) const {
    const __m512i bits = _mm512_castps_si512(v), odd = _mm512_slli_epi32(bits, 15);
    const __m512i half = _mm512_add_epi32(_mm512_set1_epi32(0x7fff), _mm512_srli_epi32(odd, 31));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(1 << 22));
    const Mask nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_mov_epi32(_mm512_add_epi32(bits, half), nan, quiet);
    store_halves(_mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)), p, n);
  }
  void store(Float16* p, int64_t n = kWidth) const {
    store_halves(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), p, n);
  }
  // Lanes as bytes: exact for whole numbers from 0 to 255.
  static Vec load_bytes(const uint8_t* p, int64_t n) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(n), p)))};
  }
  void store_bytes(uint8_t* p, int64_t n) const {
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v));
    if (n == 16)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
    else
      _mm_mask_storeu_epi8(p, first(n), bytes);
  }
  static __m256i load_halves(const void* p, int64_t n) {
    return _mm256_maskz_loadu_epi16(first(n), p);
  }
  static void store_halves(__m256i v, void* p, int64_t n) {
    _mm256_mask_storeu_epi16(p, first(n), v);
  }
  static Mask first(int64_t n) { return static_cast<Mask>((1u << n) - 1); }
};
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }                // a > b ? a : b
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
inline Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT)}; }
// a * 2^n for whole numbers n below 128.
inline Vec ldexp(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }

// Comparisons are false where a lane is NaN; is_nan finds those.
inline Vec::Mask operator>(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
inline Vec::Mask operator<=(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ); }
inline Vec::Mask operator==(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
inline Vec::Mask is_nan(Vec a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q); }
inline Vec select(Vec::Mask m, Vec yes, Vec no) { return {_mm512_mask_blend_ps(m, no.v, yes.v)}; }

inline float reduce_sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }

// r[i].lane[j] <-> r[j].lane[i]: 2x2 blocks of floats, then of pairs, then of 128-bit quarters.
inline void transpose(Vec (&r)[16]) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  __m512 u[16];  // u[4g + j]: column 4q + j of rows 4g .. 4g+3, for each quarter q
#pragma GCC unroll 4
  for (int g = 0; g < 16; g += 4)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m512d lo = _mm512_castps_pd(t[g + h]), hi = _mm512_castps_pd(t[g + h + 2]);
      u[g + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi));
      u[g + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi));
    }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 a = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88);  // quarters 0 2 | 0 2
    const __m512 b = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88);
    const __m512 c = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd);  // quarters 1 3 | 1 3
    const __m512 d = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xdd);
    r[j].v = _mm512_shuffle_f32x4(a, b, 0x88);
    r[8 + j].v = _mm512_shuffle_f32x4(a, b, 0xdd);
    r[4 + j].v = _mm512_shuffle_f32x4(c, d, 0x88);
    r[12 + j].v = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
}

// p[2 * i] for i < n, n > 0, in an order that in_order puts right; p[2 * n - 2] is the last that is
// touched.
inline Vec load_even(const float* p, int64_t n) {
  const __m512 a = Vec::load(p, n > 8 ? 16 : 2 * n - 1).v;
  const __m512 b = Vec::load(p + 15, n > 8 ? 2 * n - 16 : 0).v;
  const __m512i lanes =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31);
  return {_mm512_permutex2var_ps(a, lanes, b)};
}
inline Vec in_order(Vec a) { return a; }
// a[0] b[0] a[1] b[1] ...: the first half to a, the second to b.
inline void interleave(Vec& a, Vec& b) {
  const __m512i lo = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i hi = _mm512_add_epi32(lo, _mm512_set1_epi32(8));
  const __m512 x = a.v;
  a.v = _mm512_permutex2var_ps(x, lo, b.v);
  b.v = _mm512_permutex2var_ps(x, hi, b.v);
}

// p[i] for i < n, the lanes of rest from there on.
inline Vec load_or(const float* p, int64_t n, Vec rest) {
  return {_mm512_mask_loadu_ps(rest.v, Vec::first(n), p)};
}

}  // namespace
}  // namespace dlkernels::cpu
