// The frame of the optimizers' in-place ops: lists of tensors, checks, version counters, and one
// parallel loop over all elements. An optimizer adds its arithmetic: see sgd.cpp.
#pragma once
#include <ATen/ScalarOps.h>

#include <algorithm>
#include <array>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

#include "ops/core/op.h"

namespace dlkernels {

// ---- the lists of a call --------------------------------------------------------------------

// The tensors of a call, list by list: params, grads, the states, and state_steps last where the
// optimizer counts steps. An option's list is empty where the option is off.
struct OptimLists {
  struct List {
    const char* name;
    at::TensorList tensors;
    bool wanted, written, scalars;
  };
  const char* op;
  std::vector<List> lists;
  const optional<Tensor>&grad_scale, &found_inf, &device_lr;

  at::TensorList params() const { return lists[0].tensors; }
  at::TensorList grads() const { return lists[1].tensors; }

  // Whether a predicate holds for every tensor of the call.
  template <class Is>
  bool all(const Is& is) const {
    for (const List& list : lists)
      for (const Tensor& t : list.tensors)
        if (!is(t)) return false;
    return (!grad_scale || is(*grad_scale)) && (!found_inf || is(*found_inf)) &&
           (!device_lr || is(*device_lr));
  }
};

// Everything that must hold, before anything is written.
void check_lists(const OptimLists& a);

// Tensors that require grad must not be written while autograd records.
void check_no_grad(const OptimLists& a);

// Whether each parameter is one run of memory, no two of them the same, and its gradient and states
// have its strides: then a kernel may take them as they are, at once and in any order.
bool have_layout_of_params(const OptimLists& a);

// A backward pass that saved any of these must notice (torch's own fused steps on the CPU forget).
void bump_versions(const OptimLists& a);

// ---- cpu ------------------------------------------------------------------------------------

// The tensors of a call as kernels take them: one run of memory each, in the order of the
// parameter. Other layouts are copied, and copied back where they are written.
class OptimRuns {
 public:
  OptimRuns(const OptimLists& a, bool maximize, double weight_decay);

  // f(tensor, index, begin, end) for the elements of all tensors. They are one long row that is
  // cut anywhere, so threads get equal shares however the sizes differ. Runs that share memory (a
  // parameter listed twice) are taken in order instead.
  template <class F>
  void step(const F& f) const {
    const bool alone = numel_ <= kGrain || at::get_num_threads() == 1 || overlap();
    parallel_chunks(numel_, alone ? numel_ : kGrain, [&](int64_t begin, int64_t end) {
      size_t i = std::upper_bound(starts_.begin(), starts_.end(), begin) - starts_.begin() - 1;
      for (; begin < end; ++i) {
        const int64_t start = starts_[i], stop = std::min(end, stop_of(i));
        f(tensors_[i], i, begin - start, stop - start);
        begin = stop;
      }
    });
    for (const auto& [original, copy] : back_) original.copy_(copy);
  }

 private:
  static constexpr int64_t kGrain = 32768;  // below, a fork costs more than it saves

  const float* read(const Tensor& order, const Tensor& t);
  float* written(const Tensor& order, const Tensor& t);
  bool overlap() const;
  int64_t stop_of(size_t i) const { return i + 1 < starts_.size() ? starts_[i + 1] : numel_; }

  std::vector<cpu::OptimTensor> tensors_;
  std::vector<int64_t> starts_;
  int64_t numel_ = 0;
  std::vector<Tensor> kept_;
  std::vector<std::pair<Tensor, Tensor>> back_;  // (original, copy)
};

// x times factor, as Python's mul_ does it: Tensor::mul_ of a number rounds that to x's dtype,
// which makes a bfloat16's 0.999 a 1.
inline const Tensor& scale_(const Tensor& x, double factor) {
  return x.mul_(at::native::wrapped_scalar_tensor(factor));
}

// ---- what optim_step.cpp calls --------------------------------------------------------------

// An optimizer's op by its name, for lists and scalars that come from Python.
struct OptimCall {
  using Call = void (*)(const std::vector<std::vector<Tensor>>& lists,
                        const std::vector<double>& scalars, const optional<Tensor>& device_lr,
                        const optional<Tensor>& grad_scale, const optional<Tensor>& found_inf);
  OptimCall(const char* name, Call call, bool cuda)
      : name(name), call(call), cuda(cuda), next(first) {
    first = this;
  }

  const char* const name;
  const Call call;
  const bool cuda;  // there is a kernel for it
  OptimCall* const next;
  inline static OptimCall* first = nullptr;
};

// ---- the op of an optimizer -----------------------------------------------------------------

template <size_t>
using TensorListArgument = at::TensorList;
using DeviceLr = const optional<Tensor>&;

// Optimizer is what the frame does not know, with the op's scalars as its fields, in their order:
//   kName, kLists   the op's and its lists' names
//   Scalars         std::tuple of the types of the fields: numbers, and after them DeviceLr where
//                   the learning rate may be a tensor, the field device_lr
//   kKernel         its member of cpu::Kernels
//   scalars(step)   what that takes, worked out in double
//   aten_step(param, grad, states, step)  PyTorch's own step, where there is no kernel
//   wants(list)     where it has options that need a list
//   step_cuda(lists)  where it has a CUDA kernel; false, with nothing done, for what that is not
//   for
template <class Optimizer, class = std::make_index_sequence<Optimizer::kLists.size()>,
          class = typename Optimizer::Scalars>
struct OptimOp;

template <class Optimizer, size_t... L, class... S>
struct OptimOp<Optimizer, std::index_sequence<L...>, std::tuple<S...>> {
  using Signature = void(TensorListArgument<L>..., S..., const optional<Tensor>&,
                         const optional<Tensor>&);
  static constexpr const char* kName = Optimizer::kName;
  static constexpr size_t kLists = sizeof...(L);
  static constexpr bool kCounts = Optimizer::kLists.back() == std::string_view("state_steps");
  static constexpr size_t kStates = kLists - 2 - kCounts;
  static constexpr bool kCuda =
      requires(const Optimizer& o, const OptimLists& a) { o.step_cuda(a); };
  static constexpr bool kDeviceLr = (std::is_same_v<S, DeviceLr> || ...);
  inline static OpStats stats{kName};

  static OptimLists gather(const Optimizer& o, TensorListArgument<L>... lists,
                           const optional<Tensor>& grad_scale, const optional<Tensor>& found_inf) {
    const auto wanted = [&](size_t list) {
      if constexpr (requires { o.wants(list); }) return o.wants(list);
      return true;
    };
    static const optional<Tensor> none;
    const optional<Tensor>* device_lr = &none;
    if constexpr (kDeviceLr) device_lr = &o.device_lr;
    return {kName,
            {{Optimizer::kLists[L], lists, wanted(L), L != 1 || grad_scale,
              kCounts && L == kLists - 1}...},
            grad_scale,
            found_inf,
            *device_lr};
  }

  // L2 weight decay, which is added to the gradient.
  static double weight_decay(const Optimizer& o) {
    if constexpr (requires { o.decoupled_weight_decay; })
      if (o.decoupled_weight_decay) return 0;
    return o.weight_decay;
  }

  static void meta(const Optimizer&, const OptimLists& a) {
    check_lists(a);
    bump_versions(a);
  }

  static void aten(const Optimizer& o, const OptimLists& a) {
    check_lists(a);
    if (a.params().empty()) return;
    stats.aten_ran();
    if (a.found_inf && a.found_inf->item<double>() != 0) return;
    for (size_t i = 0; i < a.params().size(); ++i) {
      const Tensor& p = a.params()[i];
      Tensor g = a.grads()[i];
      if (a.grad_scale) g.div_(a.grad_scale->reshape({}));
      if (o.maximize) g = g.neg();
      if (const double decay = weight_decay(o); decay != 0) g = g.add(p, decay);
      std::array<Tensor, kStates> states;
      for (size_t k = 0; k < kStates; ++k)
        if (a.lists[2 + k].wanted) states[k] = a.lists[2 + k].tensors[i];
      o.aten_step(p, g, states,
                  kCounts ? a.lists.back().tensors[i].add_(1).template item<double>() : 0);
    }
  }

  static void cpu(const Optimizer& o, const OptimLists& a) {
    check_lists(a);
    if (!a.all(is_plain)) return aten(o, a);  // tangents stop at autograd
    stats.kernel_ran();
    // torch asks for exactly 1, but sums the flag over devices.
    if (a.found_inf && *a.found_inf->const_data_ptr<float>() != 0) return;
    const OptimRuns runs(a, o.maximize, weight_decay(o));
    std::vector<decltype(o.scalars(0.0))> scalars;
    scalars.reserve(a.params().size());
    for (size_t i = 0; i < a.params().size(); ++i)
      scalars.push_back(
          o.scalars(kCounts ? *a.lists.back().tensors[i].mutable_data_ptr<float>() += 1 : 0));
    const auto kernel = cpu::kernels().*Optimizer::kKernel;
    runs.step([&](const cpu::OptimTensor& t, size_t i, int64_t begin, int64_t end) {
      kernel(t, scalars[i], begin, end);
    });
    bump_versions(a);
  }

  static void cuda(const Optimizer& o, const OptimLists& a) {
    check_lists(a);
    if constexpr (kCuda)
      if (a.all(is_plain) && have_layout_of_params(a) && o.step_cuda(a)) {
        stats.kernel_ran();
        return bump_versions(a);
      }
    aten(o, a);
  }

  template <void (*run)(const Optimizer&, const OptimLists&)>
  static void op(TensorListArgument<L>... lists, S... scalars, const optional<Tensor>& grad_scale,
                 const optional<Tensor>& found_inf) {
    const Optimizer o{scalars...};
    run(o, gather(o, lists..., grad_scale, found_inf));
  }

  static void redispatch(TensorListArgument<L>... lists, S... scalars,
                         const optional<Tensor>& grad_scale, const optional<Tensor>& found_inf) {
    static const auto op = find_op<Signature>(kName);
    op.call(lists..., scalars..., grad_scale, found_inf);
  }

  // There is no gradient.
  static void autograd(TensorListArgument<L>... lists, S... scalars,
                       const optional<Tensor>& grad_scale, const optional<Tensor>& found_inf) {
    const Optimizer o{scalars...};
    const OptimLists a = gather(o, lists..., grad_scale, found_inf);
    if (!a.all([](const Tensor& t) { return is_supported(t); })) return aten(o, a);
    check_no_grad(a);
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    redispatch(lists..., scalars..., grad_scale, found_inf);
  }

  static void from_python(const std::vector<std::vector<Tensor>>& lists,
                          const std::vector<double>& scalars, const optional<Tensor>& device_lr,
                          const optional<Tensor>& grad_scale, const optional<Tensor>& found_inf) {
    constexpr size_t kScalars = sizeof...(S) - kDeviceLr;
    TORCH_CHECK(lists.size() == kLists && scalars.size() == kScalars && (kDeviceLr || !device_lr),
                kName, ": expected ", kLists, " lists and ", kScalars, " scalars, got ",
                lists.size(), " and ", scalars.size(), device_lr ? ", and a tensor as lr" : "");
    const auto argument = [&]<class T>(std::type_identity<T>, size_t i) -> T {
      if constexpr (std::is_same_v<T, DeviceLr>)
        return device_lr;
      else
        return static_cast<T>(scalars[i]);
    };
    [&]<size_t... I>(std::index_sequence<I...>) {
      redispatch(lists[L]..., argument(std::type_identity<S>(), I)..., grad_scale, found_inf);
    }(std::index_sequence_for<S...>{});
  }

  // In the TORCH_LIBRARY_FRAGMENT that has the schema.
  static void register_in(torch::Library& m) {
    using c10::DispatchKey;
    const auto impl = [&](DispatchKey key, Signature* f) {
      m.impl(kName, torch::dispatch(key, f));
    };
    impl(DispatchKey::CPU, op<cpu>);
    impl(DispatchKey::CUDA, op<cuda>);
    impl(DispatchKey::Meta, op<meta>);
    impl(DispatchKey::Autograd, autograd);
    // Not register_torch_path: a step inside an autocast region still runs on the kernel, nothing
    // is cast.
    impl(DispatchKey::CompositeExplicitAutograd, op<aten>);
    impl(DispatchKey::FuncTorchDynamicLayerFrontMode, op<aten>);
    static const OpSupport support(kName, kCuda, /*gemm=*/false);
    static OptimCall call(kName, from_python, kCuda);
  }
};

}  // namespace dlkernels
