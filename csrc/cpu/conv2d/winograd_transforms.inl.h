// Winograd's transforms of tiles, from the points of the polynomials (Winograd, Arithmetic
// Complexity of Computations, 1980; Lavin and Gray, Fast Algorithms for Convolutional Neural
// Networks, 2016).
#pragma once
#include "cpu/simd/vec.h"

namespace dlkernels::cpu {
namespace {

template <int Rows, int Cols>
struct Coefficients {
  float at[Rows][Cols] = {};

  constexpr Coefficients<Cols, Rows> transposed() const {
    Coefficients<Cols, Rows> t;
    for (int i = 0; i < Rows; ++i)
      for (int j = 0; j < Cols; ++j) t.at[j][i] = at[i][j];
    return t;
  }
};

// For the points p_0 .. p_M and infinity. 1/2 and -2 with M = 4 round less than the usual 2 and -2.
template <int M>
struct WinogradMatrices {
  static constexpr int kSide = M + 2, kPoints = M + 1;
  static constexpr double kPoint[] = {0, 1, -1, 0.5, -2};
  Coefficients<kSide, kSide> in;  // B': row j is the polynomial that is 0 at all points but p_j
  Coefficients<kSide, 3> weight;  // G: row j is 1, p_j, p_j^2, over that polynomial at p_j
  Coefficients<M, kSide> out;     // A': column j is 1, p_j, p_j^2 ...

  constexpr WinogradMatrices() {
    for (int j = 0; j <= kPoints; ++j) {
      double polynomial[kSide + 1] = {1}, scale = 1, power = 1;
      int degree = 0;
      for (int k = 0; k < kPoints; ++k) {
        if (k == j) continue;
        ++degree;
        for (int i = degree; i > 0; --i)
          polynomial[i] = polynomial[i - 1] - kPoint[k] * polynomial[i];
        polynomial[0] *= -kPoint[k];
        if (j < kPoints) scale *= kPoint[j] - kPoint[k];
      }
      for (int i = 0; i < kSide; ++i) in.at[j][i] = static_cast<float>(polynomial[i]);
      for (int i = 0; i < (M > 3 ? M : 3); ++i) {
        const double p = j < kPoints ? power : 0;
        if (i < 3) weight.at[j][i] = static_cast<float>(j < kPoints ? p / scale : i == 2);
        if (i < M) out.at[i][j] = static_cast<float>(j < kPoints ? p : i == M - 1);
        if (j < kPoints) power *= kPoint[j];
      }
    }
  }
};

template <int M>
struct Winograd {
  static constexpr WinogradMatrices<M> kMatrices{};
  static constexpr auto kIn = kMatrices.in;
  static constexpr auto kWeight = kMatrices.weight;
  static constexpr auto kOut = kMatrices.out;
  static constexpr auto kWeightT = kWeight.transposed();
  static constexpr auto kOutT = kOut.transposed();
};

// sum_i row[i] * v[i], for a row known when compiling: no products with 0 and 1.
template <int N>
__attribute__((always_inline)) static inline Vec combine(const float (&row)[N], const Vec (&v)[N]) {
  int first = 0;  // begin with a coefficient of 1 where there is one
#pragma GCC unroll 6
  for (int i = N - 1; i >= 0; --i)
    if (row[i] != 0 && (row[i] == 1 || row[first] != 1)) first = i;
  Vec sum = row[first] == 1 ? v[first] : v[first] * Vec::fill(row[first]);
#pragma GCC unroll 6
  for (int i = 0; i < N; ++i) {
    if (i == first || row[i] == 0) continue;
    sum = row[i] == 1 ? sum + v[i] : row[i] == -1 ? sum - v[i] : fma(Vec::fill(row[i]), v[i], sum);
  }
  return sum;
}

// to(i, j, element) of m * x * m', from(i, j) being x.
template <const auto& m, class From, class To>
__attribute__((always_inline)) static inline void transform(const From& from, const To& to) {
  constexpr int R = sizeof m.at / sizeof m.at[0], C = sizeof m.at[0] / sizeof(float);
  Vec half[R][C];
#pragma GCC unroll 6
  for (int j = 0; j < C; ++j) {
    Vec column[C];
#pragma GCC unroll 6
    for (int i = 0; i < C; ++i) column[i] = from(i, j);
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) half[i][j] = combine(m.at[i], column);
  }
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 6
    for (int j = 0; j < R; ++j) to(i, j, combine(m.at[j], half[i]));
}

}  // namespace
}  // namespace dlkernels::cpu
