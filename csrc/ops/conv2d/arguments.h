// The arguments of the convolution ops: their checks and the shapes of the result, in SymInt.
#pragma once
#include "ops/core/torch_headers.h"

#include <array>
#include <tuple>
#include <vector>

#include "ops/core/eligibility.h"

namespace dlkernels::conv {

using c10::SymInt;
using c10::SymIntArrayRef;

// What is no tensor. padding is (top, bottom, left, right), so that "same" with an even window
// needs no padded copy.
struct Options {
  SymIntArrayRef stride, padding, dilation;
  const SymInt& groups;
};
constexpr const char* kOptionsSchema =
    "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups";

// An argument in two dimensions, its minimum, and PyTorch's text for what is below.
struct PairArgument {
  const char* name;
  int64_t min;
  const char* rule;
};
constexpr PairArgument kStride = {"stride", 1, "non-positive stride is not supported"};
constexpr PairArgument kPadding = {"padding", 0, "negative padding is not supported"};
constexpr PairArgument kDilation = {"dilation", 1, "dilation should be greater than zero"};

// (h, w), or one number for both.
inline std::array<SymInt, 2> pair(const PairArgument& a, SymIntArrayRef values) {
  TORCH_CHECK(values.size() == 1 || values.size() == 2, "conv2d: ", a.name,
              " must be one or two numbers, got ", values);
  for (const SymInt& v : values) {  // small enough that no product of two overflows
    TORCH_CHECK(v >= a.min, "conv2d: ", a.rule, ", got ", values);
    TORCH_CHECK(v <= INT32_MAX, "conv2d: ", a.name, " must be below 2**31, got ", values);
  }
  return {values[0], values.back()};
}

inline Tensor batched(const Tensor& input) { return input.dim() == 3 ? input.unsqueeze(0) : input; }

// As PyTorch: channels_last where the input or the weight is.
inline at::MemoryFormat layout(const Tensor& input, const Tensor& weight) {
  const auto last = at::MemoryFormat::ChannelsLast;
  return batched(input).suggest_memory_format() == last || weight.suggest_memory_format() == last
             ? last
             : at::MemoryFormat::Contiguous;
}

// input (N, C, H, W) or (C, H, W), weight (K, C / groups, KH, KW) -> sizes of (N, K, OH, OW)
inline std::array<SymInt, 4> output_sizes(const Tensor& input, const Tensor& weight,
                                          const Options& options) {
  const auto& [stride, padding, dilation, groups] = options;
  TORCH_CHECK(input.dim() == 3 || input.dim() == 4,
              "conv2d: input must be (N, C, H, W) or (C, H, W), got ", input.sym_sizes());
  TORCH_CHECK(weight.dim() == 4, "conv2d: weight must be (K, C / groups, KH, KW), got ",
              weight.sym_sizes());
  const auto s = pair(kStride, stride), d = pair(kDilation, dilation);
  TORCH_CHECK(padding.size() == 4, "conv2d: padding must be (top, bottom, left, right), got ",
              padding);
  const auto top = pair(kPadding, padding.slice(0, 2));
  const auto left = pair(kPadding, padding.slice(2, 2));
  TORCH_CHECK(groups > 0 && groups <= INT32_MAX, "conv2d: groups must be positive, got ", groups);
  const SymInt K = weight.sym_size(0), C = weight.sym_size(1) * groups;
  TORCH_CHECK(K % groups == 0, "conv2d: weight.shape[0] must be a multiple of groups = ", groups,
              ", got weight ", weight.sym_sizes());
  TORCH_CHECK(input.sym_size(-3) == C, "conv2d: input must have ", C,
              " channels (groups = ", groups, ", weight is ", weight.sym_sizes(), "), got input ",
              input.sym_sizes());
  std::array<SymInt, 4> sizes = {input.dim() == 4 ? input.sym_size(0) : SymInt(1), K, 0, 0};
  for (int i = 0; i < 2; ++i) {
    const SymInt kernel = weight.sym_size(2 + i), size = input.sym_size(i - 2);
    TORCH_CHECK(kernel <= INT32_MAX, "conv2d: weight must be smaller, got ", weight.sym_sizes());
    const SymInt padded = size + (i ? left : top)[0] + (i ? left : top)[1];
    const SymInt window = d[i] * (kernel - 1) + 1;
    TORCH_CHECK(window <= padded, "conv2d: the dilated kernel must not be larger than the padded ",
                "input, got kernel size ", window, " and input size ", padded, " in dimension ",
                i - 2);
    sizes[2 + i] = (padded - window) / s[i] + 1;
  }
  return sizes;
}

// Whether the CUDA kernels can count it in 32 bits (what is larger is PyTorch's). True on other
// devices, and for arguments that output_sizes refuses.
inline bool fits_cuda(const Tensor& input, const Tensor& weight, const Options& options) {
  const auto& [stride, padding, dilation, groups] = options;
  if (!input.is_cuda() || input.dim() < 3 || weight.dim() != 4 || padding.size() != 4) return true;
  constexpr int64_t kMax = int64_t{1} << 30, kMaxOfAxis = kMax / 4;
  bool fits = true;
  for (const SymIntArrayRef& numbers : {stride, padding, dilation})
    for (const SymInt& v : numbers) {
      if (v < 0 || v > INT32_MAX) return true;
      fits = fits && v < kMaxOfAxis;
    }
  const SymInt H = input.sym_size(-2) + padding[0] + padding[1];
  const SymInt W = input.sym_size(-1) + padding[2] + padding[3];
  const SymInt K = weight.sym_size(0), c = (weight.sym_size(1) + 7) / 8 * 8;
  return fits && H < kMaxOfAxis && W < kMaxOfAxis && H * W < kMax && K < 1 << 18 &&
         input.sym_size(-3) < 1 << 18 && weight.sym_size(2) < kMax && weight.sym_size(3) < kMax &&
         weight.sym_size(2) * weight.sym_size(3) < kMax / (K + 1) / (c + 1);
}

inline void check_bias(const char* op, const Tensor& weight, const optional<Tensor>& bias) {
  const SymInt K = weight.sym_size(0);
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->sym_size(0) == K), op, ": bias must be (", K,
              ") (weight is ", weight.sym_sizes(), "), got bias ", bias->sym_sizes());
}

// What a node keeps of them.
class SavedOptions {
 public:
  static void save(torch::autograd::AutogradContext* ctx, const Options& options) {
    ctx->saved_data["stride"] = options.stride;
    ctx->saved_data["padding"] = options.padding;
    ctx->saved_data["dilation"] = options.dilation;
    ctx->saved_data["groups"] = options.groups;
  }
  explicit SavedOptions(torch::autograd::AutogradContext* ctx)
      : stride_(ctx->saved_data["stride"].toSymIntVector()),
        padding_(ctx->saved_data["padding"].toSymIntVector()),
        dilation_(ctx->saved_data["dilation"].toSymIntVector()),
        groups_(ctx->saved_data["groups"].toSymInt()) {}

  Options get() const { return {stride_, padding_, dilation_, groups_}; }

 private:
  const std::vector<SymInt> stride_, padding_, dilation_;
  const SymInt groups_;
};

// ---- the signatures and structs of the ops ----------------------------------------------------

using Grads = std::tuple<Tensor, Tensor, Tensor>;  // of input, weight and bias

template <class Result>
using Signature = Result(const Tensor&, const Tensor&, const optional<Tensor>&, SymIntArrayRef,
                         SymIntArrayRef, SymIntArrayRef, SymInt);

struct Args {
  const Tensor &input, &weight;
  const optional<Tensor>& bias;
  Options options;

  // f(the arguments in the schema's order)
  template <class F>
  auto apply(const F& f) const {
    return f(input, weight, bias, options.stride, options.padding, options.dilation,
             options.groups);
  }
};

// Not empty: what PyTorch makes of empty channels is PyTorch's.
inline bool has_kernel(const char* op, const Args& a) {
  check_device(op, a.input, a.weight), check_device(op, a.input, a.bias);
  return has_gemm_kernel(a.input, a.weight, a.bias) && a.input.sym_numel() != 0 &&
         a.weight.sym_numel() != 0 && fits_cuda(a.input, a.weight, a.options);
}

// New tensors for the gradients of input, weight and bias, as far as the mask wants them.
inline Grads new_gradients(const Tensor& input, const Tensor& weight, std::array<bool, 3> mask) {
  const auto format = layout(input, weight);
  const auto empty = [&](const Tensor& like) {
    const Tensor x = at::empty_symint(batched(like).sym_sizes(), input.options(), format);
    return like.dim() == 3 ? x.squeeze(0) : x;
  };
  return {mask[0] ? empty(input) : Tensor(), mask[1] ? empty(weight) : Tensor(),
          mask[2] ? at::empty_symint({weight.sym_size(0)}, input.options()) : Tensor()};
}

}  // namespace dlkernels::conv
