// The node that an op records in autograd's graph.
#pragma once
#include "ops/core/torch_headers.h"

#include <algorithm>
#include <array>
#include <memory>
#include <tuple>

#include "ops/core/double_backward.h"

namespace dlkernels {

using torch::autograd::AutogradContext;

inline bool wants_grad(const Tensor& t) { return t.defined() && t.requires_grad(); }
inline bool wants_grad(const optional<Tensor>& t) { return t && wants_grad(*t); }
inline bool wants_grad(at::TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return wants_grad(t); });
}
template <class T>
bool wants_grad(const T&) {  // a number, or several
  return false;
}

template <class... Args>
bool any_requires_grad(const Args&... args) {
  return at::GradMode::is_enabled() && (wants_grad(args) || ...);
}

// Which gradients of (input, weight, bias) are wanted, where ctx->saved_data["bias"] says whether
// there is a bias: needs_input_grad counts tensors, so an absent bias has no slot of its own.
inline std::array<bool, 3> output_mask(AutogradContext* ctx) {
  return {ctx->needs_input_grad(0), ctx->needs_input_grad(1),
          ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(2)};
}

// The node of a Function. Its name shows in profiles and in the graph; PyTorch's own class makes
// one out of the C++ type in every backward pass.
template <class Function>
struct Node final : torch::autograd::CppNode<Function> {
  std::string name() const override { return Function::kNode; }

  variable_list apply(variable_list&& grads) override {
    // None from a later function: as PyTorch's ops, no gradient, where CppNode would take 0.
    if (!grads[0].defined()) return variable_list(this->num_outputs());
    return torch::autograd::CppNode<Function>::apply(std::move(grads));
  }
};

// torch::autograd::Function for T, an op of ops/core/op.h with a gradient. It takes less time than
// PyTorch's, because a gradient is known to be wanted, forward calls ops below autograd alone, and
// returns new tensors of which the first has the gradient (docs/performance/calls.md).
template <class T>
struct Gradient : torch::autograd::Function<Gradient<T>> {
  static constexpr const char* kNode = T::kNode;

  // The result of the op on `args`, which hold `inputs`, its arguments in the schema's order.
  template <class... Inputs>
  static auto apply(const typename T::Args& args, const Inputs&... inputs) {
    using Pointer = decltype(torch::autograd::Edge::function);
    using T_Node = Node<Gradient<T>>;
    const auto node = [] {
      if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>)  // torch 2.11
        return std::shared_ptr<T_Node>(new T_Node, [](auto* node) { deleteNode(node); });
      else
        return c10::make_intrusive<T_Node>();
    }();
    variable_list variables;
    torch::autograd::extract_vars(node->is_variable_input_, variables, inputs...);
    node->set_next_edges(torch::autograd::collect_next_edges(variables));
    node->set_ctx_grad_fn(node);
    auto out = T::forward(&node->ctx_, args);
    const Tensor& y = first(out);
    torch::autograd::set_history(y, Pointer(node));
    node->output_info_.emplace_back(y);  // compiled autograd's, which does not ask Node::apply
    node->save_variables_to_ctx();
    announce(Pointer(node));
    return out;
  }

  // CppNode wants a slot for each argument, and drops undefined ones beyond.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const bool is_differentiated_again = is_differentiated(grads[0], T::Backward::stats);
    variable_list out =
        is_differentiated_again ? T::double_backward(ctx, grads[0]) : T::backward(ctx, grads[0]);
    out.resize(std::max<size_t>(out.size(), T::kArgs));
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

}  // namespace dlkernels
