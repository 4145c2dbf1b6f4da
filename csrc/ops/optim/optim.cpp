// What the frame of the optimizers' ops does with lists of tensors, whatever the optimizer.
#include "ops/core/torch_headers.h"

#include "ops/optim/optim.h"

#include <ATen/MemoryOverlap.h>
#include <c10/core/InferenceMode.h>

namespace dlkernels {
namespace {

// A step, a scale or a flag. On another device it would choose that device's kernel: meta's, which
// does nothing.
void check_scalar(const OptimLists& a, const char* name, const Tensor& t) {
  TORCH_CHECK(t.defined() && t.layout() == at::kStrided && t.sym_numel() == 1, a.op, ": ", name,
              " must be a dense tensor of one element, got ",
              t.defined() ? t.toString() : "undefined");
  TORCH_CHECK(a.params().empty() || t.device().is_cpu() || t.device() == a.params()[0].device(),
              a.op, ": ", name, " must be on the CPU or on ", a.params()[0].device(), ", got ",
              t.device());
  TORCH_CHECK_NOT_IMPLEMENTED(!at::isComplexType(t.scalar_type()), a.op, ": ", name,
                              " must be real, got ", t.scalar_type());
}

void check_like_param(const OptimLists& a, const char* name, size_t i, const Tensor& t) {
  const Tensor& param = a.params()[i];
  TORCH_CHECK(t.defined() && t.layout() == at::kStrided && !t.is_nested(), a.op, ": ", name, "[", i,
              "] must be dense, got ", t.defined() ? t.toString() : "undefined");
  check_device(a.op, a.params()[0], t);
  TORCH_CHECK(t.sym_sizes() == param.sym_sizes(), a.op, ": ", name, "[", i, "] must be ",
              param.sym_sizes(), " as params[", i, "] is, got ", t.sym_sizes());
  TORCH_CHECK(t.scalar_type() == param.scalar_type(), a.op, ": ", name, "[", i, "] must be ",
              param.scalar_type(), " as params[", i, "] is, got ", t.scalar_type());
  TORCH_CHECK_NOT_IMPLEMENTED(at::isFloatingType(t.scalar_type()), a.op, ": ", name, "[", i,
                              "] must be of a real floating dtype, got ", t.scalar_type());
}

bool same_layout(const Tensor& a, const Tensor& b) {
  if (a.strides() == b.strides()) return true;
  for (int64_t dim = 0; dim < a.dim(); ++dim)
    if (a.size(dim) > 1 && a.stride(dim) != b.stride(dim)) return false;
  return true;
}

}  // namespace

void check_lists(const OptimLists& a) {
  for (const auto& [name, tensors, wanted, written, scalars] : a.lists) {
    TORCH_CHECK(wanted || tensors.empty(), a.op, ": ", name,
                " must be empty, as its option is off, got ", tensors.size());
    const size_t n = wanted ? a.params().size() : 0;
    TORCH_CHECK(tensors.size() == n, a.op, ": ", name, " must have one tensor for each of the ", n,
                " params, got ", tensors.size());
    for (size_t i = 0; i < n; ++i) {
      const Tensor& t = tensors[i];
      scalars ? check_scalar(a, name, t) : check_like_param(a, name, i, t);
      if (!written) continue;
      at::assert_no_internal_overlap(t);
      TORCH_CHECK(!t.is_inference() || c10::InferenceMode::is_enabled(), a.op, ": ", name, "[", i,
                  "] must not be an inference tensor outside InferenceMode");
    }
  }
  if (a.grad_scale) check_scalar(a, "grad_scale", *a.grad_scale);
  if (a.found_inf) check_scalar(a, "found_inf", *a.found_inf);
  if (a.device_lr) check_scalar(a, "device_lr", *a.device_lr);
}

void check_no_grad(const OptimLists& a) {
  if (!at::GradMode::is_enabled()) return;
  for (const auto& list : a.lists)
    for (const Tensor& t : list.tensors)
      TORCH_CHECK(!t.requires_grad(), a.op, ": tensors that require grad must be updated under ",
                  "torch.no_grad(), got such a one in ", list.name);
}

bool have_layout_of_params(const OptimLists& a) {
  std::vector<const void*> memory;
  for (size_t i = 0; i < a.params().size(); ++i) {
    const Tensor& param = a.params()[i];
    if (!param.is_non_overlapping_and_dense()) return false;
    if (param.numel()) memory.push_back(param.const_data_ptr());
    for (const auto& list : a.lists)
      if (list.wanted && !list.scalars && !same_layout(param, list.tensors[i])) return false;
  }
  std::sort(memory.begin(), memory.end());
  return std::adjacent_find(memory.begin(), memory.end()) == memory.end();
}

void bump_versions(const OptimLists& a) {
  for (const auto& list : a.lists) {
    if (!list.written) continue;
    for (const Tensor& t : list.tensors) t.unsafeGetTensorImpl()->bump_version();
  }
}

OptimRuns::OptimRuns(const OptimLists& a, bool maximize, double weight_decay) {
  const size_t n = a.params().size();
  tensors_.reserve(n);
  starts_.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    const Tensor &param = a.params()[i], &grad = a.grads()[i];
    const Tensor order =
        param.is_non_overlapping_and_dense() ? param : at::empty_like(param).copy_(param);
    if (!order.is_same(param)) back_.emplace_back(param, order);
    cpu::OptimTensor& t = tensors_.emplace_back();
    t.param = order.mutable_data_ptr<float>();
    for (size_t k = 2; k < a.lists.size(); ++k)
      if (const auto& list = a.lists[k]; list.wanted && !list.scalars)
        t.state[k - 2] = written(order, list.tensors[i]);
    t.unscaled = a.grad_scale ? written(order, grad) : nullptr;
    t.grad = t.unscaled ? t.unscaled : read(order, grad);
    t.grad_scale = a.grad_scale ? *a.grad_scale->const_data_ptr<float>() : 1.0f;
    t.sign = maximize ? -1.0f : 1.0f;
    t.weight_decay = static_cast<float>(weight_decay);
    starts_.push_back(numel_);
    numel_ += order.numel();
  }
}

const float* OptimRuns::read(const Tensor& order, const Tensor& t) {
  if (same_layout(order, t)) return t.const_data_ptr<float>();
  kept_.push_back(at::empty_like(order).copy_(t));
  return kept_.back().const_data_ptr<float>();
}

float* OptimRuns::written(const Tensor& order, const Tensor& t) {
  if (same_layout(order, t)) return t.mutable_data_ptr<float>();
  back_.emplace_back(t, at::empty_like(order).copy_(t));
  return back_.back().second.mutable_data_ptr<float>();
}

// Step after step it is the same memory: what was found apart once is not sorted again.
bool OptimRuns::overlap() const {
  thread_local std::vector<std::pair<const float*, const float*>> known_disjoint;
  std::vector<std::pair<const float*, const float*>> memory;
  memory.reserve(5 * tensors_.size());
  for (size_t i = 0; i < tensors_.size(); ++i)
    if (const int64_t n = stop_of(i) - starts_[i]) {
      const cpu::OptimTensor& t = tensors_[i];
      memory.emplace_back(t.param, t.param + n);
      memory.emplace_back(t.grad, t.grad + n);
      for (const float* state : t.state)
        if (state) memory.emplace_back(state, state + n);
    }
  if (memory == known_disjoint) return false;
  auto sorted = memory;
  std::sort(sorted.begin(), sorted.end());
  for (size_t i = 1; i < sorted.size(); ++i)
    if (sorted[i].first < sorted[i - 1].second) return true;
  known_disjoint = std::move(memory);
  return false;
}

}  // namespace dlkernels
