// gemm: both tiles, split and whole sums, every layout and alignment, every epilogue; and the plan.
#include "cuda_test.h"

#include "cuda/gemm/gemm.cu"

namespace dlkernels::test {
namespace {

// A (rows, K) operand whose lines are its rows or its columns, `pad` numbers longer than they need
// be and `shift` numbers behind an aligned address; a NaN lies where nothing may be read.
template <class T>
struct Operand {
  CudaBuffer<T> data;
  cuda::Matrix matrix;

  Operand(int64_t rows, int64_t K, bool k_inner, int pad, int shift, uint32_t seed)
      : data(size(rows, K, k_inner, pad, shift)) {
    const int64_t stride = (k_inner ? K : rows) + pad;
    T* first = data.data() + shift;
    matrix = {first, k_inner ? stride : 1, k_inner ? 1 : stride};
    CudaBuffer<float> values(rows * K, seed);
    for (int64_t i = 0; i < rows * K; ++i)
      first[i / K * matrix.row + i % K * matrix.col] = cuda::from_float<T>(values[i]);
  }
  // Whole packs, so that the buffer is aligned even where it ends at a guard page.
  static int64_t size(int64_t rows, int64_t K, bool k_inner, int pad, int shift) {
    const int64_t lines = k_inner ? rows : K, line = k_inner ? K : rows;
    return (shift + lines * (line + pad) + 15) / 16 * 16;
  }
  double at(int64_t i, int64_t k) {
    return cuda::to_float(static_cast<const T*>(matrix.data)[i * matrix.row + k * matrix.col]);
  }
};

struct Case {
  int64_t M, N, K;
  bool a_inner, b_inner, relu, masked, tf32;
  int pad, shift;
  cuda::Plan plan;
};

template <class T>
int wrong_product(const Case& c) {
  Operand<T> a(c.M, c.K, c.a_inner, c.pad, c.shift, 1), b(c.N, c.K, c.b_inner, c.pad, c.shift, 2);
  CudaBuffer<T> bias(c.N, 3), mask(c.M * c.N, 4), y(c.M * c.N), sums(c.M);
  if (c.N > 0 && c.M > 1) mask[0] = cuda::from_float<T>(NAN), mask[1] = cuda::from_float<T>(-0.0f);
  cuda::Product p = {.dtype = kDType<T>,
                     .M = c.M,
                     .N = c.N,
                     .K = c.K,
                     .a = a.matrix,
                     .b = b.matrix,
                     .c = y.data(),
                     .bias = c.relu ? bias.data() : nullptr,
                     .mask = c.masked ? mask.data() : nullptr,
                     .row_sums = c.a_inner ? nullptr : sums.data(),
                     .relu = c.relu,
                     .allow_tf32 = c.tf32};
  CudaBuffer<float> workspace(cuda::workspace_bytes(c.plan, c.M, c.N) / 4);
  int wrong = cuda::gemm_by(p, c.plan, workspace.data(), nullptr) != 0;
  // Rounding to T, twice eps as numbers are; products in float32, or cut to TF32.
  const double of_sum = sizeof(T) == 4 && c.tf32 ? 0x1p-9 : 0x1p-23;
  for (int64_t m = 0; m < c.M; ++m) {
    double sum = 0, size = 0;
    for (int64_t k = 0; k < c.K; ++k) sum += a.at(m, k), size += std::fabs(a.at(m, k));
    if (!c.a_inner)
      wrong += !close(sums.at(m), sum, of_sum * size + 2 * kEps<T> * std::fabs(sum) + 1e-30);
    for (int64_t n = 0; n < c.N; ++n) {
      sum = size = 0;
      for (int64_t k = 0; k < c.K; ++k) {
        const double product = a.at(m, k) * b.at(n, k);
        sum += product, size += std::fabs(product);
      }
      if (c.relu) sum = std::fmax(sum + bias.at(n), 0), size += 1;
      if (c.masked && mask.at(m * c.N + n) <= 0) sum = size = 0;
      wrong += !close(y.at(m * c.N + n), sum, of_sum * size + 2 * kEps<T> * std::fabs(sum));
    }
  }
  if (wrong)
    std::fprintf(stderr,
                 "  %zu bytes, %ldx%ldx%ld inner %d %d relu %d masked %d tf32 %d pad %d shift %d "
                 "large %d splits %d: %d\n",
                 sizeof(T), c.M, c.N, c.K, c.a_inner, c.b_inner, c.relu, c.masked, c.tf32, c.pad,
                 c.shift, c.plan.large, c.plan.splits, wrong);
  return wrong;
}

constexpr std::pair<bool, bool> kLayouts[] = {{true, true}, {true, false}, {false, false}};

// Tensor cores are slow here: the large tile takes one layout a run, and there are six runs.
int turn() {
  static int runs = 0;
  return runs++ / 3 % 3;  // each_type asks three times a run
}

const CudaTest layouts_test("gemm: layouts, alignments, tiles", [] {
  return each_type([](auto zero) {
    using T = decltype(zero);
    constexpr bool kFloat = sizeof(T) == 4;
    constexpr int64_t kStep = 128 / sizeof(T);
    const auto [a_turn, b_turn] = kLayouts[turn()];
    int wrong = 0;
    wrong += wrong_product<T>(
        {136, 40, 3 * kStep + 8, a_turn, b_turn, false, true, kFloat, 8, 0, {true, 1}});
    wrong += wrong_product<T>(  // more steps than stages
        {48, 72, 5 * kStep + 8, a_turn, b_turn, true, false, kFloat, 0, 0, {false, 1}});
    if (kFloat)
      wrong += wrong_product<T>(
          {80, 136, kStep + 8, a_turn, b_turn, true, true, false, 0, 0, {true, 1}});
    for (const auto& [a_inner, b_inner] : kLayouts) {  // 4 and 2 bytes, and tails of a pack
      wrong += wrong_product<T>(
          {21, 11, kStep + 6, a_inner, b_inner, false, true, false, 2, 0, {false, 1}});
      wrong += wrong_product<T>(
          {13, 67, kStep / 2, a_inner, b_inner, true, true, false, 0, 1, {false, 1}});
    }
    return wrong;
  });
});

const CudaTest splits_test("gemm: split sums", [] {
  return each_type([](auto zero) {
    using T = decltype(zero);
    constexpr int64_t kStep = 128 / sizeof(T);
    int wrong = 0;
    for (const auto& [a_inner, b_inner] : kLayouts)
      wrong += wrong_product<T>(
          {40, 24, 2 * kStep + 8, a_inner, b_inner, true, true, false, 0, 0, {false, 3}});
    const auto [a_inner, b_inner] = kLayouts[turn()];
    wrong += wrong_product<T>(
        {33, 70, kStep + 3, a_inner, b_inner, true, false, true, 1, 0, {false, 4}});
    return wrong + wrong_product<T>(
                       {130, 8, kStep + 1, a_inner, b_inner, false, false, true, 0, 0, {true, 2}});
  });
});

const CudaTest empty_test("gemm: nothing", [] {
  return each_type([](auto zero) {
    using T = decltype(zero);
    int wrong = 0;
    for (const auto& [a_inner, b_inner] : kLayouts) {
      wrong += wrong_product<T>({5, 7, 0, a_inner, b_inner, true, false, false, 0, 0, {false, 1}});
      wrong += wrong_product<T>({0, 7, 9, a_inner, b_inner, true, false, false, 0, 0, {false, 1}});
      wrong += wrong_product<T>({70, 0, 9, a_inner, b_inner, true, false, false, 0, 0, {false, 1}});
      wrong += wrong_product<T>({1, 1, 1, a_inner, b_inner, true, false, false, 0, 0, {false, 1}});
    }
    return wrong;
  });
});

// Exact float32: an error that does not grow with K faster than float32's own, infinities and NaNs
// where float32 has them, even those whose bits rounding could turn into something else, and exact
// numbers beside them.
const CudaTest exact_test("gemm: float32 is float32", [] {
  constexpr int64_t K = 512;
  CudaBuffer<float> a(8 * K, 1), b(8 * K, 2), c(64);
  for (int64_t i = 0; i < 8 * K; ++i) a[i] = std::fabs(a[i]), b[i] = std::fabs(b[i]);
  const cuda::Product p = {.dtype = cuda::DType::kFloat32,
                           .M = 8,
                           .N = 8,
                           .K = K,
                           .a = {a.data(), K, 1},
                           .b = {b.data(), K, 1},
                           .c = c.data()};
  a[0] = INFINITY, a[K] = -INFINITY, a[2 * K] = NAN;
  a[5 * K] = 0x1.fffffep127f, b[6 * K + 1] = INFINITY;
  for (int i = 0; i < 8; ++i) b[i * K] = i % 2 ? 0.5f : 0.3f;  // without a small part, and with one
  const uint32_t odd_nans[] = {0x7fffffff, 0x7f800001};
  std::memcpy(&a[3 * K], &odd_nans[0], 4);
  std::memcpy(&a[4 * K], &odd_nans[1], 4);
  int wrong = cuda::gemm_by(p, {false, 1}, nullptr, nullptr) != 0;
  for (int64_t m = 0; m < 8; ++m)
    for (int64_t n = 0; n < 8; ++n) {
      double sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += double{a[m * K + k]} * b[n * K + k];
      const auto exact = static_cast<float>(sum);
      const double allowed =
          std::isfinite(exact) ? kEps<float> * std::sqrt(double{K}) * std::fabs(sum) : 0;
      wrong += !close(c[m * 8 + n], exact, allowed);
    }
  return wrong;
});

const CudaTest plan_test("gemm: plan, tiles and workspace", [] {
  int wrong = 0;
  for (const int64_t M : {1, 64, 256, 4096, 1 << 20})
    for (const int64_t N : {1, 10, 256, 4096})
      for (const int64_t K : {0, 1, 784, 65536})
        for (const double rate : {150.0, 1000.0}) {
          const int64_t steps = cuda::ceil_div(K, 32);
          const auto plan = cuda::choose(M, N, K, rate, 32, 132);
          wrong += plan.splits < 1 || plan.splits > std::max<int64_t>(steps, 1);
          const int64_t bytes = cuda::workspace_bytes(plan, M, N);
          wrong += (plan.splits > 1) != (bytes > 0) || bytes % 16 != 0 || bytes > int64_t{1} << 28;
        }
  wrong += !cuda::choose(4096, 4096, 4096, 1000, 64, 132).large;
  wrong += cuda::choose(4096, 4096, 4096, 1000, 64, 132).splits != 1;
  wrong += cuda::choose(128, 784, 65536, 150, 32, 132).splits < 4;  // a weight's gradient
  for (const auto& [m, n] : {std::pair{1u, 1u}, {3u, 5u}, {8u, 3u}, {19u, 7u}}) {
    std::vector<int> seen(m * n);
    for (unsigned i = 0; i < m * n; ++i) {
      unsigned tile_m, tile_n;
      cuda::TileGrid{m, n}.find(i, tile_m, tile_n);
      if (tile_m < m && tile_n < n) ++seen[tile_m * n + tile_n];
    }
    for (const int times : seen) wrong += times != 1;
  }
  // Offsets beyond 2^31 numbers: C's parts, and the last run of an operand.
  const cuda::Parts parts = cuda::parts_of({true, 64}, 100'000, 100'000, nullptr);
  wrong += parts.bytes() != 64 * (parts.rows * parts.cols + parts.rows) * 4;
  wrong += parts.bytes() < int64_t{64} * 100'000 * 100'000 * 4;
  char any;
  const cuda::MatrixSource<cuda::bf16, true> source = {reinterpret_cast<cuda::bf16*>(&any), 100'000,
                                                       100'000, 100'000, 16};
  const auto access = source.access(source.run(99'999), source.at(99'996));
  wrong += reinterpret_cast<const char*>(access.from) - &any != 2 * (99'999ll * 100'000 + 99'996);
  return wrong + (access.valid != 4) +
         (source.access(source.run(100'000), source.at(0)).valid != 0);
});

}  // namespace
}  // namespace dlkernels::test
