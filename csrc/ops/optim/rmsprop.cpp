// rmsprop_: schema, scalars and PyTorch's path; the rest is optim.h's. The arithmetic is in
// cpu/rmsprop.inl.h.
#include "ops/core/torch_headers.h"

#include "ops/optim/optim.h"

namespace dlkernels {
namespace {

struct Rmsprop {
  static constexpr const char* kName = "rmsprop_";
  static constexpr std::array kLists{"params",           "grads",      "square_avgs", "grad_avgs",
                                     "momentum_buffers", "state_steps"};
  static constexpr auto kKernel = &cpu::Kernels::rmsprop;

  using Scalars = std::tuple<double, double, double, double, double, bool, bool>;
  double lr, alpha, eps, weight_decay, momentum;
  bool centered, maximize;

  bool wants(size_t list) const { return list == 3 ? centered : list == 4 ? momentum > 0 : true; }

  cpu::RmspropScalars scalars(double /*step*/) const {
    return {.lr = static_cast<float>(lr),
            .alpha = static_cast<float>(alpha),
            .one_minus_alpha = static_cast<float>(1 - alpha),
            .eps = static_cast<float>(eps),
            .momentum = static_cast<float>(momentum)};
  }

  // torch.optim.rmsprop._single_tensor_rmsprop
  void aten_step(const Tensor& p, const Tensor& g, const std::array<Tensor, 3>& states,
                 double /*step*/) const {
    const auto& [square_avg, grad_avg, buffer] = states;
    scale_(square_avg, alpha).addcmul_(g, g, 1 - alpha);
    if (centered) grad_avg.lerp_(g, 1 - alpha);
    const Tensor avg =
        (centered ? square_avg.addcmul(grad_avg, grad_avg, -1) : square_avg).sqrt().add_(eps);
    if (momentum > 0)
      p.add_(scale_(buffer, momentum).addcdiv_(g, avg), -lr);
    else
      p.addcdiv_(g, avg, -lr);
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(dlkernels, m) {
  // grad_avgs are none where not centered, momentum_buffers without momentum.
  m.def(
      "rmsprop_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] square_avgs, "
      "Tensor(d!)[] grad_avgs, Tensor(e!)[] momentum_buffers, Tensor(f!)[] state_steps, *, "
      "float lr, float alpha, float eps, float weight_decay, float momentum, bool centered, "
      "bool maximize, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()");
  OptimOp<Rmsprop>::register_in(m);
}

}  // namespace dlkernels
