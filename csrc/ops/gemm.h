// Matrix products on all threads.
#pragma once
#include "common.h"

namespace dlkernels {

// C (M, N) = A (M, K) * B (N, K)^T with an epilogue.
struct Product {
  cpu::Matrix a = {}, b = {};
  int64_t M = 0, N = 0, K = 0;
  cpu::GemmOutput out = {};

  // Packing an operand costs about 12 cycles a row of 16 numbers and is shared by the rows of the
  // other one; sums across lanes cost about 5 cycles an element of C. Fewer than 16 columns, which
  // would leave lanes of a tile empty, tip the scales in the same way. Narrow numbers are widened
  // once to be packed, but here for every few rows.
  bool dots() const {
    const int64_t least = a.dtype == DType::kFloat32 ? 24 : 32;
    return a.col == 1 && b.col == 1 && !a.relu_y && !out.row_sums && N > 0 &&
           K >= least * (N < 16 ? std::min(M, N) : M);
  }
  // In multiply-adds. Those that wait for memory count for more: 8 a number.
  double work() const {
    const double m = M, n = N, k = K;
    return m * n * k + 8 * (m * k + n * k + m * n);
  }
  void run(const cpu::GemmPart& part) const {
    const cpu::Kernels& table = cpu::kernels();
    if (dots())
      table.gemm_dot(a, b, K, out, part);
    else
      table.gemm(a, b, K, out, part, scratch(table.gemm_scratch));
  }
};

// Computes them in one parallel region, each in a few parts a thread, for one that is held up. C is
// cut where nothing is packed twice: along N where B has to be packed, else along M. Short sums are
// mostly writing, and a thread that writes whole rows took a third of the time.
inline void multiply(std::initializer_list<Product> products) {
  constexpr double kFork = 2e6;  // multiply-adds: about 12 us
  constexpr int64_t kPartsPerThread = 4, kPartTiles = 4, kShort = 64;
  double work = 0;
  for (const Product& p : products) work += p.work();
  const bool fork = work >= kFork && !at::in_parallel_region();
  const int64_t threads = fork ? at::get_num_threads() : 1;

  const cpu::Kernels& table = cpu::kernels();
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  struct Grid {
    int64_t parts = 1, parts_n = 1, step_m, step_n;
  };
  c10::SmallVector<Grid, 2> grids;
  int64_t parts = 0;
  for (const Product& p : products) {
    Grid g = {.step_m = std::max<int64_t>(p.M, 1), .step_n = std::max<int64_t>(p.N, 1)};
    if (threads > 1) {
      const int64_t rows = std::max<int64_t>(1, ceil_div(p.M, table.gemm_tile_rows));
      const int64_t cols = std::max<int64_t>(1, ceil_div(p.N, table.gemm_tile_cols));
      const double share = p.work() / work * threads;  // threads for this product
      const int64_t least = std::max<int64_t>(1, std::llround(share));
      const bool b_lies = p.b.row == 1 && p.b.dtype == DType::kFloat32;
      const bool by_rows = b_lies || p.K <= kShort;
      const int64_t most =
          std::min<int64_t>(kPartsPerThread * share, (by_rows ? rows : cols) / kPartTiles);
      const int64_t wanted = std::max(least, most);
      int64_t parts_m = 1, parts_n = 1;
      if (by_rows) {
        parts_m = std::min(wanted, rows);
        parts_n = std::min(wanted / parts_m, cols);
      } else {
        parts_n = std::min(wanted, cols);
        parts_m = std::min(wanted / parts_n, rows);
      }
      g.step_m = std::max<int64_t>(1, ceil_div(p.M, parts_m));
      g.step_n = ceil_div(cols, parts_n) * table.gemm_tile_cols;
      g.parts_n = std::max<int64_t>(1, ceil_div(p.N, g.step_n));
      g.parts = ceil_div(p.M, g.step_m) * g.parts_n;
    }
    grids.push_back(g);
    parts += g.parts;
  }
  const auto run = [&](int64_t begin, int64_t end) {
    int64_t first = 0;
    auto g = grids.begin();
    for (const Product& p : products) {
      for (int64_t i = std::max(begin, first); i < std::min(end, first + g->parts); ++i) {
        const int64_t m = (i - first) / g->parts_n * g->step_m;
        const int64_t n = (i - first) % g->parts_n * g->step_n;
        p.run({m, std::min(p.M, m + g->step_m), n, std::min(p.N, n + g->step_n)});
      }
      first += g++->parts;
    }
  };
  if (threads > 1)
    parallel_chunks(parts, 1, run);
  else
    run(0, parts);
}

}  // namespace dlkernels
