// sgd_: schema, scalars and PyTorch's path; the rest is optim.h's. The arithmetic is in
// cpu/sgd.inl.h.
#include "ops/core/torch_headers.h"

#include "ops/optim/optim.h"

namespace dlkernels {
namespace {

struct Sgd {
  static constexpr const char* kName = "sgd_";
  static constexpr std::array kLists{"params", "grads", "momentum_buffers"};
  static constexpr auto kKernel = &cpu::Kernels::sgd;

  using Scalars = std::tuple<double, double, double, double, bool, bool, bool>;
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize, is_first_step;

  bool wants(size_t list) const { return list != 2 || momentum != 0; }

  cpu::SgdScalars scalars(double /*step*/) const {
    return {.lr = static_cast<float>(lr),
            .momentum = static_cast<float>(momentum),
            .one_minus_dampening = static_cast<float>(1 - dampening),
            .nesterov = nesterov,
            .is_first_step = is_first_step};
  }

  // torch.optim.sgd._single_tensor_sgd
  void aten_step(const Tensor& p, const Tensor& g, const std::array<Tensor, 1>& states,
                 double /*step*/) const {
    if (momentum == 0) return void(p.add_(g, -lr));
    const Tensor& buffer = states[0];
    is_first_step ? buffer.copy_(g) : scale_(buffer, momentum).add_(g, 1 - dampening);
    p.add_(nesterov ? g.add(buffer, momentum) : buffer, -lr);
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(dlkernels, m) {
  // momentum_buffers are none without momentum, and not read in the first step.
  m.def(
      "sgd_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffers, *, float lr, "
      "float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, "
      "bool is_first_step, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()");
  OptimOp<Sgd>::register_in(m);
}

}  // namespace dlkernels
