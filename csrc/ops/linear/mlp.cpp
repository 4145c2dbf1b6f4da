// mlp: linear layers with a ReLU between every two, as one op and one node of the graph:
// y = linear(relu(... relu(linear(input, weights[0], biases[0])) ...), weights[-1], biases[-1]).
#include "ops/core/torch_headers.h"

#include <ATen/ops/linear.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/zeros.h>

#include "ops/core/op.h"
#include "ops/linear/linear.h"

namespace dlkernels {
namespace {

using at::TensorList;

// As many biases as weights, or none.
struct MLPArgs {
  const Tensor& input;
  TensorList weights, biases;

  optional<Tensor> bias(size_t i) const {
    return biases.empty() ? std::nullopt : optional(biases[i]);
  }
  void check_count() const {
    TORCH_CHECK(!weights.empty(), "mlp: weights must be at least one matrix, got none");
    TORCH_CHECK(biases.empty() || biases.size() == weights.size(), "mlp: biases must be none or ",
                weights.size(), ", one a weight, got ", biases.size());
  }
};

// ---- the gradient -------------------------------------------------------------------------

// The gradients of input (if asked for; otherwise the first weight is not needed, and left out of
// weights), of all weights, and of all biases (if asked for).
struct MLPBackward : Op<MLPBackward, std::vector<Tensor>(const Tensor&, const Tensor&, TensorList,
                                                         TensorList, bool, bool)> {
  static constexpr const char* kName = "mlp_backward";
  static constexpr const char* kSchema =
      "(Tensor grad_y, Tensor input, Tensor[] weights, Tensor[] hidden, bool grad_input, "
      "bool grad_biases) -> Tensor[]";
  inline static OpStats stats{kName};

  struct Args {
    const Tensor &grad_y, &input;
    TensorList weights, hidden;
    bool grad_input, grad_biases;

    size_t layers() const { return hidden.size() + 1; }
    size_t left_out() const { return grad_input ? 0 : 1; }
  };

  static std::vector<Tensor> meta(const Args& a) {
    const auto& [grad_y, input, weights, hidden, grad_input, grad_biases] = a;
    const size_t layers = a.layers(), left_out = a.left_out();
    TORCH_CHECK(input.dim() >= 1 && grad_y.dim() >= 1 && weights.size() + left_out == layers, kName,
                ": input must be (..., K), grad_y (..., N), and weights ", layers - left_out,
                " matrices for ", hidden.size(), " hidden tensors, got ", input.sym_sizes(), ", ",
                grad_y.sym_sizes(), " and ", weights.size());
    c10::SymDimVector sizes(input.sym_sizes().begin(), input.sym_sizes().end());
    std::vector<Tensor> grads, grads_of_biases;
    if (grad_input) grads.push_back(at::empty_symint(sizes, input.options()));
    for (size_t i = 0; i < layers; ++i) {
      const Tensor& y = i < hidden.size() ? hidden[i] : grad_y;
      const optional<Tensor> w = i >= left_out ? optional(weights[i - left_out]) : std::nullopt;
      TORCH_CHECK_NOT_IMPLEMENTED(has_gemm_kernel(input, w, y), kName, ": tensors must be dense ",
                                  kGemmDTypes);
      check_device(kName, input, w), check_device(kName, input, y);
      TORCH_CHECK(y.dim() >= 1, kName, ": hidden tensors must be (..., N), got ()");
      const c10::SymInt K = sizes.back(), N = y.sym_size(-1);
      TORCH_CHECK(!w || (w->dim() == 2 && w->sym_size(0) == N && w->sym_size(1) == K), kName,
                  ": layer ", i, "'s weight must be (", N, ", ", K, "), got ", w->sym_sizes());
      sizes.back() = N;
      TORCH_CHECK(y.sym_sizes() == c10::SymIntArrayRef(sizes), kName, ": layer ", i,
                  "'s output must be ", c10::SymIntArrayRef(sizes), ", got ", y.sym_sizes());
      grads.push_back(at::empty_symint({N, K}, input.options()));
      if (grad_biases) grads_of_biases.push_back(at::empty_symint({N}, input.options()));
    }
    grads.insert(grads.end(), grads_of_biases.begin(), grads_of_biases.end());
    return grads;
  }

  static void cpu(const std::vector<Tensor>& grads, const Args& a) {
    each_layer(
        grads, a,
        [&](const Grads& out, const Tensor& g, const Tensor& x, const Tensor& weight, size_t i) {
          linear_backward_into(out, g, x, weight, i < a.hidden.size() ? a.hidden[i] : Tensor());
        });
  }

  // The product that makes a hidden layer's gradient applies its ReLU's mask, too.
  static void cuda(const std::vector<Tensor>& grads, const Args& a) {
    each_layer(
        grads, a,
        [&](const Grads& out, const Tensor& g, const Tensor& x, const Tensor& weight, size_t i) {
          linear_backward_into_cuda(kName, out, g, x, weight, i > 0 ? a.hidden[i - 1] : Tensor());
        });
  }

 private:
  // layer(grads, grad_y, x, weight, i) is layer i's backward.
  template <class Layer>
  static void each_layer(const std::vector<Tensor>& grads, const Args& a, const Layer& layer) {
    const size_t layers = a.layers(), left_out = a.left_out();
    const Tensor* const grad_weight = grads.data() + 1 - left_out;
    Tensor g = a.grad_y;
    for (size_t i = layers; i-- > 0;) {
      const Tensor& x = i > 0 ? a.hidden[i - 1] : a.input;
      const Tensor grad_x = i > 0          ? at::empty(x.sizes(), x.options())
                            : a.grad_input ? grads[0]
                                           : Tensor();
      layer({grad_x, grad_weight[i], a.grad_biases ? grad_weight[layers + i] : Tensor()}, g, x,
            i >= left_out ? a.weights[i - left_out] : Tensor(), i);
      g = grad_x;
    }
  }
};

// ---- forward ------------------------------------------------------------------------------

OpStats stats("mlp");

// The outputs of all layers: those of the hidden ones after their ReLU, then y.
struct MLPForward : Op<MLPForward, std::vector<Tensor>(const Tensor&, TensorList, TensorList)> {
  static constexpr const char* kName = "mlp_forward";
  static constexpr const char* kSchema =
      "(Tensor input, Tensor[] weights, Tensor[] biases) -> Tensor[]";
  static constexpr OpStats& stats = dlkernels::stats;
  using Args = MLPArgs;

  static bool are_supported(const Args& a) {
    a.check_count();
    bool supported = has_gemm_kernel(a.input) && a.input.dim() >= 1;
    const auto check = [&](const Tensor& t, int64_t dim) {
      check_device("mlp", a.input, t);
      supported &= has_gemm_kernel(a.input, t) && t.dim() == dim;
    };
    for (const Tensor& w : a.weights) check(w, 2);
    for (const Tensor& b : a.biases) check(b, 1);
    for (size_t i = 0; supported && i < a.biases.size(); ++i)  // one that broadcasts is PyTorch's
      supported = a.biases[i].sym_size(0) != 1 || a.weights[i].sym_size(0) == 1;
    return supported;
  }

  // input (..., K0), weights (K1, K0), (K2, K1), ..., biases (K1), (K2), ... -> (..., K1),
  // (..., K2), ...
  static std::vector<Tensor> new_outputs(const Args& a) {
    const auto& [input, weights, biases] = a;
    a.check_count();
    TORCH_CHECK(input.dim() >= 1, "mlp: input must be (..., K), got ()");
    c10::SymDimVector sizes(input.sym_sizes().begin(), input.sym_sizes().end());
    std::vector<Tensor> outputs;
    for (size_t i = 0; i < weights.size(); ++i) {
      const Tensor& w = weights[i];
      check_device("mlp", input, w);
      if (!biases.empty()) check_device("mlp", input, biases[i]);
      TORCH_CHECK(w.dim() == 2 && w.sym_size(1) == sizes.back(), "mlp: weights[", i,
                  "] must be (N, ", sizes.back(), "), got ", w.sym_sizes());
      sizes.back() = w.sym_size(0);
      TORCH_CHECK(biases.empty() || (biases[i].dim() == 1 && biases[i].sym_size(0) == sizes.back()),
                  "mlp: biases[", i, "] must be (", sizes.back(), "), got ", biases[i].sym_sizes());
      outputs.push_back(at::empty_symint(sizes, input.options()));
    }
    return outputs;
  }

  static std::vector<Tensor> meta(const Args& a) {
    TORCH_CHECK_NOT_IMPLEMENTED(are_supported(a), kName, ": tensors must be dense ", kGemmDTypes);
    return new_outputs(a);
  }

  static void cpu(const std::vector<Tensor>& outputs, const Args& a) {
    each_layer(outputs, a, linear_into);
  }

  static void cuda(const std::vector<Tensor>& outputs, const Args& a) {
    each_layer(outputs, a,
               [](const Tensor& y, const Tensor& x, const Tensor& weight, const Tensor& bias,
                  bool relu) { linear_into_cuda("mlp", y, x, weight, bias, relu); });
  }

 private:
  template <class Layer>
  static void each_layer(const std::vector<Tensor>& outputs, const Args& a, const Layer& layer) {
    for (size_t i = 0; i < outputs.size(); ++i)
      layer(outputs[i], i > 0 ? outputs[i - 1] : a.input, a.weights[i], or_undefined(a.bias(i)),
            /*relu=*/i + 1 < outputs.size());
  }
};

struct MLP : Op<MLP, Tensor(const Tensor&, TensorList, TensorList)> {
  using Backward = MLPBackward;
  static constexpr const char *kName = "mlp", *kNode = "MLPBackward";
  static constexpr const char* kSchema =
      "(Tensor input, Tensor[] weights, Tensor[] biases) -> Tensor";
  static constexpr Autocast kAutocast = Autocast::kLower;
  static constexpr bool kIsGemm = true;
  static constexpr OpStats& stats = dlkernels::stats;
  using Args = MLPArgs;

  static bool has_kernel(const Args& a) { return MLPForward::are_supported(a); }

  static Tensor aten(const Args& a) {
    a.check_count();
    Tensor y = a.input;
    for (size_t i = 0; i < a.weights.size(); ++i)
      y = at::linear(i > 0 ? at::relu(y) : y, a.weights[i], a.bias(i));
    return y;
  }

  static Tensor meta(const Args& a) { return MLPForward::new_outputs(a).back(); }
  static Tensor cpu(const Args& a) { return MLPForward::compute<Device::kCPU>(a).back(); }
  static Tensor cuda(const Args& a) { return MLPForward::compute<Device::kCUDA>(a).back(); }

  // ---- gradient ---------------------------------------------------------------------------

  // One node where all parameters want a gradient, one a layer where some are frozen.
  static Tensor record(const Args& a) {
    const auto wanted = [](const Tensor& t) { return t.requires_grad(); };
    if (std::all_of(a.weights.begin(), a.weights.end(), wanted) &&
        std::all_of(a.biases.begin(), a.biases.end(), wanted))
      return Gradient<MLP>::apply(a, a.input, a.weights, a.biases);
    using Linear = Tensor(const Tensor&, const Tensor&, const optional<Tensor>&);
    static const auto linear = find_op<Linear>("linear"),
                      linear_relu = find_op<Linear>("linear_relu");
    Tensor y = a.input;
    for (size_t i = 0; i < a.weights.size(); ++i)
      y = (i + 1 < a.weights.size() ? linear_relu : linear).call(y, a.weights[i], a.bias(i));
    return y;
  }

  static Tensor forward(AutogradContext* ctx, const Args& a) {
    std::vector<Tensor> outputs = MLPForward::call_below_autograd(a.input, a.weights, a.biases);
    // As PyTorch, no more than is needed: the rest may be freed or written to before backward.
    variable_list saved = {a.input};
    saved.insert(saved.end(), a.weights.begin() + (a.input.requires_grad() ? 0 : 1),
                 a.weights.end());
    saved.insert(saved.end(), outputs.begin(), outputs.end() - 1);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["layers"] = static_cast<int64_t>(a.weights.size());
    ctx->saved_data["biases"] = !a.biases.empty();
    return outputs.back();
  }

  static variable_list backward(AutogradContext* ctx, const Tensor& grad_y) {
    const Saved saved(ctx);
    // vmap (is_grads_batched=True) can't take an op that returns a list apart.
    constexpr c10::DispatchKeySet kBatched(
        {c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchBatched});
    if (grad_y.key_set().has_any(kBatched)) {
      MLPBackward::stats.aten_ran();
      return differentiable(saved, grad_y);
    }
    const bool grad_input = ctx->needs_input_grad(0);
    const TensorList weights = saved.weights;
    const size_t wanted = grad_input ? saved.layers : saved.layers - 1;
    variable_list out = MLPBackward::call_below_autograd(grad_y, saved.input,
                                                         weights.slice(weights.size() - wanted),
                                                         saved.hidden, grad_input, saved.biases);
    if (!grad_input) out.insert(out.begin(), Tensor());
    return out;
  }

  static variable_list double_backward(AutogradContext* ctx, const Tensor& grad_y) {
    return differentiable(Saved(ctx), grad_y);
  }

 private:
  // What forward has saved.
  struct Saved {
    const variable_list all;
    const size_t layers;
    const bool biases;
    const Tensor& input = all[0];
    const TensorList hidden = TensorList(all).slice(all.size() - (layers - 1));
    const TensorList weights = TensorList(all).slice(1, all.size() - layers);

    explicit Saved(AutogradContext* ctx)
        : all(ctx->get_saved_variables()),
          layers(ctx->saved_data["layers"].toInt()),
          biases(ctx->saved_data["biases"].toBool()) {}
  };

  // Biases, and a first weight that was left out, are no factors of any derivative.
  static variable_list differentiable(const Saved& saved, const Tensor& grad_y) {
    const auto& hidden = saved.hidden;
    const size_t layers = saved.layers, left_out = layers - saved.weights.size();
    variable_list inputs = {saved.input};
    const auto stand_in = [&](c10::SymIntArrayRef sizes) {
      inputs.push_back(
          stand_in_for_input(inputs.size(), at::zeros_symint(sizes, saved.input.options())));
    };
    const auto N = [&](size_t i) {
      return i < hidden.size() ? hidden[i].sym_size(-1) : grad_y.sym_size(-1);
    };
    if (left_out) stand_in({N(0), saved.input.sym_size(-1)});
    inputs.insert(inputs.end(), saved.weights.begin(), saved.weights.end());
    for (size_t i = 0; saved.biases && i < layers; ++i) stand_in({N(i)});
    const auto forward = [&](const variable_list& in) {
      Tensor y = in[0];
      for (size_t i = 0; i < layers; ++i) {
        const Tensor z =
            at::linear(y, in[1 + i], saved.biases ? optional(in[1 + layers + i]) : std::nullopt);
        // The values that were, with the derivatives of z.
        y = i + 1 < layers ? hidden[i] + (z - z.detach()).masked_fill(hidden[i].le(0), 0) : z;
      }
      return y;
    };
    return differentiable_backward(forward, inputs, grad_y);
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(dlkernels, m) { register_ops<MLP, MLPForward, MLPBackward>(m); }

}  // namespace dlkernels
