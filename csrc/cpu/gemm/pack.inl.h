// Packed panels of the GEMM: panel[k * W + i] = operand(i, k) for W rows i, zeros for rows that do
// not exist. Panels are float32, whatever the operand's dtype.
#pragma once
#include "cpu/simd/vec.h"

namespace dlkernels::cpu {
namespace {

// Elements read through the gradient of a ReLU: 0 where relu_y <= 0 (so a NaN in y lets it pass).
template <class T>
struct MaskedInput {
  const T *x, *relu_y;

  explicit MaskedInput(const void* x, const void* relu_y = nullptr)
      : x(static_cast<const T*>(x)), relu_y(static_cast<const T*>(relu_y)) {}

  float at(int64_t i) const { return relu_y && relu_y[i] <= 0 ? 0.0f : static_cast<float>(x[i]); }
  Vec at(int64_t i, int64_t n) const {
    const Vec v = load(x + i, n);
    return relu_y ? select(load(relu_y + i, n) <= Vec::zero(), Vec::zero(), v) : v;
  }
};

// to[j * to_pitch + i] = from[i * from_pitch + j] for i < rows, j < cols.
template <class T, class To>
static void transpose_copy(const MaskedInput<T>& s, int64_t from, int64_t from_pitch, int64_t rows,
                           int64_t cols, To* to, int64_t to_pitch) {
  constexpr int64_t V = Vec::kWidth;
  for (int64_t i0 = 0; i0 < rows; i0 += V)
    for (int64_t j0 = 0; j0 < cols; j0 += V) {
      const int64_t lanes = min(rows - i0, V), n = min(cols - j0, V);
      Vec r[V];
#pragma GCC unroll 16
      for (int64_t i = 0; i < V; ++i)
        r[i] = i < lanes ? s.at(from + (i0 + i) * from_pitch + j0, n) : Vec::zero();
      transpose(r);
      To* const p = to + j0 * to_pitch + i0;
#pragma GCC unroll 16
      for (int64_t j = 0; j < V; ++j)
        if (j < n) store(r[j], p + j * to_pitch, lanes);
    }
}

// The same into a panel, whose width is known when compiling: panel(i, k) = s[from + i * pitch +
// k].
template <int64_t W, class T>
static void pack_rows(const MaskedInput<T>& s, int64_t from, int64_t pitch, int64_t rows,
                      int64_t depth, float* panel) {
  constexpr int64_t V = Vec::kWidth;
  for (int64_t i0 = 0; i0 < W; i0 += V) {
    const int64_t lanes = min(W - i0, V);
    for (int64_t k = 0; k < depth; k += V) {
      const int64_t n = min(depth - k, V);
      Vec r[V];
#pragma GCC unroll 16
      for (int64_t i = 0; i < V; ++i)
        r[i] = i0 + i < rows ? s.at(from + (i0 + i) * pitch + k, n) : Vec::zero();
      transpose(r);
      float* p = panel + k * W + i0;
      if (n == V) {
#pragma GCC unroll 16
        for (int64_t j = 0; j < V; ++j) store(r[j], p + j * W, lanes);
      } else {
        for (int64_t j = 0; j < n; ++j) store(r[j], p + j * W, lanes);
      }
    }
  }
}

// Contiguous rows: row[i] = s[offset + i] for i < n, zeros from n to `lanes`.
template <class T, class To>
static inline void pack_run(const MaskedInput<T>& s, int64_t offset, int64_t n, int64_t lanes,
                            To* row) {
  for (int64_t i = 0; i < lanes; i += Vec::kWidth) {
    const int64_t have = i < n ? min(n - i, Vec::kWidth) : 0;
    const Vec v = have ? s.at(offset + i, have) : Vec::zero();
    store(v, row + i, min(lanes - i, Vec::kWidth));
  }
}

// panel(i, k) = s[from + i * row + k * col] for i < rows, k < depth.
template <int64_t W, class T>
static void pack_panel(const MaskedInput<T>& s, int64_t from, int64_t row, int64_t col,
                       int64_t rows, int64_t depth, float* panel) {
  if (row == 1) {
    for (int64_t k = 0; k < depth; ++k) pack_run(s, from + k * col, rows, W, panel + k * W);
  } else if (col == 1) {
    pack_rows<W>(s, from, row, rows, depth, panel);
  } else {
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t i = 0; i < W; ++i)
        panel[k * W + i] = i < rows ? s.at(from + i * row + k * col) : 0.0f;
  }
}

// to[i * row + k * col] = panel[k * pitch + i] for i < rows, k < depth.
template <class To>
static void unpack_panel(const float* panel, int64_t pitch, int64_t rows, int64_t depth, To* to,
                         int64_t row, int64_t col) {
  if (col == 1) return transpose_copy(MaskedInput<float>(panel), 0, pitch, depth, rows, to, row);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < depth; ++k) to[i * row + k * col] = To(panel[k * pitch + i]);
}

}  // namespace
}  // namespace dlkernels::cpu
