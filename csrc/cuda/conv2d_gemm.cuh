// Convolutions as matrix products (implicit GEMM).
#pragma once
#include "conv2d_direct.cuh"

namespace dlkernels::cuda {

constexpr int kGemmSplitRows = 64;

struct GemmPass {
  Pass pass;
  View x;
  int64_t padded;
  const void* weight;
  int64_t weight_padded;
  Finish finish;
  bool allow_tf32;
};
template <class T>
Error gemm_pass(const GemmPass&, Stream) {
  return 1;
}
struct GemmWeight {
  Pass pass;
  View x;
  int64_t padded_x;
  View grad_y;
  int64_t padded_y;
  float* partials;
  int64_t splits, rows_a_split;
  bool allow_tf32;
};
template <class T>
Error gemm_weight(const GemmWeight&, Stream) {
  return 1;
}
inline int64_t gemm_weight_tiles(int64_t groups, int64_t rows, int64_t columns) {
  return groups * ceil_div(rows, 64) * ceil_div(columns, 64);
}

}  // namespace dlkernels::cuda
