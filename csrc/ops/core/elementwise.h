// The frame of an op y[i] = f(x[i]) with numbers as options, and of its gradient.
#pragma once
#include "ops/core/op.h"

namespace dlkernels {

// As PyTorch's pointwise ops have it: default strides where no two dimensions of more than one
// element have changed places, whatever strides dimensions of one element have; else those of x.
// empty_like would do, but calls the dispatcher three times.
inline Tensor empty_like_pointwise(const Tensor& x) {
  return x.is_contiguous() ? at::empty_symint(x.sym_sizes(), x.options()) : at::empty_like(x);
}

// x itself where it has the strides of y, else a copy that has them.
inline Tensor with_strides_of(const Tensor& y, const Tensor& x) {
  return x.strides() == y.strides() ? x : at::empty_like(y).copy_(x);
}

// f(begin, end) for all elements, on all threads.
template <class F>
void parallel_elements(int64_t numel, const F& f) {
  constexpr int64_t kGrain = 32768;  // about 20 us: below, a fork costs more than it saves
  parallel_chunks(numel, kGrain, f);
}

// F is what one op adds to the frame; Options are the types of its options, double each:
//   kName, kSchema            "relu", "(Tensor input) -> Tensor"
//   kBackward, kBackwardSchema, kNode   of the gradient, and its node
//   kSaved                    what the gradient is computed from: "y" or "input"
//   kCPU, kCPUBackward        its members of the CPU's table of kernels
//   kCUDA, kCUDABackward      those of CUDA's; without them the op has no CUDA kernel
//   aten(input, options...), aten_backward(grad_y, saved, options...)   PyTorch's own
template <class F, class... Options>
struct ElementwiseBackward
    : Op<ElementwiseBackward<F, Options...>, Tensor(const Tensor&, const Tensor&, Options...)> {
  static constexpr const char* kName = F::kBackward;
  static constexpr const char* kSchema = F::kBackwardSchema;
  inline static OpStats stats{kName};

  struct Args {
    const Tensor &grad_y, &saved;
    std::tuple<Options...> options;
    Args(const Tensor& grad_y, const Tensor& saved, Options... options)
        : grad_y(grad_y), saved(saved), options(options...) {}
  };

  static Tensor meta(const Args& a) {
    check_device(kName, a.saved, a.grad_y);
    TORCH_CHECK(a.grad_y.sym_sizes() == a.saved.sym_sizes(), kName, ": grad_y must be ",
                a.saved.sym_sizes(), " as ", F::kSaved, " is, got ", a.grad_y.sym_sizes());
    TORCH_CHECK_NOT_IMPLEMENTED(
        is_supported(a.grad_y) && is_supported(a.saved) && same_dtype(a.saved, a.grad_y), kName,
        ": tensors must be dense ", kSupportedDTypes, ", got grad_y ", a.grad_y.scalar_type(),
        " and ", F::kSaved, " ", a.saved.scalar_type());
    return empty_like_pointwise(a.saved);
  }

  static void cpu(const Tensor& grad_x, const Args& a) {
    const Tensor g = with_strides_of(grad_x, a.grad_y), s = with_strides_of(grad_x, a.saved);
    const float *from = g.const_data_ptr<float>(), *saved = s.const_data_ptr<float>();
    float* const to = grad_x.mutable_data_ptr<float>();
    std::apply(
        [&](auto... options) {
          parallel_elements(grad_x.numel(), [&](int64_t begin, int64_t end) {
            (cpu::kernels().*F::kCPUBackward)(from, saved, to, static_cast<float>(options)...,
                                              begin, end);
          });
        },
        a.options);
  }

  static void cuda(const Tensor& grad_x, const Args& a)
    requires(requires { F::kCUDA; })
  {
    const Tensor g = with_strides_of(grad_x, a.grad_y), s = with_strides_of(grad_x, a.saved);
    launch(kName, g, [&](const cuda::Kernels& kernels, cuda::Stream stream) {
      return std::apply(
          [&](auto... options) {
            return (kernels.*F::kCUDABackward)(dtype_of(g), g.const_data_ptr(), s.const_data_ptr(),
                                               grad_x.mutable_data_ptr(),
                                               static_cast<float>(options)..., g.numel(), stream);
          },
          a.options);
    });
  }
};

template <class F, class... Options>
struct ElementwiseOp : Op<ElementwiseOp<F, Options...>, Tensor(const Tensor&, Options...)> {
  using Backward = ElementwiseBackward<F, Options...>;
  static constexpr const char *kName = F::kName, *kNode = F::kNode;
  static constexpr const char* kSchema = F::kSchema;
  static constexpr Autocast kAutocast = Autocast::kNone;
  static constexpr bool kIsGemm = false;
  inline static OpStats stats{kName};

  struct Args {
    const Tensor& input;
    std::tuple<Options...> options;
    explicit Args(const Tensor& input, Options... options) : input(input), options(options...) {}
  };

  static bool has_kernel(const Args& a) { return is_supported(a.input); }

  static Tensor aten(const Args& a) {
    return std::apply([&](auto... options) { return F::aten(a.input, options...); }, a.options);
  }

  static Tensor meta(const Args& a) { return empty_like_pointwise(a.input); }

  static void cpu(const Tensor& y, const Args& a) {
    const Tensor x = with_strides_of(y, a.input);
    const float* const from = x.const_data_ptr<float>();
    float* const to = y.mutable_data_ptr<float>();
    std::apply(
        [&](auto... options) {
          parallel_elements(y.numel(), [&](int64_t begin, int64_t end) {
            (cpu::kernels().*F::kCPU)(from, to, static_cast<float>(options)..., begin, end);
          });
        },
        a.options);
  }

  static void cuda(const Tensor& y, const Args& a)
    requires(requires { F::kCUDA; })
  {
    const Tensor x = with_strides_of(y, a.input);
    launch(kName, x, [&](const cuda::Kernels& kernels, cuda::Stream stream) {
      return std::apply(
          [&](auto... options) {
            return (kernels.*F::kCUDA)(dtype_of(x), x.const_data_ptr(), y.mutable_data_ptr(),
                                       static_cast<float>(options)..., y.numel(), stream);
          },
          a.options);
    });
  }

  // ---- gradient ---------------------------------------------------------------------------

  static Tensor forward(AutogradContext* ctx, const Args& a) {
    const Tensor y = std::apply(
        [&](auto... options) { return ElementwiseOp::call_below_autograd(a.input, options...); },
        a.options);
    ctx->save_for_backward({std::string_view(F::kSaved) == "y" ? y : a.input});
    if constexpr (sizeof...(Options) > 0)
      ctx->saved_data["options"] =
          std::apply([](auto... options) { return std::vector<double>{options...}; }, a.options);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const Tensor& grad_y) {
    return with_saved(ctx, [&](const Tensor& saved, auto... options) {
      return Backward::call_below_autograd(grad_y, saved, options...);
    });
  }

  static variable_list double_backward(AutogradContext* ctx, const Tensor& grad_y) {
    return with_saved(ctx, [&](const Tensor& saved, auto... options) {
      return F::aten_backward(grad_y, saved, options...);
    });
  }

 private:
  template <class G>
  static variable_list with_saved(AutogradContext* ctx, const G& g) {
    const Tensor saved = ctx->get_saved_variables()[0];
    if constexpr (sizeof...(Options) == 0) {
      return {g(saved)};
    } else {
      const auto options = ctx->saved_data["options"].toDoubleVector();
      return [&]<size_t... I>(std::index_sequence<I...>) -> variable_list {
        return {g(saved, options[I]...)};
      }(std::index_sequence_for<Options...>());
    }
  }
};

// Registers both ops of F.
template <class F, class... Options>
void register_elementwise(torch::Library& library) {
  register_ops<ElementwiseOp<F, Options...>, ElementwiseBackward<F, Options...>>(library);
}

}  // namespace dlkernels
