// gemm: both tiles, split and whole sums, every layout and alignment, every epilogue; and the plan.
#include "cuda_test.h"

#include "cuda/gemm.cu"

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
    std::printf(
        "  %zu bytes, %ldx%ldx%ld inner %d %d relu %d masked %d tf32 %d pad %d shift %d "
        "large %d splits %d: %d\n",
        sizeof(T), c.M, c.N, c.K, c.a_inner, c.b_inner, c.relu, c.masked, c.tf32, c.pad, c.shift,
        c.plan.large, c.plan.splits, wrong);
  return wrong;
}

constexpr std::pair<bool, bool> kLayouts[] = {{true, true}, {true, false}, {false, false}};

const CudaTest layouts_test("gemm: layouts, alignments, tiles", [] {
  return each_type([](auto zero) {
    using T = decltype(zero);
    int wrong = 0;
    for (const auto& [a_inner, b_inner] : kLayouts) {
      for (const bool tf32 : {false, true}) {
        if (tf32 && sizeof(T) == 2) continue;
        wrong +=
            wrong_product<T>({80, 72, 208, a_inner, b_inner, true, false, tf32, 0, 0, {false, 1}});
        wrong +=
            wrong_product<T>({136, 40, 200, a_inner, b_inner, false, true, tf32, 8, 0, {true, 1}});
      }
      // 4 and 2 bytes, and tails of a pack
      wrong +=
          wrong_product<T>({21, 11, 70, a_inner, b_inner, false, true, false, 2, 0, {false, 1}});
      wrong +=
          wrong_product<T>({13, 67, 33, a_inner, b_inner, true, true, false, 0, 1, {false, 1}});
    }
    return wrong;
  });
});

const CudaTest splits_test("gemm: split sums", [] {
  return each_type([](auto zero) {
    using T = decltype(zero);
    int wrong = 0;
    for (const auto& [a_inner, b_inner] : kLayouts) {
      wrong +=
          wrong_product<T>({40, 24, 456, a_inner, b_inner, true, true, false, 0, 0, {false, 3}});
      wrong +=
          wrong_product<T>({33, 70, 90, a_inner, b_inner, true, false, false, 1, 0, {false, 4}});
    }
    wrong += wrong_product<T>({130, 8, 300, true, true, false, false, false, 0, 0, {true, 2}});
    return wrong;
  });
});

const CudaTest empty_test("gemm: nothing", [] {
  return each_type([](auto zero) {
    using T = decltype(zero);
    int wrong = 0;
    for (const auto& [a_inner, b_inner] : kLayouts) {
      wrong += wrong_product<T>({5, 7, 0, a_inner, b_inner, true, false, false, 0, 0, {false, 1}});
      wrong += wrong_product<T>({0, 7, 9, a_inner, b_inner, true, false, false, 0, 0, {false, 1}});
      wrong +=
          wrong_product<T>({70, 0, 40, a_inner, b_inner, true, false, false, 0, 0, {false, 1}});
      wrong += wrong_product<T>({1, 1, 1, a_inner, b_inner, true, false, false, 0, 0, {false, 1}});
    }
    return wrong;
  });
});

}  // namespace
}  // namespace dlkernels::test
