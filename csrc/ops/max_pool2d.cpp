// max_pool2d: y[n, c, oh, ow] = max of input[n, c, h, w] over the elements of a window, NaN above
// all. The arithmetic is in cpu/pool2d/ and cuda/pool2d/.
#include "ops/core/torch_headers.h"

#include <ATen/ops/fill.h>
#include <ATen/ops/max_pool2d.h>
#include <ATen/ops/max_pool2d_with_indices.h>

#include "ops/core/op.h"
#include "ops/max_pool2d.h"

namespace dlkernels {
namespace {

using namespace pool;

OpStats stats("max_pool2d");

// ---- the kernels' calls -------------------------------------------------------------------

// A tensor in channels_last as it is, any other as planes: images of one channel.
cpu::Pool view(const Window& window, SymIntArrayRef input_size, const Tensor& y) {
  const bool channels_last = y.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  return {channels_last ? y.size(1) : 1, window.axis(0, input_size[0].expect_int(), y.size(-2)),
          window.axis(1, input_size[1].expect_int(), y.size(-1))};
}

// f(begin, end) for the rows of x, the output of windows or their input. `unit` rows stay together.
template <class F>
void parallel_rows(const cpu::Pool& p, const Tensor& x, int64_t unit, const F& f) {
  constexpr int64_t kGrain = 65536;  // elements looked at; less than that is not worth a fork
  const int64_t rows = x.numel() / (x.size(-1) * p.C), units = (rows + unit - 1) / unit;
  const int64_t work = unit * x.size(-1) * p.C * p.h.kernel * p.w.kernel;
  parallel_chunks(units, std::max<int64_t>(1, kGrain / work),
                  [&](int64_t begin, int64_t end) { f(begin * unit, std::min(rows, end * unit)); });
}

// As the CUDA kernels take it. Sides that they don't are more than PyTorch's own take.
cuda::Pool cuda_view(const Window& window, SymIntArrayRef input_size, const Tensor& y) {
  const cpu::Pool p = view(window, input_size, y);
  for (const int64_t side : {p.C, p.h.in, p.w.in, p.h.out, p.w.out})
    TORCH_CHECK(side <= cuda::kPoolSide, window.op, ": sides must be at most 2^29 on CUDA, got ",
                y.sizes(), " from ", input_size);
  return {y.numel() / (p.h.out * p.w.out * p.C), p.C, p.h, p.w};
}

uint8_t* bytes(const Tensor& argmax) {
  return argmax.defined() ? argmax.mutable_data_ptr<uint8_t>() : nullptr;
}

// y, and argmax unless it is undefined.
void pool_cpu(const Window& window, const Tensor& input, const Tensor& y, const Tensor& argmax) {
  const Tensor xc = input.contiguous(y.suggest_memory_format());
  const cpu::Pool p = view(window, plane(xc), y);
  const float* const x = xc.const_data_ptr<float>();
  float* const to = y.mutable_data_ptr<float>();
  uint8_t* const elements = bytes(argmax);
  parallel_rows(p, y, 1, [&](int64_t begin, int64_t end) {
    cpu::kernels().max_pool2d(x, to, elements, p, begin, end);
  });
}
void pool_cuda(const Window& window, const Tensor& input, const Tensor& y, const Tensor& argmax) {
  const Tensor x = input.contiguous(y.suggest_memory_format());
  const cuda::Pool p = cuda_view(window, plane(x), y);
  launch(window.op, y, [&](const cuda::Kernels& kernels, cuda::Stream stream) {
    return kernels.max_pool2d(dtype_of(x), x.const_data_ptr(), y.mutable_data_ptr(), bytes(argmax),
                              p, stream);
  });
}

void indices_cpu(const Window& window, const Tensor& argmax, SymIntArrayRef input_size,
                 const Tensor& indices) {
  if (indices.numel() == 0) return;
  const Tensor a = argmax.contiguous(indices.suggest_memory_format());
  const cpu::Pool p = view(window, input_size, indices);
  const uint8_t* const from = a.const_data_ptr<uint8_t>();
  int64_t* const to = indices.mutable_data_ptr<int64_t>();
  parallel_rows(p, indices, 1, [&](int64_t begin, int64_t end) {
    cpu::kernels().max_pool2d_indices(from, to, p, begin, end);
  });
}
void indices_cuda(const Window& window, const Tensor& argmax, SymIntArrayRef input_size,
                  const Tensor& indices) {
  const Tensor a = argmax.contiguous(indices.suggest_memory_format());
  const cuda::Pool p = cuda_view(window, input_size, indices);
  launch(window.op, a, [&](const cuda::Kernels& kernels, cuda::Stream stream) {
    return kernels.max_pool2d_indices(a.const_data_ptr<uint8_t>(),
                                      indices.mutable_data_ptr<int64_t>(), p, stream);
  });
}

// ---- the gradient, and what it needs ------------------------------------------------------

// argmax is a byte for each element of y: the position kh * KW + kw of the maximum in its window,
// or 255. `window` is kernel_size, stride, padding and dilation, two numbers each; input_size is
// (H, W).

struct MaxPool2dForward : Op<MaxPool2dForward, TensorPair(const Tensor&, IntArrayRef, bool)> {
  static constexpr const char* kName = "max_pool2d_forward";
  static constexpr const char* kSchema =
      "(Tensor input, int[] window, bool ceil_mode) -> (Tensor y, Tensor argmax)";
  static constexpr OpStats& stats = dlkernels::stats;

  struct Args {
    const Tensor& input;
    const Window window;
    Args(const Tensor& input, IntArrayRef window, bool ceil_mode)
        : input(input), window(kName, window, ceil_mode) {}
  };

  static TensorPair meta(const Args& a) {
    TORCH_CHECK_NOT_IMPLEMENTED(has_kernel(a.window, a.input), kName, ": input must be dense ",
                                kSupportedDTypes, " and windows of at most 255 elements, got ",
                                a.input.scalar_type(), " and windows of ", a.window.kernel_size());
    return {new_output(a.window, a.input, a.input.scalar_type()),
            new_output(a.window, a.input, at::kByte)};
  }

  static void cpu(const TensorPair& out, const Args& a) {
    pool_cpu(a.window, a.input, std::get<0>(out), std::get<1>(out));
  }
  static void cuda(const TensorPair& out, const Args& a) {
    pool_cuda(a.window, a.input, std::get<0>(out), std::get<1>(out));
  }
};

struct MaxPool2dIndices
    : Op<MaxPool2dIndices, Tensor(const Tensor&, SymIntArrayRef, IntArrayRef, bool)> {
  static constexpr const char* kName = "max_pool2d_indices";
  static constexpr const char* kSchema =
      "(Tensor argmax, SymInt[] input_size, int[] window, bool ceil_mode) -> Tensor";

  struct Args {
    const Tensor& argmax;
    SymIntArrayRef input_size;
    const Window window;
    Args(const Tensor& argmax, SymIntArrayRef input_size, IntArrayRef window, bool ceil_mode)
        : argmax(argmax), input_size(input_size), window(kName, window, ceil_mode) {}
  };

  static Tensor meta(const Args& a) {
    check_argmax(a.window, a.argmax, a.input_size);
    return at::empty_symint(a.argmax.sym_sizes(), a.argmax.options().dtype(at::kLong),
                            a.argmax.suggest_memory_format());
  }

  static void cpu(const Tensor& out, const Args& a) {
    indices_cpu(a.window, a.argmax, a.input_size, out);
  }
  static void cuda(const Tensor& out, const Args& a) {
    indices_cuda(a.window, a.argmax, a.input_size, out);
  }
};

struct MaxPool2dBackward : Op<MaxPool2dBackward, Tensor(const Tensor&, const Tensor&,
                                                        SymIntArrayRef, IntArrayRef, bool)> {
  static constexpr const char* kName = "max_pool2d_backward";
  static constexpr const char* kSchema =
      "(Tensor grad_y, Tensor argmax, SymInt[] input_size, int[] window, bool ceil_mode) "
      "-> Tensor";
  inline static OpStats stats{kName};

  struct Args {
    const Tensor &grad_y, &argmax;
    SymIntArrayRef input_size;
    const Window window;
    Args(const Tensor& grad_y, const Tensor& argmax, SymIntArrayRef input_size, IntArrayRef window,
         bool ceil_mode)
        : grad_y(grad_y),
          argmax(argmax),
          input_size(input_size),
          window(kName, window, ceil_mode) {}
  };

  static Tensor meta(const Args& a) {
    const auto& [grad_y, argmax, input_size, window] = a;
    check_device(kName, argmax, grad_y);
    check_argmax(window, argmax, input_size);
    TORCH_CHECK(grad_y.sym_sizes() == argmax.sym_sizes(), kName, ": grad_y must be ",
                argmax.sym_sizes(), " as argmax is, got ", grad_y.sym_sizes());
    TORCH_CHECK_NOT_IMPLEMENTED(is_supported(grad_y), kName, ": grad_y must be dense ",
                                kSupportedDTypes, ", got ", grad_y.scalar_type());
    c10::SymDimVector sizes(argmax.sym_sizes().begin(), argmax.sym_sizes().end());
    std::copy(input_size.begin(), input_size.end(), sizes.end() - 2);
    return at::empty_symint(sizes, grad_y.options(), argmax.suggest_memory_format());
  }

  static void cpu(const Tensor& grad_x, const Args& a) {
    if (grad_x.numel() == 0) return;
    const auto format = a.argmax.suggest_memory_format();
    const Tensor g = a.grad_y.contiguous(format), arg = a.argmax.contiguous(format);
    const cpu::Pool p = view(a.window, a.input_size, arg);
    const float* const grad = g.const_data_ptr<float>();
    const uint8_t* const elements = arg.const_data_ptr<uint8_t>();
    float* const to = grad_x.mutable_data_ptr<float>();
    // Windows that reach from one part into the next are slow: whole images, or at least many rows.
    const int64_t images = grad_x.numel() / (p.h.in * p.w.in * p.C);
    parallel_rows(p, grad_x, images >= 16 ? p.h.in : 8 * p.h.kernel,
                  [&](int64_t begin, int64_t end) {
                    cpu::kernels().max_pool2d_backward(grad, elements, to, p, begin, end);
                  });
  }

  static void cuda(const Tensor& grad_x, const Args& a) {
    const auto format = a.argmax.suggest_memory_format();
    const Tensor g = a.grad_y.contiguous(format), arg = a.argmax.contiguous(format);
    const cuda::Pool p = cuda_view(a.window, a.input_size, arg);
    launch(kName, g, [&](const cuda::Kernels& kernels, cuda::Stream stream) {
      return kernels.max_pool2d_backward(dtype_of(g), g.const_data_ptr(),
                                         arg.const_data_ptr<uint8_t>(), grad_x.mutable_data_ptr(),
                                         p, stream);
    });
  }
};

// ---- the public ops -----------------------------------------------------------------------

// y, or y and indices.
template <bool kIndices>
using Result = std::conditional_t<kIndices, TensorPair, Tensor>;

// The sizes are SymInt, so that torch.compile can hand over one that it holds for dynamic; it
// becomes a constant.
template <bool kIndices>
struct MaxPool2d
    : Op<MaxPool2d<kIndices>, Result<kIndices>(const Tensor&, SymIntArrayRef, SymIntArrayRef,
                                               SymIntArrayRef, SymIntArrayRef, bool)> {
  using Backward = MaxPool2dBackward;
  static constexpr const char* kName = kIndices ? "max_pool2d_with_indices" : "max_pool2d";
  static constexpr const char* kNode = "MaxPool2dBackward";
  static constexpr const char* kSchema =
      kIndices ? "(Tensor input, SymInt[2] kernel_size, SymInt[2] stride=[], SymInt[2] padding=0, "
                 "SymInt[2] dilation=1, bool ceil_mode=False) -> (Tensor, Tensor)"
               : "(Tensor input, SymInt[2] kernel_size, SymInt[2] stride=[], SymInt[2] padding=0, "
                 "SymInt[2] dilation=1, bool ceil_mode=False) -> Tensor";
  static constexpr Autocast kAutocast = Autocast::kNone;
  static constexpr bool kIsGemm = false;
  static constexpr OpStats& stats = dlkernels::stats;

  struct Args {
    const Tensor& input;
    const Window window;
    Args(const Tensor& input, SymIntArrayRef kernel_size, SymIntArrayRef stride,
         SymIntArrayRef padding, SymIntArrayRef dilation, bool ceil_mode)
        : input(input),
          window("max_pool2d", ints(kernel_size), ints(stride), ints(padding), ints(dilation),
                 ceil_mode) {}
  };

  static bool has_kernel(const Args& a) { return pool::has_kernel(a.window, a.input); }

  static Result<kIndices> aten(const Args& a) {
    const Window& w = a.window;
    check_no_empty_window(w, a.input);
    if constexpr (kIndices)
      return at::max_pool2d_with_indices(a.input, w.kernel_size(), w.stride(), w.padding(),
                                         w.dilation(), w.ceil_mode);
    else
      return at::max_pool2d(a.input, w.kernel_size(), w.stride(), w.padding(), w.dilation(),
                            w.ceil_mode);
  }

  static Result<kIndices> meta(const Args& a) {
    const Tensor y = new_output(a.window, a.input, a.input.scalar_type());
    if constexpr (kIndices)
      return {y, new_output(a.window, a.input, at::kLong)};
    else
      return y;
  }

  static void cpu(const Result<kIndices>& out, const Args& a) {
    if constexpr (kIndices) {
      const auto& [y, indices] = out;
      const Tensor argmax = new_output(a.window, a.input, at::kByte);
      pool_cpu(a.window, a.input, y, argmax);
      indices_cpu(a.window, argmax, plane(a.input), indices);
    } else {
      pool_cpu(a.window, a.input, out, Tensor());
    }
  }
  static void cuda(const Result<kIndices>& out, const Args& a) {
    if constexpr (kIndices) {
      const auto& [y, indices] = out;
      const Tensor argmax = new_output(a.window, a.input, at::kByte);
      pool_cuda(a.window, a.input, y, argmax);
      indices_cuda(a.window, argmax, plane(a.input), indices);
    } else {
      pool_cuda(a.window, a.input, out, Tensor());
    }
  }

  static Result<kIndices> forward(AutogradContext* ctx, const Args& a) {
    const auto& [op, sizes, ceil_mode] = a.window;
    const auto [y, argmax] = MaxPool2dForward::call_below_autograd(a.input, sizes, ceil_mode);
    ctx->save_for_backward({argmax});
    ctx->saved_data["input_size"] = plane(a.input);
    ctx->saved_data["window"] = IntArrayRef(sizes);
    ctx->saved_data["ceil_mode"] = ceil_mode;
    if constexpr (kIndices)
      return {y, MaxPool2dIndices::call_below_autograd(argmax, plane(a.input), sizes, ceil_mode)};
    else
      return y;
  }

  static variable_list backward(AutogradContext* ctx, const Tensor& grad_y) {
    const Tensor argmax = ctx->get_saved_variables()[0];
    return {MaxPool2dBackward::call_below_autograd(
        grad_y, argmax, ctx->saved_data["input_size"].toSymIntVector(),
        ctx->saved_data["window"].toIntVector(), ctx->saved_data["ceil_mode"].toBool())};
  }

  // Differentiable in grad_y: PyTorch's scatter to the indices. -1 is nowhere. And in the input,
  // which has gradients of 0.
  static variable_list double_backward(AutogradContext* ctx, const Tensor& grad_y) {
    const Tensor argmax = ctx->get_saved_variables()[0];
    const auto input_size = ctx->saved_data["input_size"].toSymIntVector();
    const Tensor indices = MaxPool2dIndices::call_below_autograd(
                               argmax, input_size, ctx->saved_data["window"].toIntVector(),
                               ctx->saved_data["ceil_mode"].toBool())
                               .flatten(-2);
    c10::SymDimVector sizes(argmax.sym_sizes().begin(), argmax.sym_sizes().end());
    std::copy(input_size.begin(), input_size.end(), sizes.end() - 2);
    const Tensor input = stand_in_for_input(0, at::empty_symint(sizes, grad_y.options()));
    const Tensor grad_x =
        at::fill(input, 0)
            .flatten(-2)
            .scatter_add(-1, indices.clamp_min(0), grad_y.flatten(-2).masked_fill(indices.lt(0), 0))
            .unflatten_symint(-1, input_size);
    return {grad_x.contiguous(argmax.suggest_memory_format())};
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(dlkernels, m) {
  register_ops<MaxPool2d<false>, MaxPool2d<true>, MaxPool2dForward, MaxPool2dIndices,
               MaxPool2dBackward>(m);
}

}  // namespace dlkernels
