// cross_entropy: schema, shapes, CPU and gradient. The arithmetic is in cpu/cross_entropy.inl.h.
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/Reduction.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/graph_task.h>

#include "common.h"

namespace dlkernels {

TORCH_LIBRARY_FRAGMENT(dlkernels, m) {
  m.def(
      "cross_entropy(Tensor input, Tensor target, Tensor? weight=None, int reduction=1, "
      "SymInt ignore_index=-100, float label_smoothing=0.0) -> Tensor");
  // The loss, and its gradient in the same pass: (rows, C), classes last.
  m.def(
      "cross_entropy_forward(Tensor input, Tensor target, Tensor? weight, int reduction, "
      "SymInt ignore_index, float label_smoothing) -> (Tensor, Tensor)");
  m.def("cross_entropy_backward(Tensor grad_loss, Tensor grad, Tensor input) -> Tensor");
}

namespace {

OpStats cross_entropy_stats("cross_entropy"),
    cross_entropy_backward_stats("cross_entropy_backward");

using LossAndGrad = std::tuple<Tensor, Tensor>;
using Args = Tensor(const Tensor& input, const Tensor& target, const optional<Tensor>& weight,
                    int64_t reduction, c10::SymInt ignore_index, double label_smoothing);
using Forward = LossAndGrad(const Tensor& input, const Tensor& target,
                            const optional<Tensor>& weight, int64_t reduction,
                            c10::SymInt ignore_index, double label_smoothing);
using Backward = Tensor(const Tensor& grad_loss, const Tensor& grad, const Tensor& input);

// PyTorch's own, for what is not ours.
Tensor cross_entropy_torch(const Tensor& input, const Tensor& target,
                           const optional<Tensor>& weight, int64_t reduction,
                           c10::SymInt ignore_index, double label_smoothing) {
  cross_entropy_stats.torch_ran();
  return at::cross_entropy_loss_symint(input, target, weight, reduction, ignore_index,
                                       label_smoothing);
}

int64_t class_dim(const Tensor& input) { return input.dim() == 1 ? 0 : 1; }

bool has_probabilities(const Tensor& input, const Tensor& target) {
  return input.sym_sizes() == target.sym_sizes();
}

// PyTorch takes a label_smoothing below 0 or NaN for none.
void check(const Tensor& input, const Tensor& target, const optional<Tensor>& weight,
           double label_smoothing) {
  check_device("cross_entropy", input, target);
  check_device("cross_entropy", input, weight);
  TORCH_CHECK(label_smoothing >= 0 && label_smoothing <= 1,
              "cross_entropy: label_smoothing must be between 0 and 1, got ", label_smoothing);
}

// input (C), (N, C) or (N, C, ...); target class indices without the C, or probabilities alike;
// weight (C). All else is PyTorch's, which says what is wrong with it, if anything is.
bool ours(const Tensor& input, const Tensor& target, const optional<Tensor>& weight,
          int64_t reduction, const c10::SymInt& ignore_index) {
  if (!is_ours(input) || !is_ours(weight) || input.dim() == 0 || input.sym_numel() == 0 ||
      reduction < at::Reduction::None || reduction > at::Reduction::Sum)
    return false;
  const int64_t dim = class_dim(input);
  if (weight &&
      (weight->dim() != 1 || weight->sym_size(0) != input.sym_size(dim) || weight->requires_grad()))
    return false;
  if (has_probabilities(input, target))
    return is_ours(target) && !target.requires_grad() && ignore_index < 0;
  const bool bytes = target.scalar_type() == at::kByte && input.dim() <= 2;  // as PyTorch
  if (target.layout() != at::kStrided || target.dim() != input.dim() - 1 ||
      (target.scalar_type() != at::kLong && !bytes))
    return false;
  for (int64_t i = 0; i < target.dim(); ++i)
    if (target.sym_size(i) != input.sym_size(i < dim ? i : i + 1)) return false;
  return true;
}

// ---- shapes: shared by every device and by torch.compile, hence SymInt --------------------

LossAndGrad cross_entropy_forward_meta(const Tensor& input, const Tensor& target,
                                       const optional<Tensor>& weight, int64_t reduction,
                                       c10::SymInt ignore_index, double label_smoothing) {
  check(input, target, weight, label_smoothing);
  TORCH_CHECK_NOT_IMPLEMENTED(
      ours(input, target, weight, reduction, ignore_index),
      "cross_entropy_forward: input must be (N, C, ...) of float32, and target (N, ...) of class "
      "indices or (N, C, ...) of probabilities, got input ",
      input.sym_sizes(), " of ", input.scalar_type(), " and target ", target.sym_sizes(), " of ",
      target.scalar_type());
  c10::SymDimVector sizes;
  for (int64_t i = 0; reduction == at::Reduction::None && i < input.dim(); ++i)
    if (i != class_dim(input)) sizes.push_back(input.sym_size(i));
  const c10::SymInt C = input.sym_size(class_dim(input));
  return {at::empty_symint(sizes, input.options()),
          at::empty_symint({input.sym_numel() / C, C}, input.options())};
}

Tensor cross_entropy_meta(const Tensor& input, const Tensor& target, const optional<Tensor>& weight,
                          int64_t reduction, c10::SymInt ignore_index, double label_smoothing) {
  check(input, target, weight, label_smoothing);
  if (!ours(input, target, weight, reduction, ignore_index))
    return cross_entropy_torch(input, target, weight, reduction, ignore_index, label_smoothing);
  return std::get<0>(
      cross_entropy_forward_meta(input, target, weight, reduction, ignore_index, label_smoothing));
}

Tensor cross_entropy_backward_meta(const Tensor& grad_loss, const Tensor& grad,
                                   const Tensor& input) {
  check_device("cross_entropy_backward", input, grad_loss);
  check_device("cross_entropy_backward", input, grad);
  TORCH_CHECK_NOT_IMPLEMENTED(
      is_ours(grad_loss) && is_ours(grad) && is_ours(input),
      "cross_entropy_backward: tensors must be dense float32, got grad_loss ",
      grad_loss.scalar_type(), ", grad ", grad.scalar_type(), ", input ", input.scalar_type());
  TORCH_CHECK(input.dim() > 0 && input.sym_numel() != 0,
              "cross_entropy_backward: input must be (C) or (N, C, ...) and not empty, got ",
              input.sym_sizes());
  const c10::SymInt C = input.sym_size(class_dim(input)), rows = input.sym_numel() / C;
  TORCH_CHECK(grad.dim() == 2 && grad.sym_size(0) == rows && grad.sym_size(1) == C,
              "cross_entropy_backward: grad must be ", rows, " rows of ", C, ", got ",
              grad.sym_sizes());
  TORCH_CHECK(grad_loss.dim() == 0 || grad_loss.sym_numel() == rows,
              "cross_entropy_backward: grad_loss must be one number or ", rows, ", got ",
              grad_loss.sym_sizes());
  return at::empty_symint(input.sym_sizes(), input.options());
}

// ---- cpu ----------------------------------------------------------------------------------

// Classes last, in one stretch of memory.
Tensor as_rows(const Tensor& x) { return (x.dim() <= 2 ? x : x.movedim(1, -1)).contiguous(); }

int64_t grain(int64_t C) { return 16384 / C + 1; }  // rows: about 20 us of work

// Checked here, because kernels trust it: every target is a class or ignored. Returns what a mean
// divides by: the number of targets, or the sum of their weights.
double check_targets(const Tensor& target, int64_t C, int64_t ignore_index, const float* weight) {
  double total = 0;
  const int64_t* t = target.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < target.numel(); ++r) {
    if (t[r] == ignore_index) continue;
    TORCH_CHECK_INDEX(t[r] >= 0 && t[r] < C, "Target ", t[r],
                      " is out of bounds: it must be one of ", C, " classes or ignore_index ",
                      ignore_index);
    total += weight ? weight[t[r]] : 1;
  }
  return total;
}

// loss, and grad (rows, C) unless that is undefined
void compute(const Tensor& input, const Tensor& target, const optional<Tensor>& weight,
             int64_t reduction, int64_t ignore_index, double label_smoothing, const Tensor& loss,
             const Tensor& grad) {
  cross_entropy_stats.kernel_ran();
  const Tensor x = as_rows(input), w = weight ? weight->contiguous() : Tensor();
  const int64_t C = input.size(class_dim(input)), rows = input.numel() / C;
  cpu::CrossEntropy job = {.x = x.const_data_ptr<float>(),
                           .C = C,
                           .target = nullptr,
                           .probabilities = nullptr,
                           .weight = weight ? w.const_data_ptr<float>() : nullptr,
                           .ignore_index = ignore_index,
                           .smoothing = static_cast<float>(label_smoothing),
                           .scale = 1,
                           .loss = nullptr,
                           .grad = grad.defined() ? grad.mutable_data_ptr<float>() : nullptr};
  Tensor t;
  double count = static_cast<double>(rows);
  if (has_probabilities(input, target)) {
    t = as_rows(target);
    job.probabilities = t.const_data_ptr<float>();
  } else {
    t = target.to(at::kLong).contiguous();
    job.target = t.const_data_ptr<int64_t>();
    count = check_targets(t, C, ignore_index, job.weight);
  }
  if (reduction == at::Reduction::Mean) job.scale = static_cast<float>(1 / count);
  const bool reduced = reduction != at::Reduction::None;
  const Tensor losses = reduced ? at::empty({rows}, input.options()) : loss;
  job.loss = losses.mutable_data_ptr<float>();
  at::parallel_for(0, rows, grain(C), [&](int64_t begin, int64_t end) {
    cpu::kernels().cross_entropy(job, begin, end);
  });
  if (!reduced) return;
  double sum = 0;
  for (int64_t r = 0; r < rows; ++r) sum += job.loss[r];
  *loss.mutable_data_ptr<float>() =
      static_cast<float>(reduction == at::Reduction::Mean ? sum / count : sum);
}

LossAndGrad cross_entropy_forward_cpu(const Tensor& input, const Tensor& target,
                                      const optional<Tensor>& weight, int64_t reduction,
                                      c10::SymInt ignore_index, double label_smoothing) {
  auto [loss, grad] =
      cross_entropy_forward_meta(input, target, weight, reduction, ignore_index, label_smoothing);
  compute(input, target, weight, reduction, ignore_index.expect_int(), label_smoothing, loss, grad);
  return {loss, grad};
}

Tensor cross_entropy_cpu(const Tensor& input, const Tensor& target, const optional<Tensor>& weight,
                         int64_t reduction, c10::SymInt ignore_index, double label_smoothing) {
  check(input, target, weight, label_smoothing);
  if (!ours(input, target, weight, reduction, ignore_index))
    return cross_entropy_torch(input, target, weight, reduction, ignore_index, label_smoothing);
  c10::DimVector sizes;
  for (int64_t i = 0; reduction == at::Reduction::None && i < input.dim(); ++i)
    if (i != class_dim(input)) sizes.push_back(input.size(i));
  const Tensor loss = at::empty(sizes, input.options());
  compute(input, target, weight, reduction, ignore_index.expect_int(), label_smoothing, loss, {});
  return loss;
}

Tensor cross_entropy_backward_cpu(const Tensor& grad_loss, const Tensor& grad,
                                  const Tensor& input) {
  const Tensor grad_x = cross_entropy_backward_meta(grad_loss, grad, input);
  cross_entropy_backward_stats.kernel_ran();
  const Tensor factor = grad_loss.contiguous(), g = grad.contiguous();
  const bool direct = input.dim() <= 2;  // else classes go back to their dimension
  const Tensor to = direct ? grad_x : at::empty_like(g);
  const int64_t step = grad_loss.dim() == 0 ? 0 : 1, C = g.size(1);
  at::parallel_for(0, g.size(0), grain(C), [&](int64_t begin, int64_t end) {
    cpu::kernels().scale_rows(g.const_data_ptr<float>(), factor.const_data_ptr<float>(), step,
                              to.mutable_data_ptr<float>(), C, begin, end);
  });
  if (!direct) grad_x.copy_(to.view(input.movedim(1, -1).sizes()).movedim(-1, 1));
  return grad_x;
}

// ---- gradient -----------------------------------------------------------------------------

struct CrossEntropyFunction : torch::autograd::Function<CrossEntropyFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& target,
                        const optional<Tensor>& weight, int64_t reduction, c10::SymInt ignore_index,
                        double label_smoothing) {
    static const auto op = find_op<Forward>("dlkernels::cross_entropy_forward");
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [loss, grad] = op.call(input, target, weight, reduction, ignore_index, label_smoothing);
    ctx->save_for_backward({input, target, weight.value_or(Tensor()), grad});
    ctx->saved_data["reduction"] = reduction;
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->saved_data["label_smoothing"] = label_smoothing;
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find_op<Backward>("dlkernels::cross_entropy_backward");
    const auto saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &target = saved[1], &weight = saved[2], &grad = saved[3];
    variable_list out(6);
    if (at::GradMode::is_enabled()) {
      const auto loss = [&](const variable_list& in) {
        return at::cross_entropy_loss_symint(in[0], target, weight,
                                             ctx->saved_data["reduction"].toInt(),
                                             ctx->saved_data["ignore_index"].toSymInt(),
                                             ctx->saved_data["label_smoothing"].toDouble());
      };
      out[0] = differentiable_backward(loss, {input}, grads[0])[0];
    } else if (is_one(grads[0]) && input.dim() == 2 &&
               !torch::autograd::get_current_graph_task_keep_graph()) {
      out[0] = grad;  // nothing to scale, and the graph that holds it is freed right after
    } else {
      out[0] = op.call(grads[0], grad, input);
    }
    return out;
  }

  // A number that can be looked at (not one that torch.compile traces), and it is 1.
  static bool is_one(const Tensor& x) {
    return !at::isTensorSubclassLike(x) && x.device().is_cpu() && x.dim() == 0 && is_ours(x) &&
           *x.const_data_ptr<float>() == 1;
  }
};

Tensor cross_entropy_autograd(const Tensor& input, const Tensor& target,
                              const optional<Tensor>& weight, int64_t reduction,
                              c10::SymInt ignore_index, double label_smoothing) {
  check(input, target, weight, label_smoothing);
  if (!ours(input, target, weight, reduction, ignore_index))
    return cross_entropy_torch(input, target, weight, reduction, ignore_index, label_smoothing);
  if (at::GradMode::is_enabled() && input.requires_grad())
    return CrossEntropyFunction::apply(input, target, weight, reduction, ignore_index,
                                       label_smoothing);
  static const auto op = find_op<Args>("dlkernels::cross_entropy");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(input, target, weight, reduction, ignore_index, label_smoothing);
}

const bool torch_paths = (register_torch_path("cross_entropy", cross_entropy_torch), true);

}  // namespace

TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("cross_entropy", cross_entropy_cpu);
  m.impl("cross_entropy_forward", cross_entropy_forward_cpu);
  m.impl("cross_entropy_backward", cross_entropy_backward_cpu);
}
TORCH_LIBRARY_IMPL(dlkernels, Meta, m) {
  m.impl("cross_entropy", cross_entropy_meta);
  m.impl("cross_entropy_forward", cross_entropy_forward_meta);
  m.impl("cross_entropy_backward", cross_entropy_backward_meta);
}
TORCH_LIBRARY_IMPL(dlkernels, Autograd, m) { m.impl("cross_entropy", cross_entropy_autograd); }

}  // namespace dlkernels
