// Which algorithms a convolution may use.
#pragma once
#include <atomic>
#include <cstdlib>
#include <cstring>

namespace dlkernels {

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

}  // namespace dlkernels
