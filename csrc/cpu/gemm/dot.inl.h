// GEMM for few rows: C[m, n] = act(sum_k A[m, k] * B[n, k] + bias), both operands contiguous along
// k. Lanes run along k and are summed at the end, so nothing is packed. It reads the longer operand
// once, and the bandwidth of that bounds it.
#pragma once
#include "cpu/simd/vec.h"
#include "cpu/gemm/tile.inl.h"

namespace dlkernels::cpu {
namespace {

// R rows of A times S rows of B, both along k: a vector of k at a time, sums across lanes at the
// end. Rows that do not exist repeat the last one.
template <class T, int R, int S>
static void dot_tile(const Matrix& a, const Matrix& b, int64_t K, const GemmOutput& out, int64_t m,
                     int64_t n, int64_t rows, int64_t cols) {
  constexpr int64_t W = Vec::kWidth, kGroups = (R * S + W - 1) / W;
  const T *pa[R], *pb[S];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
    pa[r] = static_cast<const T*>(a.data) + (m + min(r, rows - 1)) * a.row;
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s)
    pb[s] = static_cast<const T*>(b.data) + (n + min(s, cols - 1)) * b.row;
  Vec sums[kGroups][W];
#pragma GCC unroll 16
  for (int i = 0; i < kGroups * W; ++i) sums[i / W][i % W] = Vec::zero();
  each_vector(0, K, [&](int64_t k, int64_t lanes) __attribute__((always_inline)) {
    Vec bk[S];
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) bk[s] = load(pb[s] + k, lanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec ak = load(pa[r] + k, lanes);
#pragma GCC unroll 8
      for (int s = 0; s < S; ++s) {
        Vec& sum = sums[(r * S + s) / W][(r * S + s) % W];
        sum = fma(ak, bk[s], sum);
      }
    }
  });
  float c[kGroups * W];
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) {
    transpose(sums[g]);
    Vec z = sums[g][0];
#pragma GCC unroll 16
    for (int i = 1; i < W; ++i) z = z + sums[g][i];
    z.store(c + g * W);
  }
  for (int64_t r = 0; r < rows; ++r)
    each_vector(0, cols, [&](int64_t s, int64_t lanes) {
      Tile<1, 1> tile;
      tile.c[0][0] = load(c + r * S + s, lanes);
      tile.template store<T>(out, m + r, n + s, lanes);
    });
}

template <class T, int R, int S>
static void dot_tiles(const Matrix& a, const Matrix& b, int64_t K, const GemmOutput& out,
                      const GemmChunk& chunk) {
  const auto tile = [&](int64_t m, int64_t n) {
    dot_tile<T, R, S>(a, b, K, out, m, n, min(chunk.m1 - m, R), min(chunk.n1 - n, S));
  };
  // The operand with more rows is read once.
  if (chunk.m1 - chunk.m0 > chunk.n1 - chunk.n0) {
    for (int64_t m = chunk.m0; m < chunk.m1; m += R)
      for (int64_t n = chunk.n0; n < chunk.n1; n += S) tile(m, n);
  } else {
    for (int64_t n = chunk.n0; n < chunk.n1; n += S)
      for (int64_t m = chunk.m0; m < chunk.m1; m += R) tile(m, n);
  }
}

// Tiles of as many sums as registers hold and transpositions suit.
template <class T>
static void dot(const Matrix& a, const Matrix& b, int64_t K, const GemmOutput& out,
                const GemmChunk& chunk) {
  const int64_t M = chunk.m1 - chunk.m0, N = chunk.n1 - chunk.n0;
  if (M == 1) return dot_tiles<T, 1, 8>(a, b, K, out, chunk);
  if (N == 1) return dot_tiles<T, 8, 1>(a, b, K, out, chunk);
  if constexpr (Vec::kWidth == 16) {
    if (ceil_div(N, 5) * 5 < ceil_div(N, 4) * 4) return dot_tiles<T, 3, 5>(a, b, K, out, chunk);
    return dot_tiles<T, 4, 4>(a, b, K, out, chunk);
  } else {
    if (M == 2 || Vec::kWidth == 4) return dot_tiles<T, 2, 4>(a, b, K, out, chunk);
    return dot_tiles<T, 4, 3>(a, b, K, out, chunk);
  }
}

static void gemm_dot(const Matrix& a, const Matrix& b, int64_t K, const GemmOutput& out,
                     const GemmChunk& chunk) {
  with_type(a.dtype, [&]<class T>() { dot<T>(a, b, K, out, chunk); });
}

}  // namespace
}  // namespace dlkernels::cpu
