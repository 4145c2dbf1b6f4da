// Which path each op took: what dlkernels.stats() reports.
#pragma once
#include "ops/core/torch_headers.h"

#include <atomic>

namespace dlkernels {

// Set by dlkernels.set_fallback("error").
inline std::atomic<bool> fallback_is_error{false};

// The counters of one op, listed for stats().
class OpStats {
 public:
  explicit OpStats(const char* name) : name(name), next(first) { first = this; }

  void kernel_ran() { ++kernel; }
  void aten_ran() {
    TORCH_CHECK_NOT_IMPLEMENTED(!fallback_is_error, name,
                                ": dlkernels has no kernel for these arguments, and the fallback "
                                "to PyTorch is set to \"error\" (dlkernels.set_fallback)");
    ++aten;
  }

  const char* const name;
  std::atomic<int64_t> kernel{0}, aten{0};
  OpStats* const next;
  inline static OpStats* first = nullptr;
};

// Where a public op has kernels, listed for info().
struct OpSupport {
  OpSupport(const char* name, bool cuda, bool gemm)
      : name(name), cuda(cuda), gemm(gemm), next(first) {
    first = this;
  }

  const char* const name;
  const bool cuda;  // a CUDA kernel
  const bool gemm;  // reduced floats on the CPU too; on CUDA from compute capability 8.0 on
  const OpSupport* const next;
  inline static const OpSupport* first = nullptr;
};

}  // namespace dlkernels
