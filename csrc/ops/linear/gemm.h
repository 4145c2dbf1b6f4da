// Matrix products on all threads.
#pragma once
#include "ops/core/memory.h"
#include "ops/core/parallel.h"

namespace dlkernels {

// C (M, N) = A (M, K) * B (N, K)^T with an epilogue.
struct Product {
  cpu::Matrix a = {}, b = {};
  int64_t M = 0, N = 0, K = 0;
  cpu::GemmOutput out = {};

  // Packing an operand costs about 12 cycles a row of 16 numbers and is shared by the rows of the
  // other one; sums across lanes cost about 5 cycles an element of C. Fewer than 16 columns, which
  // would leave lanes of a tile empty, tip the scales in the same way. Narrow numbers are
  // to_float32 once to be packed, but here for every few rows.
  bool dots() const {
    const int64_t min_k = a.dtype == DType::kFloat32 ? 24 : 32;
    return a.col == 1 && b.col == 1 && !a.relu_y && !out.row_sums && N > 0 &&
           K >= min_k * (N < 16 ? std::min(M, N) : M);
  }
  // In multiply-adds. Those that wait for memory count for more: 8 a number.
  double work() const {
    const double m = M, n = N, k = K;
    return m * n * k + 8 * (m * k + n * k + m * n);
  }
  void run(const cpu::GemmChunk& chunk) const {
    const cpu::Kernels& table = cpu::kernels();
    if (dots())
      table.gemm_dot(a, b, K, out, chunk);
    else
      table.gemm(a, b, K, out, chunk, scratch(table.gemm_scratch));
  }
};

// Computes them in one parallel region.
inline void multiply(std::initializer_list<Product> products) {
  constexpr double kFork = 2e6;  // multiply-adds: about 12 us
  double work = 0;
  for (const Product& p : products) work += p.work();
  const bool fork = work >= kFork && !at::in_parallel_region();
  const int64_t threads = fork ? at::get_num_threads() : 1;

  struct Grid {
    cpu::GemmSize size;
    int64_t parts_n = 1, parts = 1;
  };
  c10::SmallVector<Grid, 2> grids;
  int64_t parts = 0;
  for (const Product& p : products) {
    Grid g = {.size = {p.M, p.N}};
    if (threads > 1) {
      const double share = p.work() / work * threads;
      g.size = cpu::kernels().gemm_chunk_size(p.a, p.b, p.M, p.N, p.K, p.out, share);
      const auto count = [](int64_t n, int64_t size) {
        return std::max<int64_t>(1, (n + size - 1) / size);
      };
      g.parts_n = count(p.N, g.size.n);
      g.parts = count(p.M, g.size.m) * g.parts_n;
    }
    grids.push_back(g);
    parts += g.parts;
  }
  const auto run = [&](int64_t begin, int64_t end) {
    int64_t first = 0;
    auto g = grids.begin();
    for (const Product& p : products) {
      for (int64_t i = std::max(begin, first); i < std::min(end, first + g->parts); ++i) {
        const int64_t m = (i - first) / g->parts_n * g->size.m;
        const int64_t n = (i - first) % g->parts_n * g->size.n;
        p.run({m, std::min(p.M, m + g->size.m), n, std::min(p.N, n + g->size.n)});
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
