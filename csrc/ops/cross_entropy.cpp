// cross_entropy: loss[n] = -sum_c g[n, c] * log softmax(input[n])[c], where g is the target. The
// arithmetic is in cpu/cross_entropy.inl.h and cuda/cross_entropy.cu; cross_entropy_cuda.cpp calls
// the latter.
#include "ops/core/torch_headers.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "ops/core/op.h"
#include "ops/cross_entropy.h"

namespace dlkernels {
namespace {

using namespace entropy;

OpStats stats("cross_entropy");

// ---- cpu ----------------------------------------------------------------------------------

// The sum of f(begin, end) over blocks of `block` rows, about 5 us of work: they follow the shape,
// so that the sum does not depend on the threads.
template <class F>
double sum_blocks(int64_t rows, int64_t block, const F& f) {
  if (rows <= block) return f(0, rows);
  std::vector<double> sums((rows + block - 1) / block);
  parallel_chunks(static_cast<int64_t>(sums.size()), 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sums[i] = f(i * block, std::min(rows, (i + 1) * block));
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

// Rows of C classes in such a block.
int64_t block_of(int64_t C) { return std::max<int64_t>(1, 16384 / (C + 32)); }

// What a mean divides by: the targets' weights, or how many rows are not ignored. No kernel reads
// a target before this has seen them all.
double check_targets(const int64_t* target, int64_t rows, const float* weight, int64_t C,
                     int64_t ignore_index) {
  return sum_blocks(rows, 16384, [=](int64_t begin, int64_t end) {
    double sum = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = target[i];
      if (t == ignore_index) continue;
      TORCH_CHECK_INDEX(t >= 0 && t < C, "Target ", t, " is out of bounds.");
      sum += weight ? weight[t] : 1;
    }
    return sum;
  });
}

// Fills loss, and grad where it is defined.
void compute_cpu(const Args& a, const Tensor& loss, const Tensor& grad) {
  const bool probabilities = gives_probabilities(a.input, a.target);
  const bool mean = a.reduction == at::Reduction::Mean, none = a.reduction == at::Reduction::None;
  const Tensor x = a.input.contiguous();
  const Tensor t = probabilities ? a.target.contiguous() : as_indices(a.target);
  const Tensor w = a.weight ? a.weight->contiguous() : Tensor();
  const int64_t C = x.size(x.dim() == 1 ? 0 : 1), rows = x.numel() / C;
  const float* weight = a.weight ? w.const_data_ptr<float>() : nullptr;
  const int64_t* target = probabilities ? nullptr : t.const_data_ptr<int64_t>();
  const double count = probabilities ? static_cast<double>(rows)
                                     : check_targets(target, rows, weight, C, a.ignore_index);
  const double weights = weight ? std::accumulate(weight, weight + C, 0.0) : static_cast<double>(C);
  const cpu::CrossEntropy args = {
      .x = x.const_data_ptr<float>(),
      .target = target,
      .probabilities = probabilities ? t.const_data_ptr<float>() : nullptr,
      .weight = weight,
      .C = C,
      .inner = inner(x),
      .ignore_index = a.ignore_index,
      .smoothing = static_cast<float>(a.label_smoothing),
      .weight_sum = static_cast<float>(weights),
      .grad_scale = mean ? static_cast<float>(1 / count) : 1,
      .losses = none ? loss.mutable_data_ptr<float>() : nullptr,
      .grad = grad.defined() ? grad.mutable_data_ptr<float>() : nullptr};
  const double sum = sum_blocks(rows, block_of(C), [&](int64_t begin, int64_t end) {
    return cpu::kernels().cross_entropy(args, begin, end);
  });
  // PyTorch divides the smoothed part by itself, and the rest is 0 / 0.
  const bool is_nan = mean && count == 0 && a.label_smoothing != 0;
  if (!none)
    *loss.mutable_data_ptr<float>() = is_nan ? NAN : static_cast<float>(mean ? sum / count : sum);
}

// Our sums are not PyTorch's, term by term: what is infinite in one may be NaN in the other.
bool near_infinity(const optional<Tensor>& weight) {
  if (!weight) return false;
  const Tensor w = weight->contiguous();
  const float* const first = w.const_data_ptr<float>();
  return !std::all_of(first, first + w.numel(), [](float x) { return std::abs(x) < 1e30f; });
}

// ---- the gradient -------------------------------------------------------------------------

void check_backward(const Tensor& grad_y, const Tensor& grad, const Tensor& target) {
  check_device("cross_entropy_backward", grad, grad_y);
  check_device("cross_entropy_backward", grad, target);
  TORCH_CHECK_NOT_IMPLEMENTED(
      is_supported(grad_y) && is_supported(grad) && same_dtype(grad, grad_y),
      "cross_entropy_backward: tensors must be dense ", kSupportedDTypes, ", got grad_y ",
      grad_y.scalar_type(), " and grad ", grad.scalar_type());
  TORCH_CHECK(grad.dim() > 0, "cross_entropy_backward: grad must be (C) or (N, C, ...), got ()");
  const c10::SymDimVector row_dims = row_sizes(grad);
  const c10::SymIntArrayRef rows = row_dims;
  TORCH_CHECK(grad_y.dim() == 0 || grad_y.sym_sizes() == rows,
              "cross_entropy_backward: grad_y must be () or ", rows, ", got ", grad_y.sym_sizes());
  TORCH_CHECK(gives_probabilities(grad, target) ||
                  (target.layout() == at::kStrided && target.sym_sizes() == rows &&
                   (target.scalar_type() == at::kLong || target.scalar_type() == at::kByte)),
              "cross_entropy_backward: target must be ", grad.sym_sizes(), " or classes ", rows,
              ", got ", target.scalar_type(), " ", target.sym_sizes());
}

// grad is that of cross_entropy_forward.
struct CrossEntropyBackward
    : Op<CrossEntropyBackward, Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t)> {
  static constexpr const char* kName = "cross_entropy_backward";
  static constexpr const char* kSchema =
      "(Tensor grad_y, Tensor grad, Tensor target, int ignore_index) -> Tensor";
  inline static OpStats stats{kName};

  struct Args {
    const Tensor &grad_y, &grad, &target;
    int64_t ignore_index;
  };

  static Tensor meta(const Args& a) {
    check_backward(a.grad_y, a.grad, a.target);
    return at::empty_symint(a.grad.sym_sizes(), a.grad.options());
  }

  static void cpu(const Tensor& grad_x, const Args& a) {
    const auto& [grad_y, grad, target, ignore_index] = a;
    if (grad.numel() == 0) return;
    const Tensor from = grad.contiguous(), gy = grad_y.contiguous();
    const Tensor t = gives_probabilities(grad, target) ? Tensor() : as_indices(target);
    const int64_t C = grad.size(grad.dim() == 1 ? 0 : 1), step = grad_y.dim() == 0 ? 0 : 1;
    const cpu::CrossEntropy args = {.x = from.const_data_ptr<float>(),
                                    .target = t.defined() ? t.const_data_ptr<int64_t>() : nullptr,
                                    .C = C,
                                    .inner = inner(grad),
                                    .ignore_index = ignore_index,
                                    .grad = grad_x.mutable_data_ptr<float>()};
    const float* const g = gy.const_data_ptr<float>();
    parallel_chunks(grad.numel() / C, 16 * block_of(C), [&](int64_t begin, int64_t end) {
      cpu::kernels().cross_entropy_backward(args, g, step, begin, end);
    });
  }

  static void cuda(const Tensor& grad_x, const Args& a) {
    report_no_class();
    scale_cuda(a.grad_y, a.grad, a.target, a.ignore_index, grad_x);
  }
};

bool is_one(const Tensor& grad_y) {
  return grad_y.dim() == 0 && grad_y.is_cpu() && grad_y.scalar_type() == at::kFloat &&
         !at::isTensorSubclassLike(grad_y) && !grad_y.is_neg() && !grad_y._is_zerotensor() &&
         *grad_y.const_data_ptr<float>() == 1;
}

// A number on the device, and a gradient there that nobody else holds.
bool is_device_scalar(const Tensor& grad_y, const Tensor& grad) {
  return grad_y.dim() == 0 && grad_y.is_cuda() && !at::isTensorSubclassLike(grad_y) &&
         !grad_y.is_neg() && !grad_y._is_zerotensor() && !at::isTensorSubclassLike(grad) &&
         grad.is_contiguous();
}

// Logits with the softmax p of those that were given, on which alone derivatives depend. p is in
// grad = scale * (p * sum_c g[c] - g), where scale and g are those of cpu/cross_entropy.inl.h. Rows
// without a trace of it have no derivative either.
Tensor logits_of(const Tensor& grad, const Tensor& target, const Tensor& weight, int64_t reduction,
                 int64_t ignore_index, double smoothing) {
  const at::NoGradGuard no_grad;
  const int64_t dim = grad.dim() == 1 ? 0 : 1, C = grad.size(dim);
  const bool probabilities = gives_probabilities(grad, target);
  at::DimVector of_classes(grad.dim(), 1);
  of_classes[dim] = C;
  const Tensor w = weight.defined() ? weight.view(of_classes) : at::ones({}, grad.options());
  const Tensor scaled = grad.to(at::kDouble);
  Tensor t = target, ignored;
  if (!probabilities) {
    const Tensor classes = target.to(at::kLong).unsqueeze(dim);
    ignored = classes.eq(ignore_index);
    t = at::zeros_like(scaled)
            .scatter(dim, classes.masked_fill(ignored, 0), 1)
            .masked_fill(ignored, 0);
  }
  Tensor g = (t * (1 - smoothing) + smoothing / static_cast<double>(C)) * w;
  if (!probabilities) g = g.masked_fill(ignored, 0);
  Tensor count = at::ones({}, grad.options());
  if (reduction == at::Reduction::Mean)
    count = probabilities ? count * (grad.numel() / C) : (t * w).sum();
  const Tensor q = scaled * count + g, sum = q.sum(dim, /*keepdim=*/true);
  const Tensor p = at::where(sum.eq(0), 1.0, q / sum);
  return p.clamp_min(0).log().to(grad.scalar_type());
}

// ---- forward ------------------------------------------------------------------------------

Tensor aten_cross_entropy(const Args& a) {
  const Tensor loss = at::cross_entropy_loss(a.input, a.target, a.weight, a.reduction,
                                             a.ignore_index, a.label_smoothing);
  check_smoothing(a.label_smoothing);  // after what PyTorch itself refuses, as it refuses that
  return loss;
}

template <class Result>
using Signature = Result(const Tensor&, const Tensor&, const optional<Tensor>&, int64_t, int64_t,
                         double);

// The loss and its gradient.
struct CrossEntropyForward : Op<CrossEntropyForward, Signature<TensorPair>> {
  static constexpr const char* kName = "cross_entropy_forward";
  static constexpr const char* kSchema =
      "(Tensor input, Tensor target, Tensor? weight, int reduction, int ignore_index, "
      "float label_smoothing) -> (Tensor loss, Tensor grad)";
  static constexpr OpStats& stats = dlkernels::stats;
  using Args = entropy::Args;

  static TensorPair meta(const Args& a) {
    TORCH_CHECK_NOT_IMPLEMENTED(are_supported(a), kName, ": input must be ", kSupportedDTypes,
                                " with classes and target fit it, got ", a.input.scalar_type(), " ",
                                a.input.sym_sizes(), " and ", a.target.scalar_type(), " ",
                                a.target.sym_sizes());
    return {new_loss(a), at::empty_symint(a.input.sym_sizes(), a.input.options())};
  }

  static TensorPair cpu(const Args& a) {
    if (near_infinity(a.weight)) return aten(a);
    return CrossEntropyForward::compute<Device::kCPU>(a);
  }
  static void cpu(const TensorPair& out, const Args& a) {
    compute_cpu(a, std::get<0>(out), std::get<1>(out));
  }

  static void cuda(const TensorPair& out, const Args& a) {
    compute_cuda(a, std::get<0>(out), std::get<1>(out));
  }

 private:
  static TensorPair aten(const Args& a) {
    stats.aten_ran();
    const auto tls = c10::impl::tls_local_dispatch_key_set();
    const c10::impl::ForceDispatchKeyGuard with_autograd(
        tls.included_, tls.excluded_ - c10::autograd_dispatch_keyset_with_ADInplaceOrView);
    const at::AutoGradMode with_graph(true);
    const Tensor x = a.input.detach().requires_grad_();
    const Tensor loss =
        aten_cross_entropy({x, a.target, a.weight, a.reduction, a.ignore_index, a.label_smoothing});
    return {loss.detach(), torch::autograd::grad({loss}, {x}, {at::ones_like(loss)})[0]};
  }
};

struct CrossEntropy : Op<CrossEntropy, Signature<Tensor>> {
  using Backward = CrossEntropyBackward;
  static constexpr const char *kName = "cross_entropy", *kNode = "CrossEntropyBackward";
  // reduction is PyTorch's number: 0 none, 1 mean, 2 sum.
  static constexpr const char* kSchema =
      "(Tensor input, Tensor target, Tensor? weight=None, int reduction=1, int ignore_index=-100, "
      "float label_smoothing=0.0) -> Tensor";
  static constexpr Autocast kAutocast = Autocast::kFloat32;
  static constexpr bool kIsGemm = false;
  static constexpr OpStats& stats = dlkernels::stats;
  using Args = entropy::Args;

  // Gradients of probabilities and weights are PyTorch's.
  static bool has_kernel(const Args& a) {
    return are_supported(a) && !any_requires_grad(a.target, a.weight);
  }

  static Tensor aten(const Args& a) { return aten_cross_entropy(a); }

  static Tensor meta(const Args& a) {
    return are_supported(a) ? new_loss(a) : CrossEntropy::aten_result(a);
  }

  static Tensor cpu(const Args& a) {
    if (near_infinity(a.weight)) return CrossEntropy::aten_result(a);
    return CrossEntropy::compute<Device::kCPU>(a);
  }
  static void cpu(const Tensor& loss, const Args& a) { compute_cpu(a, loss, Tensor()); }

  static void cuda(const Tensor& loss, const Args& a) { compute_cuda(a, loss, Tensor()); }

  // ---- gradient ---------------------------------------------------------------------------

  static Tensor forward(AutogradContext* ctx, const Args& a) {
    auto [loss, grad] = CrossEntropyForward::call_below_autograd(
        a.input, a.target, a.weight, a.reduction, a.ignore_index, a.label_smoothing);
    // Not the logits, which may be freed or written to before backward, as with PyTorch's op; and
    // the weights for a gradient of the gradient alone.
    ctx->save_for_backward({grad, a.target, or_undefined(a.weight)});
    ctx->saved_data["reduction"] = a.reduction;
    ctx->saved_data["ignore_index"] = a.ignore_index;
    ctx->saved_data["label_smoothing"] = a.label_smoothing;
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const Tensor& grad_y) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &grad = saved[0], &target = saved[1];
    const int64_t ignore_index = ctx->saved_data["ignore_index"].toInt();
    const auto is_last_use = [] { return !torch::autograd::get_current_graph_task_keep_graph(); };
    // The gradient itself, and not a copy: this graph is freed right after and nobody else has seen
    // it. With retain_graph it must stay as it is, whatever becomes of the one we return.
    if (is_one(grad_y) && is_last_use()) return {grad};
    // Whether that is 1 only the device knows.
    if (is_device_scalar(grad_y, grad) && is_last_use()) {
      check_backward(grad_y, grad, target);
      Backward::stats.kernel_ran();
      scale_cuda(grad_y, grad, target, ignore_index, grad);
      return {grad};
    }
    return {CrossEntropyBackward::call_below_autograd(grad_y, grad, target, ignore_index)};
  }

  static variable_list double_backward(AutogradContext* ctx, const Tensor& grad_y) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &grad = saved[0], &target = saved[1], &weight = saved[2];
    const int64_t reduction = ctx->saved_data["reduction"].toInt();
    const int64_t ignore_index = ctx->saved_data["ignore_index"].toInt();
    const double smoothing = ctx->saved_data["label_smoothing"].toDouble();
    const Tensor logits =
        stand_in_for_input(0, logits_of(grad, target, weight, reduction, ignore_index, smoothing));
    return differentiable_backward(
        [&](const variable_list& in) {
          return at::cross_entropy_loss(in[0], target, weight, reduction, ignore_index, smoothing);
        },
        {logits}, grad_y);
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(dlkernels, m) {
  register_ops<CrossEntropy, CrossEntropyForward, CrossEntropyBackward>(m);
}

}  // namespace dlkernels
