// Loads _C_cuda, and asks PyTorch for its streams: neither needs a CUDA header.
#include "ops/core/torch_headers.h"

#include "ops/core/cuda.h"

#include <dlfcn.h>

namespace dlkernels {

namespace {

// From PyTorch's C interface for compiled models, which is stable across releases.
using GetCurrentStream = int32_t(int32_t device, void** stream);
GetCurrentStream* get_current_stream = nullptr;

}  // namespace

void load_cuda(const std::string& path) {
  get_current_stream = reinterpret_cast<GetCurrentStream*>(
      dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  TORCH_CHECK(get_current_stream, "the running PyTorch is not a CUDA build");
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(library, dlerror());
  const auto table =
      reinterpret_cast<decltype(&dlkernels_cuda_kernels)>(dlsym(library, "dlkernels_cuda_kernels"));
  TORCH_CHECK(table, path, " is not a library of dlkernels");
  cuda_kernels = table();
}

cuda::Stream current_stream(c10::DeviceIndex device) {
  void* stream = nullptr;
  TORCH_CHECK(get_current_stream(device, &stream) == 0, "no current stream on cuda:", device);
  return stream;
}

}  // namespace dlkernels
