// Which algorithms convolutions may use: settings of the process.
#pragma once
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

namespace dlkernels {

// Set by dlkernels.set_precision("ieee"): direct summation only (no Winograd).
inline std::atomic<bool> precision_is_ieee{false};

// What DLKERNELS_CONV says, in the order of Conv2dForce.
constexpr const char* kConv2dForces[] = {"", "direct", "winograd2", "winograd4"};

inline cpu::Conv2dForce find_conv2d_force(const char* name) {
  for (int i = 0; i < 4; ++i)
    if (name && !std::strcmp(name, kConv2dForces[i])) return static_cast<cpu::Conv2dForce>(i);
  return cpu::Conv2dForce::kAny;  // the package refuses other words at import
}

inline std::atomic<cpu::Conv2dForce> forced_conv2d{
    find_conv2d_force(std::getenv("DLKERNELS_CONV"))};
inline cpu::Conv2dForce conv2d_force() { return forced_conv2d.load(std::memory_order_relaxed); }

}  // namespace dlkernels
