// The CUDA kernels as the ops see them. They are a library of their own, _C_cuda, which knows no
// torch and which this one loads where the running PyTorch is a CUDA build.
#pragma once
#include "ops/core/torch_headers.h"

#include <array>
#include <atomic>
#include <string>

#include "cuda/kernels.h"

namespace dlkernels {

// nullptr until load_cuda, and for ever where there are none; then cuda_reason says why.
inline std::atomic<const cuda::Kernels*> cuda_kernels{nullptr};
inline std::string cuda_reason = "not loaded";

// Opens the library at `path`; throws where that fails.
void load_cuda(const std::string& path);

// The stream that is current on a device (defined by PyTorch's stable C interface).
cuda::Stream current_stream(c10::DeviceIndex device);

inline bool has_cuda_dtype(at::ScalarType type) {
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

inline DType dtype_of(at::ScalarType type) {
  return type == at::kFloat      ? DType::kFloat32
         : type == at::kBFloat16 ? DType::kBFloat16
                                 : DType::kFloat16;
}
inline DType dtype_of(const Tensor& t) { return dtype_of(t.scalar_type()); }

// A device's compute capability, as 90; 0 where it cannot be told, as there is no GPU. It is kept,
// because it costs a call of the driver.
inline std::atomic<int>& capability(c10::DeviceIndex device) {
  static std::array<std::atomic<int>, 256> known{};
  std::atomic<int>& capability = known[static_cast<uint8_t>(device)];
  if (const cuda::Kernels* kernels = cuda_kernels; kernels && capability == 0)
    capability = kernels->capability(device);
  return capability;
}

// Whether a device has GEMM kernels. They need tensor cores for bfloat16 and asynchronous copies.
// On older devices PyTorch's ops run, which is reported once.
inline bool has_gemm_kernels(c10::Device device) {
  if (!device.is_cuda()) return true;
  const int found = capability(device.index());
  if (found == 0 || found >= 80) return true;
  TORCH_WARN_ONCE("dlkernels leaves products of matrices and convolutions to PyTorch's own ops on ",
                  device, ": they need compute capability 8.0, it has ", found / 10, ".",
                  found % 10);
  return false;
}

// f(kernels, stream) with the device of `t` and its current stream; what it returns is an error.
template <class F>
void launch(const char* op, const Tensor& t, const F& f) {
  const cuda::Kernels& kernels = *cuda_kernels.load(std::memory_order_relaxed);
  const int found = capability(t.device().index());
  TORCH_CHECK(found >= 75, op, ": the CUDA kernels of dlkernels need compute capability 7.5 or ",
              "later, ", t.device(), " has ", found / 10, ".", found % 10);
  const c10::DeviceGuard guard(t.device());
  const cuda::Error error = f(kernels, current_stream(t.device().index()));
  TORCH_CHECK(error == 0, op, ": CUDA error ", error, ": ", kernels.error_string(error));
}

}  // namespace dlkernels
