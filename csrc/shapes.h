// What the kernels of both devices share: dtypes and axes.
#pragma once
#include <cstdint>

namespace dlkernels {

enum class DType { kFloat32, kBFloat16, kFloat16 };  // stored so; sums are float32

// One axis of a convolution: tap t of output o is input (o * stride - pad + t * dilation) /
// input_dilation, where that is a whole number in [0, in); else there is none. The gradient of a
// convolution by its input is one with input_dilation = its stride.
struct ConvAxis {
  int64_t in, out, taps, stride, pad, dilation, input_dilation = 1;
};

// One axis of a pool: element k < kernel of window o is input position o * stride - pad + k *
// dilation, missing where that is outside [0, in).
struct PoolAxis {
  int64_t in, out, kernel, stride, pad, dilation;
};

// The argmax of a window to which no gradient goes. An argmax is a byte.
constexpr int64_t kNoElement = 255;

}  // namespace dlkernels
