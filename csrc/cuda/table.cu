// The table that _C_cuda exports, and nothing else.
#include "cuda/common.cuh"

const dlkernels::cuda::Kernels* dlkernels_cuda_kernels() {
  using namespace dlkernels::cuda;
  static const Kernels table = {
      .version = version(),
      .error_string = error_string,
      .capability = capability,
      .relu = relu,
      .relu_backward = relu_backward,
      .leaky_relu = leaky_relu,
      .leaky_relu_backward = leaky_relu_backward,
      .max_pool2d = max_pool2d,
      .max_pool2d_backward = max_pool2d_backward,
      .max_pool2d_indices = max_pool2d_indices,
      .cross_entropy = cross_entropy,
      .cross_entropy_workspace = cross_entropy_workspace,
      .cross_entropy_backward = cross_entropy_backward,
      .adam = adam,
      .adam_workspace = adam_workspace,
      .conv2d_workspace = conv2d_workspace,
      .conv2d = conv2d,
      .conv2d_backward_workspace = conv2d_backward_workspace,
      .conv2d_backward = conv2d_backward,
      .gemm_workspace = gemm_workspace,
      .gemm = gemm,
  };
  return &table;
}
