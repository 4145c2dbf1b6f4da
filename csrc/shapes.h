// The dtypes that kernels know, on the CPU and on CUDA.
#pragma once

namespace dlkernels {

enum class DType { kFloat32, kBFloat16, kFloat16 };  // stored so; sums are float32

}  // namespace dlkernels
