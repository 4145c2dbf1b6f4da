// Gradients of gradients: PyTorch's own ops, differentiated by PyTorch.
#pragma once
#include "ops/core/torch_headers.h"

#include <ATen/ops/fill.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/view_as.h>

#include "ops/core/stats.h"

namespace dlkernels {

using torch::autograd::variable_list;

// Whether a backward pass is differentiated in turn, which PyTorch's ops can: by autograd
// (create_graph=True), or forward, along a tangent of grad_y.
inline bool is_differentiated(const Tensor& grad_y, OpStats& backward) {
  if (!at::GradMode::is_enabled() && !grad_y._fw_grad(/*level=*/0).defined()) return false;
  backward.aten_ran();
  return true;
}

// In a backward pass that is differentiated: `value` in the place of the forward's i-th tensor, so
// that gradients of it flow on to where that tensor came from. For what need not be saved, because
// derivatives depend on it in no other way.
inline Tensor stand_in_for_input(size_t i, const Tensor& value) {
  const auto node = torch::autograd::get_current_node();
  TORCH_CHECK(node && i < node->num_outputs(),
              "a gradient of this gradient is known to autograd's engine alone: call backward() or "
              "torch.autograd.grad(), or this node under torch.no_grad()");
  const Tensor x = value.detach();
  if (const auto& edge = node->next_edge(i); edge.is_valid())
    torch::autograd::impl::set_gradient_edge(x, edge);
  return x;
}

// 0, with derivatives of 0 by x.
inline Tensor zero_of(const Tensor& x) { return at::fill(x, 0).sum(); }

// Gradients that can be differentiated again: PyTorch's own op, computed anew from the saved inputs
// and differentiated by PyTorch. One slot an input; undefined where an input needs no gradient.
template <class Forward>
variable_list differentiable_backward(const Forward& forward, variable_list inputs,
                                      const Tensor& grad_y) {
  const bool create_graph = at::GradMode::is_enabled();
  const at::AutoGradMode with_graph(true);
  variable_list wanted;
  for (Tensor& x : inputs) {
    x = x.view_as(x);  // the same tensor may stand in two slots: each gets its own gradient
    if (x.requires_grad()) wanted.push_back(x);
  }
  variable_list out(inputs.size());
  if (wanted.empty()) return out;
  const variable_list grads =
      torch::autograd::grad({forward(inputs)}, wanted, {grad_y}, /*retain_graph=*/std::nullopt,
                            create_graph, /*allow_unused=*/true);
  auto next = grads.begin();
  for (size_t i = 0; i < inputs.size(); ++i)
    if (inputs[i].requires_grad()) out[i] = *next++;
  return out;
}

}  // namespace dlkernels
