// gemm: the kernel for a layout of the operands, and the plan.
#include "cuda/gemm/gemm.cuh"

namespace dlkernels::cuda {

namespace {

Plan plan_of(const Product& p) {
  // Multiply-adds a cycle of a multiprocessor, as measured elsewhere for these instructions.
  const double rate = p.dtype != DType::kFloat32 ? 1000 : p.allow_tf32 ? 500 : 150;
  return choose(p.M, p.N, p.K, rate, p.dtype == DType::kFloat32 ? 32 : 64, multiprocessors());
}

// Whether the rows of a (rows, cols) matrix are contiguous runs, or its columns.
bool rows_lie(const Matrix& x, int64_t cols) { return x.col == 1 || cols <= 1; }
bool columns_lie(const Matrix& x, int64_t rows) { return x.row == 1 || rows <= 1; }

template <class T, bool kKInner>
MatrixSource<T, kKInner> source(const Matrix& x, int64_t rows, int64_t K) {
  const int64_t stride = kKInner ? x.row : x.col, lines = kKInner ? rows : K;
  const auto bits = reinterpret_cast<uintptr_t>(x.data) |
                    (lines > 1 ? static_cast<uintptr_t>(stride) * sizeof(T) : 0);
  return {static_cast<const T*>(x.data), stride, lines, kKInner ? K : rows,
          bits % 16 == 0  ? 16
          : bits % 4 == 0 ? 4
                          : 2};
}

template <class T, Math kMath>
Error gemm_of(const Product& p, const Plan& plan, void* workspace, Stream stream) {
  const auto c = static_cast<T*>(p.c);
  const auto mask = static_cast<const T*>(p.mask);
  const Output<T> out = {.M = p.M,
                         .N = p.N,
                         .c = c,
                         .row = p.N,
                         .bias = static_cast<const T*>(p.bias),
                         .relu = p.relu,
                         .mask = mask,
                         .row_sums = static_cast<T*>(p.row_sums),
                         .packed = aligned16(c, mask) && p.N % Pack<T>::kSize == 0};
  const auto run = [&](auto a, auto b) {
    return multiply<kMath>(a, b, out, p.K, plan, workspace, stream);
  };
  const bool b_columns = columns_lie(p.b, p.N);
  if (!p.row_sums && rows_lie(p.a, p.K)) {
    const auto a = source<T, true>(p.a, p.M, p.K);
    if (rows_lie(p.b, p.K)) return run(a, source<T, true>(p.b, p.N, p.K));
    if (b_columns) return run(a, source<T, false>(p.b, p.N, p.K));
  } else if (columns_lie(p.a, p.M) && b_columns) {
    return run(source<T, false>(p.a, p.M, p.K), source<T, false>(p.b, p.N, p.K));
  }
  return kInvalidValue;
}

Error gemm_by(const Product& p, const Plan& plan, void* workspace, Stream stream) {
  return with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 4)
      if (p.allow_tf32) return gemm_of<T, Math::kTF32>(p, plan, workspace, stream);
    return gemm_of<T, Math::kExact>(p, plan, workspace, stream);
  });
}

}  // namespace

int64_t gemm_workspace(const Product& product) {
  return workspace_bytes(plan_of(product), product.M, product.N);
}

Error gemm(const Product& product, void* workspace, Stream stream) {
  return gemm_by(product, plan_of(product), workspace, stream);
}

}  // namespace dlkernels::cuda
