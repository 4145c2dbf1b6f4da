// adadelta_: schema, scalars and PyTorch's path; the rest is optim.h's. The arithmetic is in
// cpu/adadelta.inl.h.
#include "ops/core/torch_headers.h"

#include "ops/optim/optim.h"

namespace dlkernels {
namespace {

struct Adadelta {
  static constexpr const char* kName = "adadelta_";
  static constexpr std::array kLists{"params", "grads", "square_avgs", "acc_deltas", "state_steps"};
  static constexpr auto kKernel = &cpu::Kernels::adadelta;

  using Scalars = std::tuple<double, double, double, double, bool>;
  double lr, rho, eps, weight_decay;
  bool maximize;

  cpu::AdadeltaScalars scalars(double /*step*/) const {
    return {.lr = static_cast<float>(lr),
            .rho = static_cast<float>(rho),
            .one_minus_rho = static_cast<float>(1 - rho),
            .eps = static_cast<float>(eps)};
  }

  // torch.optim.adadelta._single_tensor_adadelta
  void aten_step(const Tensor& p, const Tensor& g, const std::array<Tensor, 2>& states,
                 double /*step*/) const {
    const auto& [square_avg, acc_delta] = states;
    scale_(square_avg, rho).addcmul_(g, g, 1 - rho);
    const Tensor std = square_avg.add(eps).sqrt_();
    const Tensor delta = acc_delta.add(eps).sqrt_().div_(std).mul_(g);
    scale_(acc_delta, rho).addcmul_(delta, delta, 1 - rho);
    p.add_(delta, -lr);
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(dlkernels, m) {
  m.def(
      "adadelta_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] square_avgs, "
      "Tensor(d!)[] acc_deltas, Tensor(e!)[] state_steps, *, float lr, float rho, float eps, "
      "float weight_decay, bool maximize, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()");
  OptimOp<Adadelta>::register_in(m);
}

}  // namespace dlkernels
