// adam_: schema, scalars, CUDA and PyTorch's path; the rest is optim.h's. The arithmetic is in
// cpu/adam.inl.h and cuda/adam.cu.
#include "ops/core/torch_headers.h"

#include <cmath>

#include "ops/optim/optim.h"

namespace dlkernels {
namespace {

struct Adam {
  static constexpr const char* kName = "adam_";
  static constexpr std::array kLists{"params", "grads", "exp_avgs", "exp_avg_sqs", "state_steps"};
  static constexpr auto kKernel = &cpu::Kernels::adam;

  using Scalars = std::tuple<double, double, double, double, double, bool, bool, DeviceLr>;
  double number_lr, beta1, beta2, weight_decay, eps;
  bool maximize, decoupled_weight_decay;
  DeviceLr device_lr;  // in place of the number

  double lr() const { return device_lr ? device_lr->item<double>() : number_lr; }

  cpu::AdamScalars scalars(double step) const {
    const double lr = this->lr();
    return {.one_minus_beta1 = static_cast<float>(1 - beta1),
            .beta2 = static_cast<float>(beta2),
            .one_minus_beta2 = static_cast<float>(1 - beta2),
            .eps = static_cast<float>(eps),
            .shrink = static_cast<float>(decoupled_weight_decay ? 1 - lr * weight_decay : 1),
            .rsqrt_bias = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, step))),
            .step_size = static_cast<float>(lr / (1 - std::pow(beta1, step)))};
  }

  bool step_cuda(const OptimLists& a) const {
    const at::TensorList params = a.params(), steps = a.lists[4].tensors;
    if (params.empty()) return true;
    const bool on_device = steps[0].is_cuda();
    for (const Tensor& step : steps)
      if (step.is_cuda() != on_device || step.scalar_type() != at::kFloat) return false;
    const auto number = [&](const optional<Tensor>& t) {
      return t ? t->to(params[0].device(), at::kFloat) : Tensor();
    };
    const Tensor grad_scale = number(a.grad_scale);
    // Steps on the CPU are not counted where the device finds an infinity: this waits for it.
    if (!on_device && a.found_inf && a.found_inf->item<double>() != 0) return true;
    const Tensor found_inf = on_device ? number(a.found_inf) : Tensor();
    const Tensor lr_there = on_device ? number(device_lr) : Tensor();
    const auto pointer = [](const Tensor& t) {
      return t.defined() ? t.const_data_ptr<float>() : nullptr;
    };
    const cuda::AdamOptions options = {.lr = lr_there.defined() ? 0 : lr(),
                                       .beta1 = beta1,
                                       .beta2 = beta2,
                                       .weight_decay = weight_decay,
                                       .eps = eps,
                                       .maximize = maximize,
                                       .decoupled_weight_decay = decoupled_weight_decay,
                                       .device_lr = pointer(lr_there),
                                       .grad_scale = pointer(grad_scale),
                                       .found_inf = pointer(found_inf)};
    for (const auto dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
      std::vector<cuda::AdamTensor> tensors;
      for (size_t i = 0; i < params.size(); ++i) {
        if (params[i].scalar_type() != dtype) continue;
        float* const step = steps[i].mutable_data_ptr<float>();
        tensors.push_back({params[i].mutable_data_ptr(), a.grads()[i].mutable_data_ptr(),
                           a.lists[2].tensors[i].mutable_data_ptr(),
                           a.lists[3].tensors[i].mutable_data_ptr(), on_device ? step : nullptr,
                           on_device ? 0.0 : * step += 1, params[i].numel()});
      }
      if (tensors.empty()) continue;
      launch("adam_", params[0], [&](const cuda::Kernels& kernels, cuda::Stream stream) {
        const int64_t count = static_cast<int64_t>(tensors.size());
        const Tensor workspace =
            at::empty({kernels.adam_workspace(count)}, params[0].options().dtype(at::kFloat));
        return kernels.adam(dtype_of(dtype), tensors.data(), count, options,
                            workspace.mutable_data_ptr<float>(), stream);
      });
    }
    return true;
  }

  // torch.optim.adam._single_tensor_adam
  void aten_step(const Tensor& p, const Tensor& g, const std::array<Tensor, 2>& states,
                 double step) const {
    const double lr = this->lr();
    const auto& [m, v] = states;
    if (decoupled_weight_decay) scale_(p, 1 - lr * weight_decay);
    m.lerp_(g, 1 - beta1);
    scale_(v, beta2).addcmul_(g, g, 1 - beta2);
    const Tensor denom = v.sqrt().div_(std::sqrt(1 - std::pow(beta2, step))).add_(eps);
    p.addcdiv_(m, denom, -lr / (1 - std::pow(beta1, step)));
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(dlkernels, m) {
  // grads are written where grad_scale is given: they are left unscaled, as by torch._fused_adam_.
  // device_lr replaces lr: with steps on the device nothing waits for it.
  m.def(
      "adam_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, "
      "Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] state_steps, *, float lr, float beta1, float beta2, "
      "float weight_decay, float eps, bool maximize, bool decoupled_weight_decay, "
      "Tensor? device_lr=None, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()");
  OptimOp<Adam>::register_in(m);
}

}  // namespace dlkernels
