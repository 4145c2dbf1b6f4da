// relu: y[i] = max(0, x[i]). The arithmetic is in cpu/relu.inl.h and cuda/relu.cu.
#include "ops/core/torch_headers.h"

#include <ATen/ops/relu.h>
#include <ATen/ops/threshold_backward.h>

#include "ops/core/elementwise.h"

namespace dlkernels {
namespace {

struct ReLU {
  static constexpr const char* kName = "relu";
  static constexpr const char* kSchema = "(Tensor input) -> Tensor";
  static constexpr const char* kBackward = "relu_backward";
  static constexpr const char* kBackwardSchema = "(Tensor grad_y, Tensor y) -> Tensor";
  static constexpr const char* kNode = "ReLUBackward";
  static constexpr const char* kSaved = "y";
  static constexpr auto kCPU = &cpu::Kernels::relu;
  static constexpr auto kCPUBackward = &cpu::Kernels::relu_backward;
  static constexpr auto kCUDA = &cuda::Kernels::relu;
  static constexpr auto kCUDABackward = &cuda::Kernels::relu_backward;

  static Tensor aten(const Tensor& x) { return at::relu(x); }
  static Tensor aten_backward(const Tensor& grad_y, const Tensor& y) {
    return at::threshold_backward(grad_y, y, 0);
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(dlkernels, m) { register_elementwise<ReLU>(m); }

}  // namespace dlkernels
