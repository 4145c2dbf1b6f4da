#include "kernels_test.h"

using namespace dlkernels;
using namespace dlkernels::test;

// One product, all parts of it, against a double-precision loop.
static int product(const cpu::Kernels& t, int64_t M, int64_t N, int64_t K, bool a_t, bool b_t) {
  Buffer<float> a(M * K, 1), mask(M * K, 2), b(N * K, 3), c(M * N, 4), before(M * N, 4);
  Buffer<float> row_bias(M, 5), col_bias(N, 6), sums(M, 7), sums_before(M, 7);
  Buffer<float> memory(t.gemm_scratch);
  float* scratch = memory.data();
  int wrong = 0;
  for (int options = 0; options < 8; ++options) {
    const bool masked = options & 1, relu = options & 2, accumulate = options & 4;
    const cpu::Matrix A = {a.data(), a_t ? 1 : K, a_t ? M : 1, masked ? mask.data() : nullptr};
    const cpu::Matrix B = {b.data(), b_t ? 1 : K, b_t ? N : 1, nullptr};
    for (int64_t i = 0; i < M * N; ++i) c[i] = before[i];
    for (int64_t i = 0; i < M; ++i) sums[i] = sums_before[i];
    cpu::GemmOutput out = {.c = c.data(), .row = N};
    if (relu) out.row_bias = row_bias.data(), out.col_bias = col_bias.data();
    out.relu = relu, out.accumulate = accumulate, out.row_sums = sums.data();
    const int64_t m = M / 2 / t.gemm_tile_rows * t.gemm_tile_rows;  // two parts
    t.gemm(A, B, K, out, {0, m, 0, N}, scratch);
    t.gemm(A, B, K, out, {m, M, 0, N}, scratch);
    for (int64_t i = 0; i < M; ++i) {
      const auto at = [&](int64_t k) {
        const int64_t j = i * A.row + k * A.col;
        return masked && mask[j] <= 0 ? 0.0 : a[j];
      };
      double row = accumulate ? sums_before[i] : 0;
      for (int64_t k = 0; k < K; ++k) row += at(k);
      wrong += !close(sums[i], row, 1e-6 * (K + 4));
      for (int64_t j = 0; j < N; ++j) {
        double z = accumulate ? before[i * N + j] : 0;
        for (int64_t k = 0; k < K; ++k) z += at(k) * b[j * B.row + k * B.col];
        if (relu) z = std::fmax(0, z + row_bias[i] + col_bias[j]);
        wrong += !close(c[i * N + j], z, 1e-6 * (K + 4));
      }
    }
  }
  if (wrong)
    std::printf("M=%ld N=%ld K=%ld %d%d: %d\n", long(M), long(N), long(K), a_t, b_t, wrong);
  return wrong;
}

static int gemm(const cpu::Kernels& t) {
  int wrong = 0;
  for (int64_t M : {0, 1, 5, 6, 7, 13, 14, 15, 29})
    for (int64_t N : {0, 1, 4, 9, 15, 16, 17, 31, 33, 67})
      for (int64_t K : {0, 1, 3, 16, 17, 67})
        wrong += product(t, M, N, K, (M + K) % 2, (N + K) % 2) != 0;
  for (const bool a_t : {false, true}) wrong += product(t, 180, 530, 300, a_t, !a_t) != 0;
  return wrong;
}
static const Test gemm_test("gemm", gemm);
