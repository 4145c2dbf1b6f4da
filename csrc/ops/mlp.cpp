// mlp: linear layers with a ReLU between every two, as one op and one node of the graph.
#include "ops/torch_headers.h"

#include <ATen/ops/linear.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/zeros.h>

#include "gradient.h"
#include "linear.h"

namespace dlkernels {

TORCH_LIBRARY_FRAGMENT(dlkernels, m) {
  // As many biases as weights, or none.
  m.def("mlp(Tensor input, Tensor[] weights, Tensor[] biases) -> Tensor");
  // The outputs of all layers: those of the hidden ones after their ReLU, then y.
  m.def("mlp_forward(Tensor input, Tensor[] weights, Tensor[] biases) -> Tensor[]");
  // Gradients of input (if asked for; otherwise the first weight is not needed, and left out of
  // weights), of all weights, and of all biases (if there are).
  m.def(
      "mlp_backward(Tensor grad_y, Tensor input, Tensor[] weights, Tensor[] hidden, "
      "bool grad_input, bool grad_biases) -> Tensor[]");
}

namespace {

OpStats mlp_stats("mlp"), mlp_backward_stats("mlp_backward");

using MLP = Tensor(const Tensor& input, at::TensorList weights, at::TensorList biases);
using MLPForward = std::vector<Tensor>(const Tensor& input, at::TensorList weights,
                                       at::TensorList biases);
using MLPBackward = std::vector<Tensor>(const Tensor& grad_y, const Tensor& input,
                                        at::TensorList weights, at::TensorList hidden,
                                        bool grad_input, bool grad_biases);

void check_count(at::TensorList weights, at::TensorList biases) {
  TORCH_CHECK(!weights.empty(), "mlp: weights must be at least one matrix, got none");
  TORCH_CHECK(biases.empty() || biases.size() == weights.size(), "mlp: biases must be none or ",
              weights.size(), ", one a weight, got ", biases.size());
}

// PyTorch's own, for what is not ours.
Tensor mlp_torch(const Tensor& input, at::TensorList weights, at::TensorList biases) {
  check_count(weights, biases);
  mlp_stats.torch_ran();
  Tensor y = input;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (i > 0) y = at::relu(y);
    y = at::linear(y, weights[i], biases.empty() ? optional<Tensor>() : biases[i]);
  }
  return y;
}

bool ours(const Tensor& input, at::TensorList weights, at::TensorList biases) {
  check_count(weights, biases);
  bool ok = are_for_products(input) && input.dim() >= 1;
  const auto one = [&](const Tensor& t, int64_t dim) {
    check_device("mlp", input, t);
    ok &= are_for_products(input, t) && t.dim() == dim;
  };
  for (const Tensor& w : weights) one(w, 2);
  for (const Tensor& b : biases) one(b, 1);
  for (size_t i = 0; ok && i < biases.size(); ++i)  // one that broadcasts is PyTorch's
    ok = biases[i].sym_size(0) != 1 || weights[i].sym_size(0) == 1;
  return ok;
}

// ---- shapes: shared by every device and by torch.compile, hence SymInt --------------------

// input (..., K0), weights (K1, K0), (K2, K1), ..., biases (K1), (K2), ... -> (..., K1), (..., K2)
// ...
std::vector<Tensor> mlp_forward_meta(const Tensor& input, at::TensorList weights,
                                     at::TensorList biases) {
  check_count(weights, biases);
  TORCH_CHECK(input.dim() >= 1, "mlp: input must be (..., K), got ()");
  c10::SymDimVector sizes(input.sym_sizes().begin(), input.sym_sizes().end());
  std::vector<Tensor> outputs;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& w = weights[i];
    check_device("mlp", input, w);
    if (!biases.empty()) check_device("mlp", input, biases[i]);
    TORCH_CHECK(w.dim() == 2 && w.sym_size(1) == sizes.back(), "mlp: weights[", i, "] must be (N, ",
                sizes.back(), "), got ", w.sym_sizes());
    sizes.back() = w.sym_size(0);
    TORCH_CHECK(biases.empty() || (biases[i].dim() == 1 && biases[i].sym_size(0) == sizes.back()),
                "mlp: biases[", i, "] must be (", sizes.back(), "), got ", biases[i].sym_sizes());
    outputs.push_back(at::empty_symint(sizes, input.options()));
  }
  return outputs;
}

Tensor mlp_meta(const Tensor& input, at::TensorList weights, at::TensorList biases) {
  return mlp_forward_meta(input, weights, biases).back();
}

std::vector<Tensor> mlp_backward_meta(const Tensor& grad_y, const Tensor& input,
                                      at::TensorList weights, at::TensorList hidden,
                                      bool grad_input, bool grad_biases) {
  const size_t layers = hidden.size() + 1, left_out = grad_input ? 0 : 1;
  TORCH_CHECK(input.dim() >= 1 && grad_y.dim() >= 1 && weights.size() + left_out == layers,
              "mlp_backward: input must be (..., K), grad_y (..., N), and weights ",
              layers - left_out, " matrices for ", hidden.size(), " hidden tensors, got ",
              input.sym_sizes(), ", ", grad_y.sym_sizes(), " and ", weights.size());
  c10::SymDimVector sizes(input.sym_sizes().begin(), input.sym_sizes().end());
  std::vector<Tensor> grads, grads_of_biases;
  if (grad_input) grads.push_back(at::empty_symint(sizes, input.options()));
  for (size_t i = 0; i < layers; ++i) {
    const Tensor& y = i < hidden.size() ? hidden[i] : grad_y;
    const optional<Tensor> w = i >= left_out ? optional(weights[i - left_out]) : std::nullopt;
    TORCH_CHECK_NOT_IMPLEMENTED(are_for_products(input, w, y),
                                "mlp_backward: tensors must be dense ", kProductDTypes);
    check_device("mlp_backward", input, w), check_device("mlp_backward", input, y);
    TORCH_CHECK(y.dim() >= 1, "mlp_backward: hidden tensors must be (..., N), got ()");
    const c10::SymInt K = sizes.back(), N = y.sym_size(-1);
    TORCH_CHECK(!w || (w->dim() == 2 && w->sym_size(0) == N && w->sym_size(1) == K),
                "mlp_backward: layer ", i, "'s weight must be (", N, ", ", K, "), got ",
                w->sym_sizes());
    sizes.back() = N;
    TORCH_CHECK(y.sym_sizes() == c10::SymIntArrayRef(sizes), "mlp_backward: layer ", i,
                "'s output must be ", c10::SymIntArrayRef(sizes), ", got ", y.sym_sizes());
    grads.push_back(at::empty_symint({N, K}, input.options()));
    if (grad_biases) grads_of_biases.push_back(at::empty_symint({N}, input.options()));
  }
  grads.insert(grads.end(), grads_of_biases.begin(), grads_of_biases.end());
  return grads;
}

// ---- cpu ----------------------------------------------------------------------------------

template <class Layer>
std::vector<Tensor> forward_by(const Layer& layer, const Tensor& input, at::TensorList weights,
                               at::TensorList biases) {
  std::vector<Tensor> outputs = mlp_forward_meta(input, weights, biases);
  TORCH_CHECK_NOT_IMPLEMENTED(ours(input, weights, biases), "mlp_forward: tensors must be dense ",
                              kProductDTypes);
  mlp_stats.kernel_ran();
  for (size_t i = 0; i < weights.size(); ++i)
    layer(outputs[i], i > 0 ? outputs[i - 1] : input, weights[i],
          biases.empty() ? Tensor() : biases[i], /*relu=*/i + 1 < weights.size());
  return outputs;
}

std::vector<Tensor> mlp_forward_cpu(const Tensor& input, at::TensorList weights,
                                    at::TensorList biases) {
  return forward_by(linear_into, input, weights, biases);
}

template <MLPForward* kForward>
Tensor mlp_ours(const Tensor& input, at::TensorList weights, at::TensorList biases) {
  if (!ours(input, weights, biases)) return mlp_torch(input, weights, biases);
  return kForward(input, weights, biases).back();
}

// layer(grads, grad_y, x, weight, i) is layer i's backward.
template <class Layer>
std::vector<Tensor> backward_by(const Layer& layer, const Tensor& grad_y, const Tensor& input,
                                at::TensorList weights, at::TensorList hidden, bool grad_input,
                                bool grad_biases) {
  std::vector<Tensor> grads =
      mlp_backward_meta(grad_y, input, weights, hidden, grad_input, grad_biases);
  mlp_backward_stats.kernel_ran();
  const size_t layers = hidden.size() + 1, left_out = grad_input ? 0 : 1;
  const Tensor* const grad_weight = grads.data() + 1 - left_out;
  Tensor g = grad_y;
  for (size_t i = layers; i-- > 0;) {
    const Tensor& x = i > 0 ? hidden[i - 1] : input;
    const Tensor grad_x = i > 0        ? at::empty(x.sizes(), x.options())
                          : grad_input ? grads[0]
                                       : Tensor();
    layer({grad_x, grad_weight[i], grad_biases ? grad_weight[layers + i] : Tensor()}, g, x,
          i >= left_out ? weights[i - left_out] : Tensor(), i);
    g = grad_x;
  }
  return grads;
}

std::vector<Tensor> mlp_backward_cpu(const Tensor& grad_y, const Tensor& input,
                                     at::TensorList weights, at::TensorList hidden, bool grad_input,
                                     bool grad_biases) {
  const auto layer = [&](const Grads& grads, const Tensor& g, const Tensor& x, const Tensor& weight,
                         size_t i) {
    linear_backward_into(grads, g, x, weight, i < hidden.size() ? hidden[i] : Tensor());
  };
  return backward_by(layer, grad_y, input, weights, hidden, grad_input, grad_biases);
}

// ---- cuda ---------------------------------------------------------------------------------

std::vector<Tensor> mlp_forward_cuda(const Tensor& input, at::TensorList weights,
                                     at::TensorList biases) {
  const auto layer = [](const Tensor& y, const Tensor& x, const Tensor& weight, const Tensor& bias,
                        bool relu) { linear_into_cuda("mlp", y, x, weight, bias, relu); };
  return forward_by(layer, input, weights, biases);
}

// The product that makes a hidden layer's gradient applies its ReLU's mask, too.
std::vector<Tensor> mlp_backward_cuda(const Tensor& grad_y, const Tensor& input,
                                      at::TensorList weights, at::TensorList hidden,
                                      bool grad_input, bool grad_biases) {
  const auto layer = [&](const Grads& grads, const Tensor& g, const Tensor& x, const Tensor& weight,
                         size_t i) {
    linear_backward_into_cuda("mlp_backward", grads, g, x, weight,
                              i > 0 ? hidden[i - 1] : Tensor());
  };
  return backward_by(layer, grad_y, input, weights, hidden, grad_input, grad_biases);
}

// ---- gradient -----------------------------------------------------------------------------

struct MLPFunction : Function<MLPFunction> {
  static constexpr const char* kNode = "MLPBackward";

  static Tensor forward(AutogradContext* ctx, const Tensor& input, at::TensorList weights,
                        at::TensorList biases) {
    static const BelowAutograd<MLPForward> op("dlkernels::mlp_forward");
    std::vector<Tensor> outputs = op(input, weights, biases);
    // As PyTorch, no more than is needed: the rest may be freed or written to before backward.
    variable_list saved = {input};
    saved.insert(saved.end(), weights.begin() + (input.requires_grad() ? 0 : 1), weights.end());
    saved.insert(saved.end(), outputs.begin(), outputs.end() - 1);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["layers"] = static_cast<int64_t>(weights.size());
    ctx->saved_data["biases"] = !biases.empty();
    return outputs.back();
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const BelowAutograd<MLPBackward> op("dlkernels::mlp_backward");
    const variable_list saved = ctx->get_saved_variables();
    const size_t layers = ctx->saved_data["layers"].toInt();
    const bool biases = ctx->saved_data["biases"].toBool();
    const at::TensorList all = saved, hidden = all.slice(all.size() - (layers - 1));
    const at::TensorList weights = all.slice(1, all.size() - layers);
    // vmap (is_grads_batched=True) can't take an op that returns a list apart.
    constexpr c10::DispatchKeySet kBatched(
        {c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchBatched});
    const bool is_batched = grads[0].key_set().has_any(kBatched);
    if (is_batched) mlp_backward_stats.torch_ran();
    if (is_batched || is_differentiated(grads[0], mlp_backward_stats))
      return differentiable(grads[0], all[0], weights, hidden, biases);
    const bool grad_input = ctx->needs_input_grad(0);
    const size_t wanted = grad_input ? layers : layers - 1;
    variable_list out =
        op(grads[0], all[0], weights.slice(weights.size() - wanted), hidden, grad_input, biases);
    if (!grad_input) out.insert(out.begin(), Tensor());
    return out;
  }

  // Biases, and a first weight that was left out, are no factors of any derivative.
  static variable_list differentiable(const Tensor& grad_y, const Tensor& input,
                                      at::TensorList weights, at::TensorList hidden, bool biases) {
    const size_t layers = hidden.size() + 1, left_out = layers - weights.size();
    variable_list inputs = {input};
    const auto stand_in = [&](c10::SymIntArrayRef sizes) {
      inputs.push_back(in_place_of_input(inputs.size(), at::zeros_symint(sizes, input.options())));
    };
    const auto N = [&](size_t i) {
      return i < hidden.size() ? hidden[i].sym_size(-1) : grad_y.sym_size(-1);
    };
    if (left_out) stand_in({N(0), input.sym_size(-1)});
    inputs.insert(inputs.end(), weights.begin(), weights.end());
    for (size_t i = 0; biases && i < layers; ++i) stand_in({N(i)});
    const auto forward = [&](const variable_list& in) {
      Tensor y = in[0];
      for (size_t i = 0; i < layers; ++i) {
        const Tensor z =
            at::linear(y, in[1 + i], biases ? optional(in[1 + layers + i]) : std::nullopt);
        // The values that were, with the derivatives of z.
        y = i + 1 < layers ? hidden[i] + (z - z.detach()).masked_fill(hidden[i].le(0), 0) : z;
      }
      return y;
    };
    return differentiable_backward(forward, inputs, grad_y);
  }
};

// One node where all parameters want a gradient, one a layer where some are frozen.
Tensor mlp_autograd(const Tensor& input, at::TensorList weights, at::TensorList biases) {
  if (!ours(input, weights, biases)) return mlp_torch(input, weights, biases);
  const auto wanted = [](const Tensor& t) { return t.requires_grad(); };
  if (!at::GradMode::is_enabled()) {
    static const BelowAutograd<MLP> op("dlkernels::mlp");
    return op(input, weights, biases);
  }
  if (std::all_of(weights.begin(), weights.end(), wanted) &&
      std::all_of(biases.begin(), biases.end(), wanted))
    return MLPFunction::apply(input, weights, biases);
  using Linear = Tensor(const Tensor&, const Tensor&, const optional<Tensor>&);
  static const auto linear = find_op<Linear>("dlkernels::linear");
  static const auto linear_relu = find_op<Linear>("dlkernels::linear_relu");
  Tensor y = input;
  for (size_t i = 0; i < weights.size(); ++i)
    y = (i + 1 < weights.size() ? linear_relu : linear)
            .call(y, weights[i], biases.empty() ? optional<Tensor>() : biases[i]);
  return y;
}

const bool torch_paths = (register_torch_path("mlp", mlp_torch, /*on_autocast_cpu=*/false), true);

}  // namespace

TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("mlp", mlp_ours<mlp_forward_cpu>);
  m.impl("mlp_forward", mlp_forward_cpu);
  m.impl("mlp_backward", mlp_backward_cpu);
}
TORCH_LIBRARY_IMPL(dlkernels, CUDA, m) {
  m.impl("mlp", mlp_ours<mlp_forward_cuda>);
  m.impl("mlp_forward", mlp_forward_cuda);
  m.impl("mlp_backward", mlp_backward_cuda);
}
TORCH_LIBRARY_IMPL(dlkernels, AutocastCPU, m) { register_autocast_cpu(m, "mlp"); }
TORCH_LIBRARY_IMPL(dlkernels, AutocastCUDA, m) { register_autocast_cuda<true>(m, "mlp"); }
TORCH_LIBRARY_IMPL(dlkernels, Meta, m) {
  m.impl("mlp", mlp_meta);
  m.impl("mlp_forward", mlp_forward_meta);
  m.impl("mlp_backward", mlp_backward_meta);
}
TORCH_LIBRARY_IMPL(dlkernels, Autograd, m) { m.impl("mlp", mlp_autograd); }

}  // namespace dlkernels
