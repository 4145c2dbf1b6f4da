// cross_entropy's kernels on CUDA as cross_entropy.cpp calls them. They are in
// cuda/cross_entropy.cu.
#include "ops/core/torch_headers.h"

#include <ATen/ops/zeros.h>

#include <atomic>

#include "ops/cross_entropy.h"

namespace dlkernels::entropy {

namespace {

// A target that is no class can't be reported when it is met without waiting for the device. The
// loss and the gradient of its row are NaN, and a flag in the host's memory, which the device
// writes, makes one of the next calls raise PyTorch's IndexError.
int* no_class_flag() {
  static Tensor* const flag = new Tensor(  // never freed: the device may still write to it
      at::zeros({1}, at::TensorOptions(at::kInt).pinned_memory(true)));
  return flag->mutable_data_ptr<int>();
}
int* reported_flag() {
  int* const flag = no_class_flag();
  const bool raised = std::atomic_ref<int>(*flag).exchange(0) != 0;
  TORCH_CHECK_INDEX(!raised, "Target is out of bounds, in an earlier cross_entropy on CUDA, whose ",
                    "loss is NaN.");
  return flag;
}

// A row's sizes and the rows' strides; the pointers and options are the caller's.
cuda::CrossEntropy cuda_rows(const Tensor& x) {
  const int64_t C = x.size(x.dim() == 1 ? 0 : 1);
  return {.x = x.const_data_ptr(),
          .target = nullptr,
          .probabilities = nullptr,
          .weight = nullptr,
          .rows = x.numel() / C,
          .C = C,
          .inner = inner(x),
          .ignore_index = 0,
          .smoothing = 0,
          .reduction = cuda::Reduction::kNone,
          .loss = nullptr,
          .grad = nullptr,
          .no_class = nullptr};
}

}  // namespace

void report_no_class() { reported_flag(); }

void compute_cuda(const Args& a, const Tensor& loss, const Tensor& grad) {
  int* const no_class = reported_flag();
  const bool probabilities = gives_probabilities(a.input, a.target);
  const Tensor x = a.input.contiguous();
  const Tensor t = probabilities ? a.target.contiguous() : as_indices(a.target);
  const Tensor w = a.weight ? a.weight->contiguous() : Tensor();
  cuda::CrossEntropy rows = cuda_rows(x);
  if (probabilities)
    rows.probabilities = t.const_data_ptr();
  else
    rows.target = t.const_data_ptr<int64_t>();
  rows.weight = a.weight ? w.const_data_ptr() : nullptr;
  rows.ignore_index = a.ignore_index;
  rows.smoothing = static_cast<float>(a.label_smoothing);
  rows.reduction = static_cast<cuda::Reduction>(a.reduction);
  rows.loss = loss.mutable_data_ptr();
  rows.grad = grad.defined() ? grad.mutable_data_ptr() : nullptr;
  rows.no_class = no_class;
  launch("cross_entropy", x, [&](const cuda::Kernels& kernels, cuda::Stream stream) {
    const int64_t floats = kernels.cross_entropy_workspace(rows.rows, rows.C, rows.inner);
    const Tensor workspace = at::empty({floats}, x.options().dtype(at::kFloat));
    return kernels.cross_entropy(dtype_of(x), rows, workspace.mutable_data_ptr<float>(), stream);
  });
}

void scale_cuda(const Tensor& grad_y, const Tensor& grad, const Tensor& target,
                int64_t ignore_index, const Tensor& grad_x) {
  if (grad.numel() == 0) return;
  const Tensor from = grad.contiguous(), gy = grad_y.contiguous();
  const Tensor t = gives_probabilities(grad, target) ? Tensor() : as_indices(target);
  cuda::CrossEntropy rows = cuda_rows(from);
  rows.target = t.defined() ? t.const_data_ptr<int64_t>() : nullptr;
  rows.ignore_index = ignore_index;
  rows.grad = grad_x.mutable_data_ptr();
  launch("cross_entropy_backward", from, [&](const cuda::Kernels& kernels, cuda::Stream stream) {
    return kernels.cross_entropy_backward(dtype_of(from), rows, gy.const_data_ptr(),
                                          grad_y.dim() == 0 ? 0 : 1, stream);
  });
}

}  // namespace dlkernels::entropy
