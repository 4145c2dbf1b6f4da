// adagrad_: schema, scalars and PyTorch's path; the rest is optim.h's. The arithmetic is in
// cpu/adagrad.inl.h.
#include "ops/core/torch_headers.h"

#include "ops/optim/optim.h"

namespace dlkernels {
namespace {

struct Adagrad {
  static constexpr const char* kName = "adagrad_";
  static constexpr std::array kLists{"params", "grads", "state_sums", "state_steps"};
  static constexpr auto kKernel = &cpu::Kernels::adagrad;

  using Scalars = std::tuple<double, double, double, double, bool>;
  double lr, lr_decay, weight_decay, eps;
  bool maximize;

  double step_size(double step) const { return lr / (1 + (step - 1) * lr_decay); }

  cpu::AdagradScalars scalars(double step) const {
    return {.step_size = static_cast<float>(step_size(step)), .eps = static_cast<float>(eps)};
  }

  // torch.optim.adagrad._single_tensor_adagrad
  void aten_step(const Tensor& p, const Tensor& g, const std::array<Tensor, 1>& states,
                 double step) const {
    const Tensor& sum = states[0];
    sum.addcmul_(g, g);
    p.addcdiv_(g, sum.sqrt().add_(eps), -step_size(step));
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(dlkernels, m) {
  m.def(
      "adagrad_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] state_sums, "
      "Tensor(d!)[] state_steps, *, float lr, float lr_decay, float weight_decay, float eps, "
      "bool maximize, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()");
  OptimOp<Adagrad>::register_in(m);
}

}  // namespace dlkernels
