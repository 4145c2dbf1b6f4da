// adam_: schema, checks and CPU; nothing here has a gradient. The arithmetic is in
// cpu/adam.inl.h.
#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/TypeCast.h>

#include <algorithm>
#include <cmath>

#include "common.h"

namespace dlkernels {

TORCH_LIBRARY_FRAGMENT(dlkernels, m) {
  // grads are written where grad_scale is given: they are left unscaled, as by torch._fused_adam_.
  m.def(
      "adam_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, "
      "Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] state_steps, *, float lr, float beta1, float beta2, "
      "float weight_decay, float eps, bool maximize, bool decoupled_weight_decay, "
      "Tensor? grad_scale=None, Tensor? found_inf=None) -> ()");
}

namespace {

OpStats adam_stats("adam_");

struct Adam {
  at::TensorList params, grads, exp_avgs, exp_avg_sqs, state_steps;
  double lr, beta1, beta2, weight_decay, eps;
  bool maximize, decoupled_weight_decay;
  const optional<Tensor>&grad_scale, &found_inf;

  struct List {
    const char* name;
    at::TensorList tensors;
    bool written, scalars;
  };
  std::array<List, 5> lists() const {
    return {{{"params", params, true, false},
             {"grads", grads, grad_scale.has_value(), false},
             {"exp_avgs", exp_avgs, true, false},
             {"exp_avg_sqs", exp_avg_sqs, true, false},
             {"state_steps", state_steps, true, true}}};
  }
};

// The op's argument list, written once: every implementation below takes an Adam.
template <void (*run)(const Adam&)>
void adam(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
          at::TensorList exp_avg_sqs, at::TensorList state_steps, double lr, double beta1,
          double beta2, double weight_decay, double eps, bool maximize, bool decoupled_weight_decay,
          const optional<Tensor>& grad_scale, const optional<Tensor>& found_inf) {
  run({params, grads, exp_avgs, exp_avg_sqs, state_steps, lr, beta1, beta2, weight_decay, eps,
       maximize, decoupled_weight_decay, grad_scale, found_inf});
}

template <bool (*is)(const Tensor&)>
bool all(const Adam& a) {
  for (const auto& list : a.lists())
    for (const Tensor& t : list.tensors)
      if (!is(t)) return false;
  return (!a.grad_scale || is(*a.grad_scale)) && (!a.found_inf || is(*a.found_inf));
}

// ---- shapes: shared by every device and by torch.compile ----------------------------------

// A step, a scale or a flag. On another device it would choose that device's kernel: meta's, which
// does nothing.
void check_scalar(const Adam& a, const char* name, const Tensor& t) {
  TORCH_CHECK(t.defined() && t.layout() == at::kStrided && t.sym_numel() == 1, "adam_: ", name,
              " must be a dense tensor of one element, got ",
              t.defined() ? t.toString() : "undefined");
  TORCH_CHECK(a.params.empty() || t.device().is_cpu() || t.device() == a.params[0].device(),
              "adam_: ", name, " must be on the CPU or on ", a.params[0].device(), ", got ",
              t.device());
  TORCH_CHECK_NOT_IMPLEMENTED(!at::isComplexType(t.scalar_type()), "adam_: ", name,
                              " must be real, got ", t.scalar_type());
}

// Everything that must hold, before anything is written.
void check(const Adam& a) {
  const size_t n = a.params.size();
  for (const auto& [name, tensors, written, scalars] : a.lists()) {
    TORCH_CHECK(tensors.size() == n, "adam_: ", name, " must have one tensor for each of the ", n,
                " params, got ", tensors.size());
    for (size_t i = 0; i < n; ++i) {
      const Tensor &t = tensors[i], &param = a.params[i];
      if (scalars) {
        check_scalar(a, name, t);
      } else {
        TORCH_CHECK(t.defined() && t.layout() == at::kStrided && !t.is_nested(), "adam_: ", name,
                    "[", i, "] must be dense, got ", t.defined() ? t.toString() : "undefined");
        check_device("adam_", a.params[0], t);
        TORCH_CHECK(t.sym_sizes() == param.sym_sizes(), "adam_: ", name, "[", i, "] must be ",
                    param.sym_sizes(), " as params[", i, "] is, got ", t.sym_sizes());
        TORCH_CHECK(t.scalar_type() == param.scalar_type(), "adam_: ", name, "[", i, "] must be ",
                    param.scalar_type(), " as params[", i, "] is, got ", t.scalar_type());
        TORCH_CHECK_NOT_IMPLEMENTED(at::isFloatingType(t.scalar_type()), "adam_: ", name, "[", i,
                                    "] must be of a real floating dtype, got ", t.scalar_type());
      }
      if (!written) continue;
      at::assert_no_internal_overlap(t);
      TORCH_CHECK(!t.is_inference() || c10::InferenceMode::is_enabled(), "adam_: ", name, "[", i,
                  "] must not be an inference tensor outside InferenceMode");
    }
  }
  if (a.grad_scale) check_scalar(a, "grad_scale", *a.grad_scale);
  if (a.found_inf) check_scalar(a, "found_inf", *a.found_inf);
}

// A backward pass that saved any of these must notice (torch's own fused Adam on the CPU forgets).
void bump_versions(const Adam& a) {
  for (const auto& list : a.lists()) {
    if (!list.written) continue;
    for (const Tensor& t : list.tensors) t.unsafeGetTensorImpl()->bump_version();
  }
}

void adam_meta(const Adam& a) {
  check(a);
  bump_versions(a);
}

// PyTorch's own, for what is not ours: torch.optim.adam._single_tensor_adam.
void adam_torch(const Adam& a) {
  check(a);
  if (a.params.empty()) return;
  adam_stats.torch_ran();
  if (a.found_inf && a.found_inf->item<double>() != 0) return;
  for (size_t i = 0; i < a.params.size(); ++i) {
    const Tensor &p = a.params[i], &m = a.exp_avgs[i], &v = a.exp_avg_sqs[i];
    Tensor g = a.grads[i];
    if (a.grad_scale) g.div_(a.grad_scale->reshape({}));
    if (a.maximize) g = g.neg();
    const double step = a.state_steps[i].add_(1).item<double>();
    if (a.decoupled_weight_decay)
      p.mul_(1 - a.lr * a.weight_decay);
    else if (a.weight_decay != 0)
      g = g.add(p, a.weight_decay);
    m.lerp_(g, 1 - a.beta1);
    v.mul_(a.beta2).addcmul_(g, g, 1 - a.beta2);
    const Tensor denom = v.sqrt().div_(std::sqrt(1 - std::pow(a.beta2, step))).add_(a.eps);
    p.addcdiv_(m, denom, -a.lr / (1 - std::pow(a.beta1, step)));
  }
}

// ---- cpu ----------------------------------------------------------------------------------

constexpr int64_t kGrain = 32768;  // about 20 us: below, a fork costs more than it saves

bool lie_alike(const Tensor& a, const Tensor& b) {
  if (a.strides() == b.strides()) return true;
  for (int64_t dim = 0; dim < a.dim(); ++dim)
    if (a.size(dim) > 1 && a.stride(dim) != b.stride(dim)) return false;
  return true;
}

// The tensors of a call as the kernel takes them: one run of memory each, in the order of the
// parameter. What lies otherwise is copied, and copied back where it is written.
class Runs {
 public:
  explicit Runs(const Adam& a) {
    tensors_.reserve(a.params.size());
    starts_.reserve(a.params.size());
    for (size_t i = 0; i < a.params.size(); ++i) {
      const Tensor& param = a.params[i];
      const Tensor order =
          param.is_non_overlapping_and_dense() ? param : at::empty_like(param).copy_(param);
      if (!order.is_same(param)) back_.emplace_back(param, order);
      cpu::AdamTensor& t = tensors_.emplace_back();
      t.param = order.mutable_data_ptr<float>();
      t.exp_avg = written(order, a.exp_avgs[i]);
      t.exp_avg_sq = written(order, a.exp_avg_sqs[i]);
      t.unscaled = a.grad_scale ? written(order, a.grads[i]) : nullptr;
      t.grad = t.unscaled ? t.unscaled : read(order, a.grads[i]);
      starts_.push_back(numel_);
      numel_ += order.numel();
    }
  }

  cpu::AdamTensor& operator[](size_t i) { return tensors_[i]; }

  // The runs are one long row that is cut anywhere, so threads get equal shares however the sizes
  // differ. Runs that share memory (a parameter listed twice) are taken in order instead.
  void step() const {
    const bool alone = numel_ <= kGrain || at::get_num_threads() == 1 || overlap();
    parallel_chunks(numel_, alone ? numel_ : kGrain, [&](int64_t begin, int64_t end) {
      size_t i = std::upper_bound(starts_.begin(), starts_.end(), begin) - starts_.begin() - 1;
      for (; begin < end; ++i) {
        const int64_t start = starts_[i], stop = std::min(end, stop_of(i));
        cpu::kernels().adam(tensors_[i], begin - start, stop - start);
        begin = stop;
      }
    });
    for (const auto& [original, copy] : back_) original.copy_(copy);
  }

 private:
  const float* read(const Tensor& order, const Tensor& t) {
    if (lie_alike(order, t)) return t.const_data_ptr<float>();
    kept_.push_back(at::empty_like(order).copy_(t));
    return kept_.back().const_data_ptr<float>();
  }
  float* written(const Tensor& order, const Tensor& t) {
    if (lie_alike(order, t)) return t.mutable_data_ptr<float>();
    back_.emplace_back(t, at::empty_like(order).copy_(t));
    return back_.back().second.mutable_data_ptr<float>();
  }
  int64_t stop_of(size_t i) const { return i + 1 < starts_.size() ? starts_[i + 1] : numel_; }

  // Step after step it is the same memory: what was found apart once is not sorted again.
  bool overlap() const {
    thread_local std::vector<std::pair<const float*, const float*>> apart;
    std::vector<std::pair<const float*, const float*>> memory;
    memory.reserve(4 * tensors_.size());
    for (size_t i = 0; i < tensors_.size(); ++i)
      if (const int64_t n = stop_of(i) - starts_[i])
        for (const float* p : {static_cast<const float*>(tensors_[i].param), tensors_[i].grad,
                               static_cast<const float*>(tensors_[i].exp_avg),
                               static_cast<const float*>(tensors_[i].exp_avg_sq)})
          memory.emplace_back(p, p + n);
    if (memory == apart) return false;
    auto sorted = memory;
    std::sort(sorted.begin(), sorted.end());
    for (size_t i = 1; i < sorted.size(); ++i)
      if (sorted[i].first < sorted[i - 1].second) return true;
    apart = std::move(memory);
    return false;
  }

  std::vector<cpu::AdamTensor> tensors_;
  std::vector<int64_t> starts_;
  int64_t numel_ = 0;
  std::vector<Tensor> kept_;
  std::vector<std::pair<Tensor, Tensor>> back_;  // (original, copy)
};

// The scalars of one step, worked out in double.
void set_scalars(cpu::AdamTensor& t, const Adam& a, double step) {
  t.grad_scale = a.grad_scale ? *a.grad_scale->const_data_ptr<float>() : 1.0f;
  t.sign = a.maximize ? -1.0f : 1.0f;
  t.weight_decay = static_cast<float>(a.decoupled_weight_decay ? 0 : a.weight_decay);
  t.shrink = static_cast<float>(a.decoupled_weight_decay ? 1 - a.lr * a.weight_decay : 1);
  t.one_minus_beta1 = static_cast<float>(1 - a.beta1);
  t.beta2 = static_cast<float>(a.beta2);
  t.one_minus_beta2 = static_cast<float>(1 - a.beta2);
  t.eps = static_cast<float>(a.eps);
  t.rsqrt_bias = static_cast<float>(1 / std::sqrt(1 - std::pow(a.beta2, step)));
  t.step_size = static_cast<float>(a.lr / (1 - std::pow(a.beta1, step)));
}

void adam_cpu(const Adam& a) {
  check(a);
  if (!all<is_plain>(a)) return adam_torch(a);  // tangents stop at adam_autograd
  for (const double x : {a.lr, a.weight_decay, a.eps})
    c10::checked_convert<float>(x, "float");  // RuntimeError on overflow, as PyTorch's ops
  adam_stats.kernel_ran();
  // torch asks for exactly 1, but sums the flag over devices.
  if (a.found_inf && *a.found_inf->const_data_ptr<float>() != 0) return;
  Runs runs(a);
  for (size_t i = 0; i < a.params.size(); ++i) {
    float& step = *a.state_steps[i].mutable_data_ptr<float>();
    step += 1;
    set_scalars(runs[i], a, step);
  }
  runs.step();
  bump_versions(a);
}

// ---- gradient: there is none ---------------------------------------------------------------

void adam_autograd(const Adam& a) {
  if (!all<is_ours>(a)) return adam_torch(a);
  if (at::GradMode::is_enabled())
    for (const auto& list : a.lists())
      for (const Tensor& t : list.tensors)
        TORCH_CHECK(!t.requires_grad(), "adam_: tensors that require grad must be updated under ",
                    "torch.no_grad(), got such a one in ", list.name);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  static const auto op = find_op<decltype(adam<adam_cpu>)>("dlkernels::adam_");
  op.call(a.params, a.grads, a.exp_avgs, a.exp_avg_sqs, a.state_steps, a.lr, a.beta1, a.beta2,
          a.weight_decay, a.eps, a.maximize, a.decoupled_weight_decay, a.grad_scale, a.found_inf);
}

}  // namespace

TORCH_LIBRARY_IMPL(dlkernels, CPU, m) { m.impl("adam_", adam<adam_cpu>); }
TORCH_LIBRARY_IMPL(dlkernels, Meta, m) { m.impl("adam_", adam<adam_meta>); }
TORCH_LIBRARY_IMPL(dlkernels, Autograd, m) { m.impl("adam_", adam<adam_autograd>); }
// Not register_torch_path: a step taken inside an autocast region is still ours, nothing is cast.
TORCH_LIBRARY_IMPL(dlkernels, CompositeExplicitAutograd, m) { m.impl("adam_", adam<adam_torch>); }
TORCH_LIBRARY_IMPL(dlkernels, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("adam_", adam<adam_torch>);
}

}  // namespace dlkernels
