// Which tensors the kernels take; PyTorch's own ops take the rest.
#pragma once
#include "ops/core/torch_headers.h"

#include "cpu/kernels.h"
#include "ops/core/cuda.h"
#include "ops/core/stats.h"

namespace dlkernels {

// A CUDA tensor without CUDA kernels: reported once, or an error after set_fallback("error").
inline void report_no_cuda() {
  TORCH_CHECK_NOT_IMPLEMENTED(!fallback_is_error, "dlkernels: no CUDA kernels: ", cuda_reason);
  TORCH_WARN_ONCE("dlkernels leaves CUDA tensors to PyTorch's own ops: ", cuda_reason);
}

// The dtypes that the CPU's GEMM kernels convert to float32 on loading. Not bfloat16 where the
// processor multiplies it: there PyTorch takes 0.6 of the time of our float32.
inline bool is_reduced_float(at::ScalarType type) {
  return type == at::kHalf || (type == at::kBFloat16 && !cpu::multiplies_bfloat16());
}

// Dense float32 on the CPU, or a reduced float there if that is asked for; bfloat16 and float16 too
// on CUDA, and on meta, where only shapes are worked out.
inline bool is_dense(const Tensor& t, bool or_reduced) {
  if (t.layout() != at::kStrided || t.is_nested()) return false;
  const c10::Device device = t.device();
  if (device.is_cpu())
    return t.scalar_type() == at::kFloat || (or_reduced && is_reduced_float(t.scalar_type()));
  if (!has_cuda_dtype(t.scalar_type())) return false;
  if (device.is_cuda() && !cuda_kernels.load(std::memory_order_relaxed))
    return report_no_cuda(), false;
  return device.is_cuda() || device.is_meta();
}
inline bool is_plain(const Tensor& t) { return is_dense(t, /*or_reduced=*/false); }

// A tensor with a forward-mode tangent goes to PyTorch's own op, which can push it forward.
inline bool is_supported(const Tensor& t, bool or_reduced = false) {
  return is_dense(t, or_reduced) && !t._fw_grad(/*level=*/0).defined();
}
inline bool is_supported(const optional<Tensor>& t, bool or_reduced = false) {
  return !t || is_supported(*t, or_reduced);
}

constexpr const char* kSupportedDTypes = "float32 (on CUDA also bfloat16 or float16)";

inline bool same_dtype(const Tensor& a, const optional<Tensor>& b) {
  return !b || a.scalar_type() == b->scalar_type();
}

// Tensors for linear layers and convolutions, all of one dtype.
template <class... Others>
bool has_gemm_kernel(const Tensor& first, const Others&... others) {
  return is_supported(first, /*or_reduced=*/true) &&
         ((is_supported(others, /*or_reduced=*/true) && same_dtype(first, others)) && ...) &&
         has_gemm_kernels(first.device());
}
constexpr const char* kGemmDTypes =
    "float32, float16 or bfloat16 (not on a CPU that multiplies it) and of one dtype";

// PyTorch itself reads garbage when a CPU op is handed a weight on meta.
inline void check_device(const char* op, const Tensor& input, const optional<Tensor>& other) {
  TORCH_CHECK(!other || !other->defined() || other->device() == input.device(), op,
              ": expected all tensors to be on the same device, got ", input.device(), " and ",
              other->device());
}

}  // namespace dlkernels
