// leaky_relu: y[i] = x[i] > 0 ? x[i] : x[i] * negative_slope. The arithmetic is in
// cpu/leaky_relu.inl.h and cuda/leaky_relu.cu.
#include "ops/core/torch_headers.h"

#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/leaky_relu_backward.h>

#include "ops/core/elementwise.h"

namespace dlkernels {
namespace {

struct LeakyReLU {
  static constexpr const char* kName = "leaky_relu";
  static constexpr const char* kSchema = "(Tensor input, float negative_slope=0.01) -> Tensor";
  static constexpr const char* kBackward = "leaky_relu_backward";
  static constexpr const char* kBackwardSchema =
      "(Tensor grad_y, Tensor input, float negative_slope) -> Tensor";
  static constexpr const char* kNode = "LeakyReLUBackward";
  static constexpr const char* kSaved = "input";
  static constexpr auto kCPU = &cpu::Kernels::leaky_relu;
  static constexpr auto kCPUBackward = &cpu::Kernels::leaky_relu_backward;
  static constexpr auto kCUDA = &cuda::Kernels::leaky_relu;
  static constexpr auto kCUDABackward = &cuda::Kernels::leaky_relu_backward;

  static Tensor aten(const Tensor& x, double negative_slope) {
    return at::leaky_relu(x, negative_slope);
  }
  static Tensor aten_backward(const Tensor& grad_y, const Tensor& x, double negative_slope) {
    return at::leaky_relu_backward(grad_y, x, negative_slope, /*self_is_result=*/false);
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(dlkernels, m) { register_elementwise<LeakyReLU, double>(m); }

}  // namespace dlkernels
