// The one choice of a convolution's algorithm.
#include "cpu/kernels.h"

namespace dlkernels::cpu {

// That of the direct sum: the more special first.
static const Conv2dAlgorithm& choose_direct(const Kernels& table, const Conv2d& conv) {
  if (table.scatter.supports(conv)) return table.scatter;
  return table.small_k.supports(conv) ? table.small_k : table.direct;
}

// Multiplications for a pair of channels with tiles of `tile` x `tile` outputs of a 3x3 window, and
// `packing`: what it takes to pack one weight.
static double products(int64_t N, const Conv2d& conv, int64_t tile, double packing) {
  const auto tiles = [=](int64_t out) { return static_cast<double>((out + tile - 1) / tile); };
  const auto points = static_cast<double>((tile + 2) * (tile + 2));
  return static_cast<double>(N) * tiles(conv.h.out) * tiles(conv.w.out) * points + packing;
}

// What was measured is in docs/performance/conv2d.md.
const Conv2dAlgorithm& choose_conv2d(const Kernels& table, int64_t N, const Conv2d& conv,
                                     bool exact, Conv2dForce force) {
  if (force == Conv2dForce::kDirect) return choose_direct(table, conv);
  if (table.depthwise.supports(conv)) return table.depthwise;
  if (!table.winograd_4x4.supports(conv)) return choose_direct(table, conv);
  if (force == Conv2dForce::kWinograd2x2) return table.winograd_2x2;
  if (force == Conv2dForce::kWinograd4x4) return table.winograd_4x4;
  // Few channels do not make up for the transforms.
  if (exact || conv.x.C < 8 || conv.K < 8 || conv.x.C * conv.K < 256)
    return choose_direct(table, conv);
  const double direct = products(N, conv, 1, 450), two = products(N, conv, 2, 400),
               four = products(N, conv, 4, 1600);
  if (four < two && four < direct) return table.winograd_4x4;
  return two < direct ? table.winograd_2x2 : choose_direct(table, conv);
}

}  // namespace dlkernels::cpu
