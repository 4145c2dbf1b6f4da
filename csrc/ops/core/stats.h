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

}  // namespace dlkernels
