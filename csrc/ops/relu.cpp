// relu: schema, shapes, CPU, CUDA and gradient. The arithmetic is in cpu/relu.inl.h and
// cuda/relu.cu.
#include "ops/torch_headers.h"

#include <ATen/ops/relu.h>
#include <ATen/ops/threshold_backward.h>

#include "gradient.h"

namespace dlkernels {

TORCH_LIBRARY_FRAGMENT(dlkernels, m) {
  m.def("relu(Tensor input) -> Tensor");
  m.def("relu_backward(Tensor grad_y, Tensor y) -> Tensor");
}

namespace {

OpStats relu_stats("relu"), relu_backward_stats("relu_backward");

using Relu = Tensor(const Tensor& input);
using ReluBackward = Tensor(const Tensor& grad_y, const Tensor& y);

// PyTorch's own, for what is not ours.
Tensor relu_torch(const Tensor& input) {
  relu_stats.torch_ran();
  return at::relu(input);
}

// ---- shapes: shared by every device and by torch.compile ----------------------------------

// As PyTorch's pointwise ops have it: default strides where no two dimensions of more than one
// element have changed places, whatever strides dimensions of one element have; else those of x.
// empty_like would do, but calls the dispatcher three times.
Tensor relu_meta(const Tensor& x) {
  return x.is_contiguous() ? at::empty_symint(x.sym_sizes(), x.options()) : at::empty_like(x);
}

Tensor relu_backward_meta(const Tensor& grad_y, const Tensor& y) {
  check_device("relu_backward", y, grad_y);
  TORCH_CHECK(grad_y.sym_sizes() == y.sym_sizes(), "relu_backward: grad_y must be ", y.sym_sizes(),
              " as y is, got ", grad_y.sym_sizes());
  TORCH_CHECK_NOT_IMPLEMENTED(is_ours(grad_y) && is_ours(y) && same_dtype(y, grad_y),
                              "relu_backward: tensors must be dense ", kOurDTypes, ", got grad_y ",
                              grad_y.scalar_type(), " and y ", y.scalar_type());
  return relu_meta(y);
}

// ---- cpu ----------------------------------------------------------------------------------

constexpr int64_t kGrain = 32768;  // about 20 us: below, a fork costs more than it saves

// x as it lies in memory if it lies there like y, else a copy that does.
Tensor laid_out_as(const Tensor& y, const Tensor& x) {
  return x.strides() == y.strides() ? x : at::empty_like(y).copy_(x);
}

Tensor relu_cpu(const Tensor& input) {
  if (!is_ours(input)) return relu_torch(input);
  relu_stats.kernel_ran();
  Tensor y = huge(relu_meta(input));
  const Tensor x = laid_out_as(y, input);
  const float* from = x.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  parallel_chunks(y.numel(), kGrain,
                  [&](int64_t begin, int64_t end) { cpu::kernels().relu(from, to, begin, end); });
  return y;
}

Tensor relu_backward_cpu(const Tensor& grad_y, const Tensor& y) {
  Tensor grad_x = huge(relu_backward_meta(grad_y, y));
  relu_backward_stats.kernel_ran();
  const Tensor gc = laid_out_as(grad_x, grad_y), yc = laid_out_as(grad_x, y);
  const float *g = gc.const_data_ptr<float>(), *mask = yc.const_data_ptr<float>();
  float* to = grad_x.mutable_data_ptr<float>();
  parallel_chunks(y.numel(), kGrain, [&](int64_t begin, int64_t end) {
    cpu::kernels().relu_backward(g, mask, to, begin, end);
  });
  return grad_x;
}

// ---- cuda ---------------------------------------------------------------------------------

Tensor relu_cuda(const Tensor& input) {
  if (!is_ours(input)) return relu_torch(input);
  relu_stats.kernel_ran();
  const Tensor y = relu_meta(input), x = laid_out_as(y, input);
  launch("relu", y, [&](const cuda::Kernels& kernels, cuda::Stream stream) {
    return kernels.relu(dtype_of(x), x.const_data_ptr(), y.mutable_data_ptr(), y.numel(), stream);
  });
  return y;
}

Tensor relu_backward_cuda(const Tensor& grad_y, const Tensor& y) {
  const Tensor grad_x = relu_backward_meta(grad_y, y);
  relu_backward_stats.kernel_ran();
  const Tensor g = laid_out_as(grad_x, grad_y), mask = laid_out_as(grad_x, y);
  launch("relu_backward", y, [&](const cuda::Kernels& kernels, cuda::Stream stream) {
    return kernels.relu_backward(dtype_of(g), g.const_data_ptr(), mask.const_data_ptr(),
                                 grad_x.mutable_data_ptr(), g.numel(), stream);
  });
  return grad_x;
}

// ---- gradient -----------------------------------------------------------------------------

struct ReluFunction : Function<ReluFunction> {
  static constexpr const char* kNode = "ReLUBackward";

  static Tensor forward(AutogradContext* ctx, const Tensor& input) {
    static const BelowAutograd<Relu> op("dlkernels::relu");
    Tensor y = op(input);
    ctx->save_for_backward({y});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const BelowAutograd<ReluBackward> op("dlkernels::relu_backward");
    const Tensor y = ctx->get_saved_variables()[0];
    // The gradient is linear in grad_y and does not depend on the input in between its kinks.
    if (is_differentiated(grads[0], relu_backward_stats))
      return {at::threshold_backward(grads[0], y, 0)};
    return {op(grads[0], y)};
  }
};

Tensor relu_autograd(const Tensor& input) {
  if (!is_ours(input)) return relu_torch(input);
  if (any_requires_grad(input)) return ReluFunction::apply(input);
  static const BelowAutograd<Relu> op("dlkernels::relu");
  return op(input);
}

const bool torch_paths = (register_torch_path("relu", relu_torch), true);

}  // namespace

TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("relu", relu_cpu);
  m.impl("relu_backward", relu_backward_cpu);
}
TORCH_LIBRARY_IMPL(dlkernels, CUDA, m) {
  m.impl("relu", relu_cuda);
  m.impl("relu_backward", relu_backward_cuda);
}
TORCH_LIBRARY_IMPL(dlkernels, Meta, m) {
  m.impl("relu", relu_meta);
  m.impl("relu_backward", relu_backward_meta);
}
TORCH_LIBRARY_IMPL(dlkernels, Autograd, m) { m.impl("relu", relu_autograd); }

}  // namespace dlkernels
