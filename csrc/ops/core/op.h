// The frame of an op: its registration, the path that a call takes, and what is counted.
#pragma once
#include "ops/core/torch_headers.h"

#include <string>
#include <tuple>
#include <vector>

#include "ops/core/autograd_function.h"
#include "ops/core/eligibility.h"
#include "ops/core/memory.h"
#include "ops/core/parallel.h"

namespace dlkernels {

using TensorPair = std::tuple<Tensor, Tensor>;

// The typed handle of one of our ops, looked up once by the caller's static.
template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((std::string("dlkernels::") + name).c_str(), "")
      .typed<Signature>();
}

inline Tensor or_undefined(const optional<Tensor>& t) { return t ? *t : Tensor(); }
inline optional<Tensor> or_nullopt(const Tensor& t) {
  return t.defined() ? optional(t) : std::nullopt;
}

// ---- autocast -------------------------------------------------------------------------------

// What an op gets in a region of torch.autocast, as PyTorch's own: its tensors as they are, in the
// region's dtype, or (on CUDA) in float32.
enum class Autocast { kNone, kLower, kFloat32 };

template <c10::DeviceType kDevice, bool kLower>
void cast_and_call(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  const at::ScalarType type = kLower ? at::autocast::get_autocast_dtype(kDevice) : at::kFloat;
  const auto cast = [&](const Tensor& t) { return at::autocast::cached_cast(type, t, kDevice); };
  for (size_t i = stack->size() - op.schema().arguments().size(); i < stack->size(); ++i) {
    at::IValue& value = (*stack)[i];
    if (value.isTensor()) value = cast(value.toTensor());
    if (value.isTensorList()) {
      std::vector<Tensor> tensors = value.toTensorVector();
      for (Tensor& t : tensors) t = cast(t);
      value = std::move(tensors);
    }
  }
  op.callBoxed(stack);
}

// ---- the frame ------------------------------------------------------------------------------

inline void advise_all(const Tensor& t) {
  if (t.defined()) advise_huge_pages(t);
}
inline void advise_all(const std::vector<Tensor>& tensors) {
  for (const Tensor& t : tensors) advise_all(t);
}
template <class... Tensors>
void advise_all(const std::tuple<Tensors...>& tensors) {
  std::apply([](const auto&... t) { (advise_all(t), ...); }, tensors);
}

inline bool is_cuda(const Tensor& t) { return t.is_cuda(); }
template <class T>
bool is_cuda(const T&) {
  return false;
}

enum class Device { kCPU, kCUDA };

// The base class of an op T. Signature is the schema as a C++ function type. T has
//   kName, kSchema   "relu", "(Tensor input) -> Tensor"
//   Args             a struct of the arguments, in the schema's order
//   stats            where calls are counted; may be another op's, or missing
//   meta(args)       checks the arguments and allocates the result: shapes in SymInt, for every
//                    device and for torch.compile
//   cpu(out, args), cuda(out, args)   fill what meta allocated; or
//   cpu(args), cuda(args)             return the result of another op
// An op without cuda has no CUDA kernel. A public op, which PyTorch has too, also has
//   has_kernel(args)   whether the kernels take these arguments
//   aten(args)         PyTorch's own op, which runs where they do not, under the transforms of
//                      torch.func, and under autocast on the CPU unless kAutocast is kLower
//   kAutocast, kIsGemm (see OpSupport)
// and its gradient:
//   kNode, Backward               the node's name, and the op that computes the gradient
//   forward(ctx, args)            saves what backward needs, and returns the result
//   backward(ctx, grad_y)         a gradient for each argument; those at the end may be left out
//   double_backward(ctx, grad_y)  the same by PyTorch's ops, which autograd differentiates again
// or record(args), which calls Gradient<T>::apply or other ops.
template <class T, class Signature>
struct Op;

template <class T, class Result, class... Inputs>
struct Op<T, Result(Inputs...)> {
  static constexpr size_t kArgs = sizeof...(Inputs);

  // For nodes, and where no gradient is wanted: nothing is recorded.
  static Result call_below_autograd(Inputs... inputs) {
    static const auto op = find_op<Result(Inputs...)>(T::kName);
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return op.call(std::forward<Inputs>(inputs)...);
  }

  // The result of the kernel, counted.
  template <Device kDevice, class Args>
  static Result compute(const Args& args) {
    Result out = T::meta(args);
    if constexpr (requires { T::stats; }) T::stats.kernel_ran();
    if constexpr (kDevice == Device::kCUDA) {
      T::cuda(out, args);
    } else {
      advise_all(out);
      T::cpu(out, args);
    }
    return out;
  }

  // The result of PyTorch's op, counted.
  template <class Args>
  static Result aten_result(const Args& args) {
    T::stats.aten_ran();
    return T::aten(args);
  }

  static void register_in(torch::Library& library) {
    library.def((std::string(T::kName) + T::kSchema).c_str());
    const auto impl = [&](c10::DispatchKey key, auto&& f) {
      library.impl(T::kName, torch::dispatch(key, std::forward<decltype(f)>(f)));
    };
    using enum c10::DispatchKey;
    impl(Meta, on_meta);
    impl(CPU, on_device<Device::kCPU>);
    if constexpr (has_cuda()) impl(CUDA, on_device<Device::kCUDA>);
    if constexpr (is_public()) {
      using torch::CppFunction;
      static const OpSupport support(T::kName, has_cuda(), T::kIsGemm);
      impl(Autograd, on_autograd);
      impl(CompositeExplicitAutograd, on_aten);
      impl(FuncTorchDynamicLayerFrontMode, on_aten);
      constexpr bool kLower = T::kAutocast == Autocast::kLower;
      if constexpr (kLower)
        impl(AutocastCPU, CppFunction::makeFromBoxedFunction<&cast_and_call<at::kCPU, true>>());
      else
        impl(AutocastCPU, on_aten);
      if constexpr (T::kAutocast != Autocast::kNone)
        impl(AutocastCUDA, CppFunction::makeFromBoxedFunction<&cast_and_call<at::kCUDA, kLower>>());
    }
  }

 private:
  static auto arguments(const Inputs&... inputs) { return typename T::Args{inputs...}; }

  static consteval bool is_public() {
    return requires(const typename T::Args& args) { T::has_kernel(args); };
  }
  static consteval bool has_cuda() {
    return requires(const typename T::Args& args) { T::cuda(args); } ||
           requires(Result& out, const typename T::Args& args) { T::cuda(out, args); };
  }
  static bool is_supported_call(const auto& args, const Inputs&... inputs) {
    if constexpr (!has_cuda())
      if ((is_cuda(inputs) || ...)) return false;
    return T::has_kernel(args);
  }

  static Result on_meta(Inputs... inputs) { return T::meta(arguments(inputs...)); }
  static Result on_aten(Inputs... inputs) { return aten_result(arguments(inputs...)); }

  template <Device kDevice>
  static Result on_device(Inputs... inputs) {
    const auto args = arguments(inputs...);
    if constexpr (is_public())
      if (!T::has_kernel(args)) return aten_result(args);
    if constexpr (kDevice == Device::kCPU && requires { T::cpu(args); })
      return T::cpu(args);
    else if constexpr (kDevice == Device::kCUDA && requires { T::cuda(args); })
      return T::cuda(args);
    else
      return compute<kDevice>(args);
  }

  static Result on_autograd(Inputs... inputs) {
    const auto args = arguments(inputs...);
    if (!is_supported_call(args, inputs...)) return aten_result(args);
    if (!any_requires_grad(inputs...)) return call_below_autograd(inputs...);
    if constexpr (requires { T::record(args); })
      return T::record(args);
    else
      return Gradient<T>::apply(args, inputs...);
  }
};

template <class... Ops>
void register_ops(torch::Library& library) {
  (Ops::register_in(library), ...);
}

}  // namespace dlkernels
