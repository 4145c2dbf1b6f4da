// What the gradients of the ops share: nodes in autograd's graph, and gradients of gradients.
#pragma once
#include "ops/torch_headers.h"

#include <ATen/ops/fill.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/view_as.h>

#include <memory>
#include <tuple>
#include <utility>

#include "common.h"

namespace dlkernels {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// ---- recording ----------------------------------------------------------------------------

inline bool wants_grad(const Tensor& t) { return t.defined() && t.requires_grad(); }
inline bool wants_grad(const optional<Tensor>& t) { return t && wants_grad(*t); }

template <class... Tensors>  // some of them optional
bool any_requires_grad(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (wants_grad(tensors) || ...);
}

// One of our ops, as find_op, for calls that record nothing: of a node that is made anyway or at
// work, or where there is none to make.
template <class Signature>
struct BelowAutograd;
template <class Result, class... Args>
struct BelowAutograd<Result(Args...)> {
  explicit BelowAutograd(const char* name) : op(find_op<Result(Args...)>(name)) {}

  Result operator()(Args... args) const {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return op.call(std::forward<Args>(args)...);
  }

  const c10::TypedOperatorHandle<Result(Args...)> op;
};

// The node of T, which is a Function as below. Its name shows in profiles and in the graph; a node
// of PyTorch's own kind makes one out of the C++ type in every backward pass.
template <class T>
struct Node final : torch::autograd::CppNode<T> {
  std::string name() const override { return T::kNode; }

  variable_list apply(variable_list&& grads) override {
    // None from a later function: as PyTorch's ops, no gradient, where CppNode would take 0.
    if (!grads[0].defined()) return variable_list(this->num_outputs());
    return torch::autograd::CppNode<T>::apply(std::move(grads));
  }
};

// torch::autograd::Function where it is known that a gradient is asked for, that forward only
// calls ops below autograd, and that it returns new tensors, of which the first has the gradient.
// That leaves less for apply to do, and less code to fetch: see relu in benchmarks/NOTES.md.
template <class T>
struct Function : torch::autograd::Function<T> {
  template <class... Args>
  static auto apply(const Args&... args) {
    using Pointer = decltype(torch::autograd::Edge::function);
    const auto node = [] {
      if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>)  // torch 2.11
        return std::shared_ptr<Node<T>>(new Node<T>, [](auto* node) { deleteNode(node); });
      else
        return c10::make_intrusive<Node<T>>();
    }();
    variable_list inputs;
    torch::autograd::extract_vars(node->is_variable_input_, inputs, args...);
    node->set_next_edges(torch::autograd::collect_next_edges(inputs));
    node->set_ctx_grad_fn(node);
    auto out = T::forward(&node->ctx_, args...);
    const Tensor& y = first(out);
    torch::autograd::set_history(y, Pointer(node));
    node->output_info_.emplace_back(y);  // compiled autograd's, which does not ask Node::apply
    node->save_variables_to_ctx();
    announce(Pointer(node));
    return out;
  }

 private:
  static const Tensor& first(const Tensor& y) { return y; }
  static const Tensor& first(const std::tuple<Tensor, Tensor>& out) { return std::get<0>(out); }

  // torch.autograd.graph's hooks for new nodes, which PyTorch has since 2.14.
  template <class Pointer>
  static void announce(const Pointer& node) {
    if constexpr (requires { fire_node_creation_hooks(node); }) fire_node_creation_hooks(node);
  }
};

// ---- gradients that are differentiated in turn --------------------------------------------

// Whether a backward pass is differentiated in turn, which PyTorch's ops can: by autograd
// (create_graph=True), or forward, along a tangent of grad_y.
inline bool is_differentiated(const Tensor& grad_y, OpStats& backward) {
  if (!at::GradMode::is_enabled() && !grad_y._fw_grad(/*level=*/0).defined()) return false;
  backward.torch_ran();
  return true;
}

// In a backward pass that is differentiated: `value` in the place of the forward's i-th tensor, so
// that gradients of it flow on to where that tensor came from. For what need not be saved, because
// derivatives depend on it in no other way.
inline Tensor in_place_of_input(size_t i, const Tensor& value) {
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
