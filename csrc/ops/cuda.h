// The CUDA kernels as the ops see them. They are a library of their own, _C_cuda, which knows no
// torch and which this one loads where the running PyTorch is a CUDA build.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include <array>
#include <atomic>
#include <string>

#include "../cuda/kernels.h"

namespace dlkernels {

using at::Tensor;

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

// The kernels are built for tensor cores that know bfloat16 and for asynchronous copies.
inline void check_capability(const char* op, c10::Device device, const cuda::Kernels& kernels) {
  static std::array<std::atomic<int>, 256> known{};  // it costs a call of the driver
  std::atomic<int>& capability = known[static_cast<uint8_t>(device.index())];
  if (capability == 0) capability = kernels.capability(device.index());
  TORCH_CHECK(capability >= 80, op, ": the CUDA kernels of dlkernels need compute capability 8.0 ",
              "or later, ", device, " has ", capability / 10, ".", capability % 10);
}

// f(kernels, stream) with the device of `t` and its current stream; what it returns is an error.
template <class F>
void launch(const char* op, const Tensor& t, const F& f) {
  const cuda::Kernels& kernels = *cuda_kernels.load(std::memory_order_relaxed);
  check_capability(op, t.device(), kernels);
  const c10::DeviceGuard guard(t.device());
  const cuda::Error error = f(kernels, current_stream(t.device().index()));
  TORCH_CHECK(error == 0, op, ": CUDA error ", error, ": ", kernels.error_string(error));
}

}  // namespace dlkernels
