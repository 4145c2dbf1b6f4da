// The arguments of cross_entropy, which of them have a kernel, and the shapes that follow, for
// cross_entropy.cpp and cross_entropy_cuda.cpp.
#pragma once
#include <ATen/core/Reduction.h>

#include "ops/core/eligibility.h"

namespace dlkernels::entropy {

struct Args {
  const Tensor &input, &target;
  const optional<Tensor>& weight;
  int64_t reduction, ignore_index;
  double label_smoothing;
};

// PyTorch lets negative ones and NaN through; its losses mean nothing there.
inline void check_smoothing(double label_smoothing) {
  TORCH_CHECK(label_smoothing >= 0 && label_smoothing <= 1,
              "cross_entropy: label_smoothing must be between 0.0 and 1.0, got ", label_smoothing);
}

// A target of the input's shape gives probabilities, whatever its dtype: PyTorch's rule.
inline bool gives_probabilities(const Tensor& input, const Tensor& target) {
  return input.sym_sizes() == target.sym_sizes();
}

inline c10::SymInt classes(const Tensor& input) { return input.sym_size(input.dim() == 1 ? 0 : 1); }

// Logits of at least one class and of a supported dtype, and a target of a rank and dtype that fit:
// what PyTorch accepts beyond is PyTorch's, and so are its words for what it refuses.
inline bool are_supported(const Args& a) {
  check_device("cross_entropy", a.input, a.target);
  check_device("cross_entropy", a.input, a.weight);
  if (!is_supported(a.input) || !is_supported(a.weight) || (a.weight && a.weight->dim() != 1))
    return false;
  if (a.input.dim() == 0 || classes(a.input) == 0 || !same_dtype(a.input, a.weight)) return false;
  if (a.input.is_cuda() && classes(a.input) > cuda::kMaxClasses) return false;
  if (gives_probabilities(a.input, a.target))
    return is_supported(a.target) && same_dtype(a.input, a.target);
  const bool bytes = a.input.dim() <= 2 && a.label_smoothing == 0;  // where PyTorch takes them
  const auto dtype = a.target.scalar_type();
  return a.target.layout() == at::kStrided && a.target.dim() == a.input.dim() - 1 &&
         (dtype == at::kLong || (dtype == at::kByte && bytes));
}

// (N, C, d1, ...) -> (N, d1, ...), (C) -> ()
inline c10::SymDimVector row_sizes(const Tensor& input) {
  c10::SymDimVector sizes(input.sym_sizes().begin(), input.sym_sizes().end());
  sizes.erase(sizes.begin() + (input.dim() == 1 ? 0 : 1));
  return sizes;
}

// The loss of supported arguments, not yet computed.
inline Tensor new_loss(const Args& a) {
  check_smoothing(a.label_smoothing);
  TORCH_CHECK(a.reduction >= at::Reduction::None && a.reduction < at::Reduction::END,
              "cross_entropy: reduction must be 0 (none), 1 (mean) or 2 (sum), got ", a.reduction);
  const auto sizes = a.input.sym_sizes(), target_sizes = a.target.sym_sizes();
  const c10::SymDimVector rows = row_sizes(a.input);
  if (gives_probabilities(a.input, a.target)) {
    TORCH_CHECK(a.ignore_index < 0,
                "cross_entropy: ignore_index is not supported for floating point target, got ",
                a.ignore_index);
  } else {
    TORCH_CHECK_VALUE(sizes.size() == 1 || sizes[0] == target_sizes[0],
                      "cross_entropy: Expected input batch_size (", sizes[0],
                      ") to match target batch_size (", target_sizes[0], ")");
    TORCH_CHECK(target_sizes == c10::SymIntArrayRef(rows), "cross_entropy: Expected target size ",
                c10::SymIntArrayRef(rows), ", got ", target_sizes);
  }
  TORCH_CHECK(!a.weight || a.weight->sym_size(0) == classes(a.input),
              "cross_entropy: weight tensor should be defined either for all ", classes(a.input),
              " classes or no classes but got weight tensor of shape: ", a.weight->sym_sizes());
  const bool none = a.reduction == at::Reduction::None;
  return at::empty_symint(none ? c10::SymIntArrayRef(rows) : c10::SymIntArrayRef(),
                          a.input.options());
}

// How many rows of classes are interleaved: the product of d1, ... in (N, C, d1, ...).
inline int64_t inner(const Tensor& x) {
  return c10::multiply_integers(x.sizes().slice(std::min<int64_t>(x.dim(), 2)));
}

inline Tensor as_indices(const Tensor& target) { return target.to(at::kLong).contiguous(); }

// ---- cross_entropy_cuda.cpp -----------------------------------------------------------------

// Raises IndexError if an earlier call met a target that is no class.
void report_no_class();

// The same, and fills loss, and grad where it is defined.
void compute_cuda(const Args& a, const Tensor& loss, const Tensor& grad);

// grad_x = grad_y * grad, and may be grad: where grad_y is 1, as it mostly is, the device then has
// nothing to do.
void scale_cuda(const Tensor& grad_y, const Tensor& grad, const Tensor& target,
                int64_t ignore_index, const Tensor& grad_x);

}  // namespace dlkernels::entropy
