// max_pool2d: schema, shapes, CPU, CUDA and gradient. The arithmetic is in cpu/max_pool2d.inl.h
// and cuda/max_pool2d.cu.
#include "ops/torch_headers.h"

#include <ATen/ops/max_pool2d.h>
#include <ATen/ops/max_pool2d_with_indices.h>

#include "gradient.h"
#include "max_pool2d.h"

namespace dlkernels {

TORCH_LIBRARY_FRAGMENT(dlkernels, m) {
  // SymInt, so that torch.compile can hand over a size it holds for dynamic; it becomes constant.
  m.def(
      "max_pool2d(Tensor input, SymInt[2] kernel_size, SymInt[2] stride=[], SymInt[2] padding=0, "
      "SymInt[2] dilation=1, bool ceil_mode=False) -> Tensor");
  m.def(
      "max_pool2d_with_indices(Tensor input, SymInt[2] kernel_size, SymInt[2] stride=[], "
      "SymInt[2] padding=0, SymInt[2] dilation=1, bool ceil_mode=False) -> (Tensor, Tensor)");
  // argmax is what the gradient needs: a byte, the position kh * KW + kw of a maximum in its
  // window, or 255. `window` is kernel_size, stride, padding and dilation, two numbers each.
  m.def(
      "max_pool2d_forward(Tensor input, int[] window, bool ceil_mode) "
      "-> (Tensor y, Tensor argmax)");
  // input_size is (H, W).
  m.def(
      "max_pool2d_indices(Tensor argmax, SymInt[] input_size, int[] window, bool ceil_mode) "
      "-> Tensor");
  m.def(
      "max_pool2d_backward(Tensor grad_y, Tensor argmax, SymInt[] input_size, int[] window, "
      "bool ceil_mode) -> Tensor");
}

namespace {

using namespace pool;

OpStats max_pool2d_stats("max_pool2d"), max_pool2d_backward_stats("max_pool2d_backward");

using Two = std::tuple<Tensor, Tensor>;
// Of the public ops: y, or y and indices.
template <bool kIndices>
using Result = std::conditional_t<kIndices, Two, Tensor>;
template <bool kIndices>
using MaxPool2d = Result<kIndices>(const Tensor& input, SymIntArrayRef kernel_size,
                                   SymIntArrayRef stride, SymIntArrayRef padding,
                                   SymIntArrayRef dilation, bool ceil_mode);
using MaxPool2dForward = Two(const Tensor& input, IntArrayRef window, bool ceil_mode);
using MaxPool2dIndices = Tensor(const Tensor& argmax, SymIntArrayRef input_size, IntArrayRef window,
                                bool ceil_mode);
using MaxPool2dBackward = Tensor(const Tensor& grad_y, const Tensor& argmax,
                                 SymIntArrayRef input_size, IntArrayRef window, bool ceil_mode);

// f as the public ops are called.
template <bool kIndices, Result<kIndices> (*f)(const Args&, const Tensor&)>
Result<kIndices> called(const Tensor& input, SymIntArrayRef kernel_size, SymIntArrayRef stride,
                        SymIntArrayRef padding, SymIntArrayRef dilation, bool ceil_mode) {
  return f(
      {"max_pool2d", ints(kernel_size), ints(stride), ints(padding), ints(dilation), ceil_mode},
      input);
}

// ---- shapes: shared by every device and by torch.compile, hence SymInt --------------------

template <bool kIndices>
Result<kIndices> max_pool2d_meta(const Args& args, const Tensor& input) {
  Tensor y = new_output(args, input, input.scalar_type());
  if constexpr (kIndices)
    return {y, new_output(args, input, at::kLong)};
  else
    return y;
}

Two max_pool2d_forward_meta(const Tensor& input, IntArrayRef window, bool ceil_mode) {
  const Args args("max_pool2d_forward", window, ceil_mode);
  TORCH_CHECK_NOT_IMPLEMENTED(ours(args, input), args.op, ": input must be dense ", kOurDTypes,
                              " and windows of at most 255 elements, got ", input.scalar_type(),
                              " and windows of ", window.slice(0, 2));
  return {new_output(args, input, input.scalar_type()), new_output(args, input, at::kByte)};
}

Tensor max_pool2d_indices_meta(const Tensor& argmax, SymIntArrayRef input_size, IntArrayRef window,
                               bool ceil_mode) {
  check_argmax({"max_pool2d_indices", window, ceil_mode}, argmax, input_size);
  return at::empty_symint(argmax.sym_sizes(), argmax.options().dtype(at::kLong),
                          argmax.suggest_memory_format());
}

Tensor max_pool2d_backward_meta(const Tensor& grad_y, const Tensor& argmax,
                                SymIntArrayRef input_size, IntArrayRef window, bool ceil_mode) {
  const Args args("max_pool2d_backward", window, ceil_mode);
  check_device(args.op, argmax, grad_y);
  check_argmax(args, argmax, input_size);
  TORCH_CHECK(grad_y.sym_sizes() == argmax.sym_sizes(), args.op, ": grad_y must be ",
              argmax.sym_sizes(), " as argmax is, got ", grad_y.sym_sizes());
  TORCH_CHECK_NOT_IMPLEMENTED(is_ours(grad_y), args.op, ": grad_y must be dense ", kOurDTypes,
                              ", got ", grad_y.scalar_type());
  c10::SymDimVector sizes(argmax.sym_sizes().begin(), argmax.sym_sizes().end());
  std::copy(input_size.begin(), input_size.end(), sizes.end() - 2);
  return at::empty_symint(sizes, grad_y.options(), argmax.suggest_memory_format());
}

// ---- PyTorch's own, for what is not ours ---------------------------------------------------

template <bool kIndices>
Result<kIndices> max_pool2d_torch(const Args& args, const Tensor& input) {
  max_pool2d_stats.torch_ran();
  check_no_empty_window(args, input);
  const auto f = [] {
    if constexpr (kIndices)
      return &at::max_pool2d_with_indices;
    else
      return &at::max_pool2d;
  }();
  return f(input, args.pair(0), args.pair(2), args.pair(4), args.pair(6), args.ceil_mode);
}

// ---- cpu ----------------------------------------------------------------------------------

constexpr int64_t kGrain = 65536;  // elements looked at; less than that is not worth a fork

// The kernel's view of it: channels_last as it lies, otherwise every plane an image.
cpu::Pool view(const Args& args, SymIntArrayRef input_size, const Tensor& y) {
  const bool channels_last = y.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  return {channels_last ? y.size(1) : 1, args.axis(0, input_size[0].expect_int(), y.size(-2)),
          args.axis(1, input_size[1].expect_int(), y.size(-1))};
}

// Rows of windows, or of what they look at, in a tensor of that many; `unit` of them stay together.
template <class F>
void parallel_rows(const cpu::Pool& p, const Tensor& x, int64_t unit, const F& f) {
  const int64_t rows = x.numel() / (x.size(-1) * p.C), units = (rows + unit - 1) / unit;
  const int64_t work = unit * x.size(-1) * p.C * p.h.kernel * p.w.kernel;
  parallel_chunks(units, std::max<int64_t>(1, kGrain / work),
                  [&](int64_t begin, int64_t end) { f(begin * unit, std::min(rows, end * unit)); });
}

// y, and argmax unless it is undefined.
void max_pool2d_out(const Args& args, const Tensor& input, Tensor& y, Tensor& argmax) {
  max_pool2d_stats.kernel_ran();
  const Tensor xc = input.contiguous(y.suggest_memory_format());
  const cpu::Pool p = view(args, plane(xc), y);
  const float* x = xc.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  uint8_t* arg = argmax.defined() ? argmax.mutable_data_ptr<uint8_t>() : nullptr;
  parallel_rows(p, y, 1, [&](int64_t begin, int64_t end) {
    cpu::kernels().max_pool2d(x, to, arg, p, begin, end);
  });
}

Two max_pool2d_forward_cpu(const Tensor& input, IntArrayRef window, bool ceil_mode) {
  auto [y, argmax] = max_pool2d_forward_meta(input, window, ceil_mode);
  huge(y);
  max_pool2d_out({"max_pool2d_forward", window, ceil_mode}, input, y, argmax);
  return {y, argmax};
}

Tensor max_pool2d_indices_cpu(const Tensor& argmax, SymIntArrayRef input_size, IntArrayRef window,
                              bool ceil_mode) {
  Tensor indices = max_pool2d_indices_meta(argmax, input_size, window, ceil_mode);
  if (indices.numel() == 0) return indices;
  const Tensor a = argmax.contiguous(indices.suggest_memory_format());
  const cpu::Pool p = view({"max_pool2d_indices", window, ceil_mode}, input_size, indices);
  const uint8_t* from = a.const_data_ptr<uint8_t>();
  int64_t* to = indices.mutable_data_ptr<int64_t>();
  parallel_rows(p, indices, 1, [&](int64_t begin, int64_t end) {
    cpu::kernels().max_pool2d_indices(from, to, p, begin, end);
  });
  return indices;
}

template <bool kIndices>
Result<kIndices> max_pool2d_cpu(const Args& args, const Tensor& input) {
  if (!ours(args, input)) return max_pool2d_torch<kIndices>(args, input);
  Tensor y = new_output(args, input, at::kFloat);
  Tensor argmax = kIndices ? new_output(args, input, at::kByte) : Tensor();
  max_pool2d_out(args, input, y, argmax);
  if constexpr (kIndices)
    return {y, max_pool2d_indices_cpu(argmax, plane(input), args.window, args.ceil_mode)};
  else
    return y;
}

Tensor max_pool2d_backward_cpu(const Tensor& grad_y, const Tensor& argmax,
                               SymIntArrayRef input_size, IntArrayRef window, bool ceil_mode) {
  Tensor grad_x = huge(max_pool2d_backward_meta(grad_y, argmax, input_size, window, ceil_mode));
  max_pool2d_backward_stats.kernel_ran();
  if (grad_x.numel() == 0) return grad_x;
  const auto layout = argmax.suggest_memory_format();
  const Tensor g = grad_y.contiguous(layout), a = argmax.contiguous(layout);
  const cpu::Pool p = view({"max_pool2d_backward", window, ceil_mode}, input_size, a);
  const float* grad = g.const_data_ptr<float>();
  const uint8_t* arg = a.const_data_ptr<uint8_t>();
  float* to = grad_x.mutable_data_ptr<float>();
  // Windows that reach from one part into the next are slow: whole images, or at least many rows.
  const int64_t images = grad_x.numel() / (p.h.in * p.w.in * p.C);
  parallel_rows(p, grad_x, images >= 16 ? p.h.in : 8 * p.h.kernel, [&](int64_t begin, int64_t end) {
    cpu::kernels().max_pool2d_backward(grad, arg, to, p, begin, end);
  });
  return grad_x;
}

// ---- cuda ---------------------------------------------------------------------------------

// As the kernels take it. Sides that they don't are more than PyTorch's own take.
cuda::Pool cuda_view(const Args& args, SymIntArrayRef input_size, const Tensor& y) {
  const cpu::Pool p = view(args, input_size, y);
  for (const int64_t side : {p.C, p.h.in, p.w.in, p.h.out, p.w.out})
    TORCH_CHECK(side <= cuda::kPoolSide, args.op, ": sides must be at most 2^29 on CUDA, got ",
                y.sizes(), " from ", input_size);
  const auto axis = [](const cpu::PoolAxis& a) -> cuda::PoolAxis {
    return {a.in, a.out, a.kernel, a.stride, a.pad, a.dilation};
  };
  return {y.numel() / (p.h.out * p.w.out * p.C), p.C, axis(p.h), axis(p.w)};
}

// y, and argmax unless it is undefined.
void max_pool2d_out_cuda(const Args& args, const Tensor& input, Tensor& y, Tensor& argmax) {
  max_pool2d_stats.kernel_ran();
  const Tensor x = input.contiguous(y.suggest_memory_format());
  const cuda::Pool p = cuda_view(args, plane(x), y);
  uint8_t* arg = argmax.defined() ? argmax.mutable_data_ptr<uint8_t>() : nullptr;
  launch(args.op, y, [&](const cuda::Kernels& kernels, cuda::Stream stream) {
    return kernels.max_pool2d(dtype_of(x), x.const_data_ptr(), y.mutable_data_ptr(), arg, p,
                              stream);
  });
}

Two max_pool2d_forward_cuda(const Tensor& input, IntArrayRef window, bool ceil_mode) {
  auto [y, argmax] = max_pool2d_forward_meta(input, window, ceil_mode);
  max_pool2d_out_cuda({"max_pool2d_forward", window, ceil_mode}, input, y, argmax);
  return {y, argmax};
}

Tensor max_pool2d_indices_cuda(const Tensor& argmax, SymIntArrayRef input_size, IntArrayRef window,
                               bool ceil_mode) {
  Tensor indices = max_pool2d_indices_meta(argmax, input_size, window, ceil_mode);
  const Tensor a = argmax.contiguous(indices.suggest_memory_format());
  const cuda::Pool p = cuda_view({"max_pool2d_indices", window, ceil_mode}, input_size, indices);
  launch("max_pool2d_indices", a, [&](const cuda::Kernels& kernels, cuda::Stream stream) {
    return kernels.max_pool2d_indices(a.const_data_ptr<uint8_t>(),
                                      indices.mutable_data_ptr<int64_t>(), p, stream);
  });
  return indices;
}

template <bool kIndices>
Result<kIndices> max_pool2d_cuda(const Args& args, const Tensor& input) {
  if (!ours(args, input)) return max_pool2d_torch<kIndices>(args, input);
  Tensor y = new_output(args, input, input.scalar_type());
  Tensor argmax = kIndices ? new_output(args, input, at::kByte) : Tensor();
  max_pool2d_out_cuda(args, input, y, argmax);
  if constexpr (kIndices)
    return {y, max_pool2d_indices_cuda(argmax, plane(input), args.window, args.ceil_mode)};
  else
    return y;
}

Tensor max_pool2d_backward_cuda(const Tensor& grad_y, const Tensor& argmax,
                                SymIntArrayRef input_size, IntArrayRef window, bool ceil_mode) {
  const Tensor grad_x = max_pool2d_backward_meta(grad_y, argmax, input_size, window, ceil_mode);
  max_pool2d_backward_stats.kernel_ran();
  const auto layout = argmax.suggest_memory_format();
  const Tensor g = grad_y.contiguous(layout), a = argmax.contiguous(layout);
  const cuda::Pool p = cuda_view({"max_pool2d_backward", window, ceil_mode}, input_size, a);
  launch("max_pool2d_backward", g, [&](const cuda::Kernels& kernels, cuda::Stream stream) {
    return kernels.max_pool2d_backward(dtype_of(g), g.const_data_ptr(), a.const_data_ptr<uint8_t>(),
                                       grad_x.mutable_data_ptr(), p, stream);
  });
  return grad_x;
}

// ---- gradient -----------------------------------------------------------------------------

template <bool kIndices>
struct MaxPool2dFunction : Function<MaxPool2dFunction<kIndices>> {
  static constexpr const char* kNode = "MaxPool2dBackward";

  static Result<kIndices> forward(AutogradContext* ctx, const Tensor& input, const Args& args) {
    static const BelowAutograd<MaxPool2dForward> op("dlkernels::max_pool2d_forward");
    static const BelowAutograd<MaxPool2dIndices> indices_op("dlkernels::max_pool2d_indices");
    const auto [y, argmax] = op(input, args.window, args.ceil_mode);
    ctx->save_for_backward({argmax});
    ctx->saved_data["input_size"] = plane(input);
    ctx->saved_data["window"] = IntArrayRef(args.window);
    ctx->saved_data["ceil_mode"] = args.ceil_mode;
    if constexpr (kIndices)
      return {y, indices_op(argmax, plane(input), args.window, args.ceil_mode)};
    else
      return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const BelowAutograd<MaxPool2dBackward> op("dlkernels::max_pool2d_backward");
    static const BelowAutograd<MaxPool2dIndices> indices_op("dlkernels::max_pool2d_indices");
    const Tensor &grad_y = grads[0], argmax = ctx->get_saved_variables()[0];
    const auto input_size = ctx->saved_data["input_size"].toSymIntVector();
    const auto window = ctx->saved_data["window"].toIntVector();
    const bool ceil_mode = ctx->saved_data["ceil_mode"].toBool();
    if (!is_differentiated(grad_y, max_pool2d_backward_stats))
      return {op(grad_y, argmax, input_size, window, ceil_mode), Tensor()};
    // Differentiable in grad_y: PyTorch's scatter to the indices. -1 is nowhere. And in the input,
    // which has gradients of 0.
    const Tensor indices = indices_op(argmax, input_size, window, ceil_mode).flatten(-2);
    c10::SymDimVector sizes(argmax.sym_sizes().begin(), argmax.sym_sizes().end());
    std::copy(input_size.begin(), input_size.end(), sizes.end() - 2);
    const Tensor input = in_place_of_input(0, at::empty_symint(sizes, grad_y.options()));
    const Tensor grad_x =
        at::fill(input, 0)
            .flatten(-2)
            .scatter_add(-1, indices.clamp_min(0), grad_y.flatten(-2).masked_fill(indices.lt(0), 0))
            .unflatten_symint(-1, input_size);
    return {grad_x.contiguous(argmax.suggest_memory_format()), Tensor()};
  }
};

template <bool kIndices>
Result<kIndices> max_pool2d_autograd(const Args& args, const Tensor& input) {
  static const BelowAutograd<MaxPool2d<kIndices>> op(kIndices ? "dlkernels::max_pool2d_with_indices"
                                                              : "dlkernels::max_pool2d");
  if (!ours(args, input)) return max_pool2d_torch<kIndices>(args, input);
  if (!any_requires_grad(input)) {  // then no argmax is kept
    const auto sym = [&](int at) { return c10::fromIntArrayRefSlow(args.pair(at)); };
    return op(input, sym(0), sym(2), sym(4), sym(6), args.ceil_mode);
  }
  return MaxPool2dFunction<kIndices>::apply(input, args);
}

const bool torch_paths =
    (register_torch_path("max_pool2d", called<false, max_pool2d_torch<false>>),
     register_torch_path("max_pool2d_with_indices", called<true, max_pool2d_torch<true>>), true);

}  // namespace

TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("max_pool2d", called<false, max_pool2d_cpu<false>>);
  m.impl("max_pool2d_with_indices", called<true, max_pool2d_cpu<true>>);
  m.impl("max_pool2d_forward", max_pool2d_forward_cpu);
  m.impl("max_pool2d_indices", max_pool2d_indices_cpu);
  m.impl("max_pool2d_backward", max_pool2d_backward_cpu);
}
TORCH_LIBRARY_IMPL(dlkernels, CUDA, m) {
  m.impl("max_pool2d", called<false, max_pool2d_cuda<false>>);
  m.impl("max_pool2d_with_indices", called<true, max_pool2d_cuda<true>>);
  m.impl("max_pool2d_forward", max_pool2d_forward_cuda);
  m.impl("max_pool2d_indices", max_pool2d_indices_cuda);
  m.impl("max_pool2d_backward", max_pool2d_backward_cuda);
}
TORCH_LIBRARY_IMPL(dlkernels, Meta, m) {
  m.impl("max_pool2d", called<false, max_pool2d_meta<false>>);
  m.impl("max_pool2d_with_indices", called<true, max_pool2d_meta<true>>);
  m.impl("max_pool2d_forward", max_pool2d_forward_meta);
  m.impl("max_pool2d_indices", max_pool2d_indices_meta);
  m.impl("max_pool2d_backward", max_pool2d_backward_meta);
}
TORCH_LIBRARY_IMPL(dlkernels, Autograd, m) {
  m.impl("max_pool2d", called<false, max_pool2d_autograd<false>>);
  m.impl("max_pool2d_with_indices", called<true, max_pool2d_autograd<true>>);
}

}  // namespace dlkernels
