// What every op file shares: which tensors are ours, what is counted, how work is split among
// torch's threads, scratch memory, and what is registered for an op.
#pragma once
#include "ops/torch_headers.h"

#include <omp.h>
#include <pthread.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "../cpu/kernels.h"
#include "cuda.h"

namespace dlkernels {

using at::Tensor;
using std::optional;

// ---- which path ran: what dlkernels.stats() reports -----------------------------------------

// Set by dlkernels.set_fallback("error").
inline std::atomic<bool> fallback_is_error{false};

// One a public op, listed for stats().
class OpStats {
 public:
  explicit OpStats(const char* name) : name(name), next(first) { first = this; }

  void kernel_ran() { ++kernel; }
  void torch_ran() {
    TORCH_CHECK_NOT_IMPLEMENTED(
        !fallback_is_error, name,
        ": these arguments have no kernel of ours (see CONTRIBUTING, fast path), and the fallback "
        "to PyTorch is set to \"error\"");
    ++torch;
  }

  const char* const name;
  std::atomic<int64_t> kernel{0}, torch{0};
  OpStats* const next;
  inline static OpStats* first = nullptr;
};

// ---- which tensors are ours -----------------------------------------------------------------

// A CUDA tensor that we have no kernels for: said once, or an error where that was asked for.
inline void no_cuda() {
  TORCH_CHECK_NOT_IMPLEMENTED(!fallback_is_error, "dlkernels: no CUDA kernels: ", cuda_reason);
  TORCH_WARN_ONCE("dlkernels leaves CUDA tensors to PyTorch's own ops: ", cuda_reason);
}

// Where the processor multiplies bfloat16, PyTorch takes 0.6 of the time of our float32.
inline bool is_narrow(at::ScalarType type) {
  return type == at::kHalf || (type == at::kBFloat16 && !cpu::multiplies_bfloat16());
}

// Dense float32 on the CPU, or `narrow` there if that is asked for; bfloat16 and float16 too on
// CUDA, and on meta, where only shapes are worked out.
inline bool is_dense(const Tensor& t, bool or_narrow) {
  if (t.layout() != at::kStrided || t.is_nested()) return false;
  const c10::Device device = t.device();
  if (device.is_cpu())
    return t.scalar_type() == at::kFloat || (or_narrow && is_narrow(t.scalar_type()));
  if (!has_cuda_dtype(t.scalar_type())) return false;
  if (device.is_cuda() && !cuda_kernels.load(std::memory_order_relaxed)) return no_cuda(), false;
  return device.is_cuda() || device.is_meta();
}
inline bool is_plain(const Tensor& t) { return is_dense(t, /*or_narrow=*/false); }
// A tensor with a forward-mode tangent goes to PyTorch's own op, which can push it forward.
inline bool is_ours(const Tensor& t, bool or_narrow = false) {
  return is_dense(t, or_narrow) && !t._fw_grad(/*level=*/0).defined();
}
inline bool is_ours(const optional<Tensor>& t, bool or_narrow = false) {
  return !t || is_ours(*t, or_narrow);
}

constexpr const char* kOurDTypes = "float32 (on CUDA bfloat16 or float16 too)";  // for messages

// The kernels take tensors of one dtype.
inline bool same_dtype(const Tensor& a, const optional<Tensor>& b) {
  return !b || a.scalar_type() == b->scalar_type();
}

// Tensors that linear layers and convolutions take, all of one dtype: their kernels widen bfloat16
// and float16 on the CPU, too.
template <class... Others>
bool are_for_products(const Tensor& first, const Others&... others) {
  return is_ours(first, /*or_narrow=*/true) &&
         ((is_ours(others, /*or_narrow=*/true) && same_dtype(first, others)) && ...) &&
         has_products(first.device());
}
constexpr const char* kProductDTypes =
    "float32, float16 or bfloat16 (not on a CPU that multiplies it) and of one dtype";

// PyTorch itself reads garbage when a CPU op is handed a weight on meta.
inline void check_device(const char* op, const Tensor& input, const optional<Tensor>& other) {
  TORCH_CHECK(!other || !other->defined() || other->device() == input.device(), op,
              ": expected all tensors to be on the same device, got ", input.device(), " and ",
              other->device());
}

// A vector as the kernels read it: bias and its sums are float32, whatever the op's dtype.
inline Tensor widened(const Tensor& t) {
  return t.scalar_type() == at::kFloat ? t.contiguous() : t.to(at::kFloat).contiguous();
}
// Memory for what is to be rounded to t, which is t itself where that is float32.
inline Tensor widened_empty(const Tensor& t) {
  return t.scalar_type() == at::kFloat ? t : at::empty_like(t, at::kFloat);
}

// ---- which algorithm a convolution may use --------------------------------------------------

// Set by dlkernels.set_precision("ieee"): only what is as exact as direct summation.
inline std::atomic<bool> precision_is_ieee{false};

// What DLKERNELS_CONV forces where it can run, for tests; its words in this order.
enum class ConvAlgorithm { kAny, kDirect, kWinograd2, kWinograd4 };
constexpr const char* kConvAlgorithms[] = {"", "direct", "winograd2", "winograd4"};

inline ConvAlgorithm find_conv_algorithm(const char* name) {
  for (int i = 0; i < 4; ++i)
    if (name && !std::strcmp(name, kConvAlgorithms[i])) return static_cast<ConvAlgorithm>(i);
  return ConvAlgorithm::kAny;  // the package refuses other words at import
}

inline std::atomic<ConvAlgorithm> forced_conv_algorithm{
    find_conv_algorithm(std::getenv("DLKERNELS_CONV"))};
inline ConvAlgorithm conv_algorithm() {
  return forced_conv_algorithm.load(std::memory_order_relaxed);
}

// ---- threads and memory ---------------------------------------------------------------------

// A new tensor of 32 MB or more, for which malloc maps fresh pages each time: huge ones took a
// cross-entropy of 2048x32000 from 49 ms to 26. Smaller memory is mostly used again.
inline Tensor huge(Tensor t) {
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  if (t.is_cpu() && t.nbytes() >= 16 * kHuge) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
    const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, end = begin + t.nbytes();
    madvise(reinterpret_cast<void*>(first), (end - first) / kHuge * kHuge, MADV_HUGEPAGE);
  }
  return t;
}

// 64-byte aligned floats that belong to the calling thread, until its next call.
inline float* scratch(int64_t floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<float, Free> buffer;
  thread_local int64_t size = 0;
  if (size < floats) {
    buffer.reset();
    size = 0;
    const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
    buffer.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (!buffer) throw std::bad_alloc();
    size = floats;
  }
  return buffer.get();
}

// A fork copies no thread but its own, and GNU OpenMP would wait for the forking thread's others
// forever. So they are ended before, and parent and child start new ones when they need them. Where
// they can't be (inside a parallel region, or it is another OpenMP), the child's ops run on the
// thread that is left.
#pragma weak omp_pause_resource_all
inline thread_local bool keeps_threads = false;
inline std::atomic<bool> lost_threads{false};
inline const int watches_forks = pthread_atfork(
    [] { keeps_threads = !omp_pause_resource_all || omp_pause_resource_all(omp_pause_hard) != 0; },
    nullptr,
    [] {
      if (keeps_threads) lost_threads = true;
    });

// f(begin, end) over [0, n), in chunks. A thread takes the chunks of its own share in order, so
// that it meets the same memory in one op after the other, and then what is left of the others':
// one that the system holds up does not hold up the rest. Less than `grain`, about 20 us of work,
// is not worth a fork.
template <class F>
void parallel_chunks(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), (n + grain - 1) / grain);
  if (threads <= 1 || at::in_parallel_region() || lost_threads) return f(int64_t{0}, n);
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t chunk = std::max<int64_t>(1, grain / 4), chunks = (n + chunk - 1) / chunk;
  std::vector<Share> shares(threads);
  for (int64_t i = 0; i < threads; ++i) {
    shares[i].next = chunks * i / threads;
    shares[i].end = chunks * (i + 1) / threads;
  }
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end + threads - 1; ++i) {
      Share& share = shares[i % threads];
      for (int64_t c; (c = share.next++) < share.end;) f(c * chunk, std::min(n, (c + 1) * chunk));
    }
  });
}

// ---- the dispatcher -------------------------------------------------------------------------

// The typed handle of one of our ops, looked up once by the caller's static.
template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Under torch.autocast an op gets its tensors as PyTorch's own would: in the region's dtype, or in
// float32. Ops with neither take them as they are.
template <c10::DeviceType kDevice, bool kLower>
void autocast(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
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

template <bool kLower>
void register_autocast_cuda(torch::Library& library, const char* op) {
  library.impl(op, torch::CppFunction::makeFromBoxedFunction<&autocast<at::kCUDA, kLower>>());
}
inline void register_autocast_cpu(torch::Library& library, const char* op) {
  library.impl(op, torch::CppFunction::makeFromBoxedFunction<&autocast<at::kCPU, true>>());
}

// "dlkernels::<op>" runs PyTorch's own ops (`torch_path`, built from at:: functions) where ours
// have no say: on other devices, under the transforms of torch.func, and under autocast on the CPU
// unless that is registered for itself.
template <class F>
void register_torch_path(const char* op, F* torch_path, bool on_autocast_cpu = true) {
  static std::vector<std::unique_ptr<torch::Library>> libraries;  // live as long as the process
  for (const auto key : {c10::DispatchKey::CompositeExplicitAutograd, c10::DispatchKey::AutocastCPU,
                         c10::DispatchKey::FuncTorchDynamicLayerFrontMode}) {
    if (key == c10::DispatchKey::AutocastCPU && !on_autocast_cpu) continue;
    libraries.push_back(std::make_unique<torch::Library>(torch::Library::IMPL, "dlkernels", key,
                                                         __FILE__, __LINE__));
    libraries.back()->impl(op, torch_path);
  }
}

}  // namespace dlkernels
