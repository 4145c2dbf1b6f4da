// The register-tile micro-kernel of GEMM, direct convolution and Winograd:
//   C[r, v] += sum_k A[r, k] * B[k, v]
// R elements of A are broadcast against V vectors of B. R * V accumulators stay in registers.
#pragma once
#include "cpu/simd/vec.h"

namespace dlkernels::cpu {
namespace {

constexpr int64_t kTileCols = kTileVecs * Vec::kWidth;

// Which part of a tile's sum this is.
struct Step {
  bool first = true, last = true;
};

template <int R, int V>
struct Tile {
  Vec c[R][V];

  Tile() {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) c[r][v] = Vec::zero();
  }

  // Column k of A is contiguous, a_step from the next: a packed panel, or columns of a matrix.
  __attribute__((always_inline)) void add_columns(const float* a, int64_t a_step, const float* b,
                                                  int64_t b_step, int64_t depth) {
    for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_step)
      add(b, [&](int r) { return a[r]; });
  }

  // A's rows `pitch` apart, each along memory. Three rows share a pointer: x86 adds one or two
  // times the pitch for free.
  __attribute__((always_inline)) void add_rows(const float* a, int64_t pitch, const float* b,
                                               int64_t b_step, int64_t depth) {
    const float* p[(R + 2) / 3];
#pragma GCC unroll 5
    for (int g = 0; g < (R + 2) / 3; ++g) p[g] = a + 3 * g * pitch;
    for (int64_t k = 0; k < depth; ++k, b += b_step) {
      add(b, [&](int r) { return p[r / 3][r % 3 * pitch]; });
#pragma GCC unroll 5
      for (int g = 0; g < (R + 2) / 3; ++g) ++p[g];
    }
  }

  // Whether no sum is NaN or infinite: 0 times it is 0.
  __attribute__((always_inline)) bool is_finite() const {
    Vec zeros[2] = {Vec::zero(), Vec::zero()};
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) zeros[r % 2] = fma(c[r][v], Vec::zero(), zeros[r % 2]);
    return reduce_sum(zeros[0] + zeros[1]) == 0;
  }

  // The epilogue, to rows m + r and columns n to n + cols of C. A short sum is over before many
  // branches are, so they stand outside the loops.
  template <class T = float>
  __attribute__((always_inline)) void store(const GemmOutput& out, int64_t m, int64_t n,
                                            int64_t cols = V * Vec::kWidth, Step step = {}) {
    T* const to = static_cast<T*>(out.c) + m * out.row + n;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      store_lanes(v, out, m, n + v * Vec::kWidth, to + v * Vec::kWidth,
                  min(cols - v * Vec::kWidth, Vec::kWidth), step);
  }

 private:
  template <class T>
  __attribute__((always_inline)) void store_lanes(int v, const GemmOutput& out, int64_t m,
                                                  int64_t n, T* to, int64_t lanes, Step step) {
    if (!step.first || out.accumulate)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) c[r][v] = c[r][v] + load(to + r * out.row, lanes);
    if (step.last && out.row_bias)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) c[r][v] = c[r][v] + Vec::fill(out.row_bias[m + r]);
    if (step.last && out.col_bias) {
      const Vec bias = load(out.col_bias + n, lanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) c[r][v] = c[r][v] + bias;
    }
    if (step.last && out.relu)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) c[r][v] = max(Vec::zero(), c[r][v]);  // keeps NaN and -0.0
    if (lanes == Vec::kWidth)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) c[r][v].store(to + r * out.row);
    else
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) c[r][v].store(to + r * out.row, lanes);
  }

  template <class A>
  __attribute__((always_inline)) void add(const float* b, const A& a) {
    Vec bk[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) bk[v] = Vec::load(b + v * Vec::kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec ak = Vec::fill(a(r));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) c[r][v] = fma(ak, bk[v], c[r][v]);
    }
  }
};

// f<R>() for R = rows, 1 to kMost: a tile knows how many rows it has when it is compiled.
template <int kMost = kTileRows, class F>
__attribute__((always_inline)) static inline void with_rows(int64_t rows, const F& f) {
  if constexpr (kMost > 1)
    if (rows < kMost) return with_rows<kMost - 1>(rows, f);
  f.template operator()<kMost>();
}

// f<R, V>(i) for the rows i to i + R of as few tiles as make up [0, rows), all of about one height,
// and as many vectors as `cols` columns of a panel need.
template <class F>
__attribute__((always_inline)) static inline void each_tile(int64_t rows, int64_t cols,
                                                            const F& f) {
  static_assert(kTileVecs == 2);
  const int64_t count = ceil_div(rows, kTileRows);
  for (int64_t t = 0, i = 0, end; t < count; ++t, i = end) {
    end = rows * (t + 1) / count;
    with_rows(end - i, [&]<int R>() __attribute__((always_inline)) {
      cols > Vec::kWidth ? f.template operator()<R, 2>(i) : f.template operator()<R, 1>(i);
    });
  }
}

}  // namespace
}  // namespace dlkernels::cpu
