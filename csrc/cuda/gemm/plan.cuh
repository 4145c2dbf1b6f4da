// How a matrix product is divided among the blocks of the device: the tile, and the number of parts
// of K (split-K).
#pragma once
#include <algorithm>
#include <cmath>

#include "cuda/common.cuh"

namespace dlkernels::cuda {

// Sums over K may be cut into `splits`, each by other blocks into memory of its own.
struct Plan {
  bool large;
  int splits;
};

// The fastest by a simple model of a device's clock cycles: `rate` is multiply-adds a cycle of a
// multiprocessor, and `step` the numbers of K a step.
inline Plan choose(int64_t M, int64_t N, int64_t K, double rate, int step, int sms) {
  constexpr double kStep = 350, kBlock = 1500;     // what a step and a block take at least
  constexpr double kSecond = 4000, kBytes = 1500;  // a second kernel; bytes a cycle to and fro
  constexpr int64_t kLeastSteps = 3, kMostSplits = 64;
  const int64_t steps = ceil_div(K, step);
  Plan best = {false, 1};
  double best_time = 1e300;
  for (const bool large : {false, true}) {
    const int64_t side = large ? 128 : 64;
    const double tiles = static_cast<double>(ceil_div(M, side)) * ceil_div(N, side);
    // Of a step alone on its multiprocessor. The small tile reads twice as much for each product.
    const double cycles = side * side * step / (large ? rate : 0.7 * rate);
    for (int64_t splits = 1; splits <= kMostSplits && splits * kLeastSteps <= steps + 2;
         splits += 1 + splits / 8) {
      if (splits > 1 && tiles * (splits - 1) >= 2.0 * sms) break;
      const double waves = std::ceil(tiles * splits / sms);
      double time = std::max(waves * cycles, kStep) * ceil_div(steps, splits) + kBlock;
      if (splits > 1) time += kSecond + 8.0 * M * N * splits / kBytes;
      if (time < best_time) best_time = time, best = {large, static_cast<int>(splits)};
    }
  }
  return best;
}

// The workspace where sums are split: rows x cols of C for each split, whole tiles, then
// the sums of A's rows.
struct Parts {
  float* data;
  int64_t rows, cols;
  int splits;

  __device__ float* c(int split) const { return data + split * rows * cols; }
  __device__ float* row_sums(int split) const { return c(splits) + split * rows; }
  int64_t bytes() const { return splits * (rows * cols + rows) * int64_t{sizeof(float)}; }
};

struct TileGrid {
  unsigned tiles_m, tiles_n;

  // Tiles of eight rows of tiles come after each other column by column: those that run at a time
  // read few rows of A and of B.
  __device__ void find(unsigned i, unsigned& tile_m, unsigned& tile_n) const {
    const unsigned group = tiles_m < 8 ? tiles_m : 8, of_group = group * tiles_n;
    const unsigned first = i / of_group * group;
    const unsigned rows = tiles_m - first < group ? tiles_m - first : group;
    tile_m = first + i % of_group % rows;
    tile_n = i % of_group / rows;
  }
};

// The parts of a plan; they need workspace only if it splits.
inline Parts parts_of(const Plan& plan, int64_t M, int64_t N, void* workspace) {
  const int64_t side = plan.large ? 128 : 64;
  return {static_cast<float*>(workspace), ceil_div(M, side) * side,
          ceil_div(N > 0 ? N : 1, side) * side, plan.splits};
}
inline int64_t workspace_bytes(const Plan& plan, int64_t M, int64_t N) {
  return plan.splits > 1 ? parts_of(plan, M, N, nullptr).bytes() : 0;
}

}  // namespace dlkernels::cuda
