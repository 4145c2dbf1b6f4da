// adam_: schema, scalars and PyTorch's path; the rest is optim.h's. The arithmetic is in
// cpu/adam.inl.h.
#include <cmath>

#include "optim.h"

namespace dlkernels {
namespace {

struct Adam {
  static constexpr const char* kName = "adam_";
  static constexpr std::array kLists{"params", "grads", "exp_avgs", "exp_avg_sqs", "state_steps"};
  static constexpr auto kKernel = &cpu::Kernels::adam;

  using Scalars = std::tuple<double, double, double, double, double, bool, bool>;
  double lr, beta1, beta2, weight_decay, eps;
  bool maximize, decoupled_weight_decay;

  cpu::AdamScalars scalars(double step) const {
    return {.one_minus_beta1 = static_cast<float>(1 - beta1),
            .beta2 = static_cast<float>(beta2),
            .one_minus_beta2 = static_cast<float>(1 - beta2),
            .eps = static_cast<float>(eps),
            .shrink = static_cast<float>(decoupled_weight_decay ? 1 - lr * weight_decay : 1),
            .rsqrt_bias = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, step))),
            .step_size = static_cast<float>(lr / (1 - std::pow(beta1, step)))};
  }

  // torch.optim.adam._single_tensor_adam
  void step_torch(const Tensor& p, const Tensor& g, const std::array<Tensor, 2>& states,
                  double step) const {
    const auto& [m, v] = states;
    if (decoupled_weight_decay) p.mul_(1 - lr * weight_decay);
    m.lerp_(g, 1 - beta1);
    v.mul_(beta2).addcmul_(g, g, 1 - beta2);
    const Tensor denom = v.sqrt().div_(std::sqrt(1 - std::pow(beta2, step))).add_(eps);
    p.addcdiv_(m, denom, -lr / (1 - std::pow(beta1, step)));
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(dlkernels, m) {
  // grads are written where grad_scale is given: they are left unscaled, as by torch._fused_adam_.
  m.def(
      "adam_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, "
      "Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] state_steps, *, float lr, float beta1, float beta2, "
      "float weight_decay, float eps, bool maximize, bool decoupled_weight_decay, "
      "Tensor? grad_scale=None, Tensor? found_inf=None) -> ()");
  OptimOp<Adam>::register_in(m);
}

}  // namespace dlkernels
