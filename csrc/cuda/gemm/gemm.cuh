// C (M, N) = A (M, K) * B (N, K)^T by tiles on tensor cores: the kernel and its epilogue.
#pragma once
#include <type_traits>

#include "cuda/gemm/plan.cuh"
#include "cuda/gemm/tile.cuh"

namespace dlkernels::cuda {

// What becomes of C, and of the sums of A's rows.
template <class T>
struct Output {
  static constexpr int kPack = Pack<T>::kSize;

  int64_t M, N;
  T* c;  // C(m, n) at c[m * row + n]
  int64_t row;
  const T* bias;  // (N), is added; or null
  bool relu;      // then max(C, 0), a NaN stays one
  const T* mask;  // with the strides of c: where it is <= 0 C becomes 0; or null
  T* row_sums;    // (M) sums of A(m, k) over k; or null, as it must be if A is kKInner
  bool packed;    // every row of c and of mask is aligned to 16 bytes

  __device__ float bias_at(int64_t n) const { return bias && n < N ? to_float(bias[n]) : 0; }

  // C(m, n + i) = values[i]; b are their biases. Those outside of C count for nothing.
  __device__ void put(int64_t m, int64_t n, const float (&values)[kPack],
                      const float (&b)[kPack]) const {
    if (m >= M || n >= N) return;
    const int64_t at = m * row + n;
    if (packed && n + kPack <= N) {
      Pack<T> y, z;
      if (mask) z = *reinterpret_cast<const Pack<T>*>(mask + at);
#pragma unroll
      for (int i = 0; i < kPack; ++i)
        y.values[i] = finished(values[i] + b[i], mask ? to_float(z.values[i]) : 1);
      *reinterpret_cast<Pack<T>*>(c + at) = y;
    } else {
#pragma unroll
      for (int i = 0; i < kPack; ++i)
        if (n + i < N) c[at + i] = finished(values[i] + b[i], mask ? to_float(mask[at + i]) : 1);
    }
  }

 private:
  __device__ T finished(float x, float z) const {
    return from_float<T>((relu && x < 0) || z <= 0 ? 0 : x);
  }
};

// ---- the kernel -------------------------------------------------------------------------------

// What a thread holds of its warp's part of C, in the places of multiply_add_16x8x16's c, and of
// the sums of A's rows.
template <class Tile, bool kSums_>
struct Accumulators {
  static constexpr bool kSums = kSums_;
  static constexpr int kI = Tile::kWarpM / 16, kJ = Tile::kWarpN / 8;
  float c[kI][kJ][4] = {};
  float sums[kSums ? kI : 1][1][4] = {};

  __device__ bool finite() const {
    float zero = 0;
#pragma unroll
    for (int i = 0; i < kI; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int j = 0; j < kJ; ++j) zero += 0 * c[i][j][k];
        if constexpr (kSums) zero += 0 * sums[i][0][k];
      }
    return zero == 0;
  }
};

// Two of T, or a float, that are 1.
template <class T>
constexpr uint32_t kOnes = std::is_same_v<T, float>  ? 0x3f800000
                           : std::is_same_v<T, bf16> ? 0x3f803f80
                                                     : 0x3c003c00;

// A step: both operands are in shared memory.
template <Math kMath, class T, class Acc, class A, class B>
__device__ __forceinline__ void multiply_step(Acc& acc, const A& a, const unsigned char* a_tile,
                                              const B& b, const unsigned char* b_tile, bool sums) {
  // Unrolled further, exact float32 would need more registers than there are.
  constexpr bool kExactFloat = sizeof(T) == 4 && kMath != Math::kTF32;
  [[maybe_unused]] constexpr int kUnroll = kExactFloat ? 1 : 4;
#pragma unroll kUnroll
  for (int k_chunk = 0; k_chunk < 4; ++k_chunk) {
    uint32_t columns[Acc::kJ][2];
#pragma unroll
    for (int j = 0; j < Acc::kJ; j += 2) {
      uint32_t r[4];
      b.load(r, b_tile, j / 2, k_chunk);
      columns[j][0] = r[0], columns[j + 1][0] = r[1];
      columns[j][1] = r[2], columns[j + 1][1] = r[3];
    }
    const auto rows = [&](uint32_t (&r)[4], int i) { a.load(r, a_tile, i, k_chunk); };
    multiply_add<T, kMath>(acc.c, rows, columns);
    if constexpr (Acc::kSums) {
      const uint32_t ones[1][2] = {{kOnes<T>, kOnes<T>}};  // a column of them sums the rows
      if (sums) multiply_add<T, kMath>(acc.sums, rows, ones);
    }
  }
}

// C's tile to shared memory, for every thread to read: row m from m * kStagedRow on.
template <class Tile, class Acc>
__device__ __forceinline__ const float* stage_tile(const Acc& acc) {
  struct alignas(8) Pair {
    float values[2];
  };
  float* staged = reinterpret_cast<float*>(shared_memory());
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  const int warp_m = Tile::warp_m(), warp_n = Tile::warp_n();
  __syncthreads();  // the operands have been read
#pragma unroll
  for (int i = 0; i < Acc::kI; ++i)
#pragma unroll
    for (int j = 0; j < Acc::kJ; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int m = warp_m + 16 * i + g + 8 * half, n = warp_n + 8 * j + 2 * t;
        *reinterpret_cast<Pair*>(staged + m * Tile::kStagedRow +
                                 n) = {{acc.c[i][j][2 * half], acc.c[i][j][2 * half + 1]}};
      }
  __syncthreads();
  return staged;
}

// From there to where it belongs, so that whole rows are read and written.
template <class Tile, class T, class Acc>
__device__ __forceinline__ void put_tile(const Acc& acc, const Output<T>& out, const Parts& parts,
                                         int64_t m0, int64_t n0) {
  constexpr int kPack = Pack<T>::kSize, kPacks = Tile::kN / kPack;
  const int thread = static_cast<int>(threadIdx.x);
  const float* const staged = stage_tile<Tile>(acc);
  if (parts.splits > 1) {
    float* to = parts.c(blockIdx.z) + m0 * parts.cols + n0;
    for (int i = thread; i < Tile::kM * Tile::kN / 4; i += Tile::kThreads) {
      const int m = i / (Tile::kN / 4), n = i % (Tile::kN / 4) * 4;
      *reinterpret_cast<Pack<float>*>(to + m * parts.cols + n) =
          *reinterpret_cast<const Pack<float>*>(staged + m * Tile::kStagedRow + n);
    }
    return;
  }
  const int n = thread % kPacks * kPack;  // the same in each of this thread's rows
  float bias[kPack], values[kPack];
#pragma unroll
  for (int i = 0; i < kPack; ++i) bias[i] = out.bias_at(n0 + n + i);
  for (int m = thread / kPacks; m < Tile::kM; m += Tile::kThreads / kPacks) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) values[i] = staged[m * Tile::kStagedRow + n + i];
    out.put(m0 + m, n0 + n, values, bias);
  }
}

// The sums of A's rows [m0, m0 + kWarpM), which each column of their product with ones holds.
template <class Tile, class T, class Acc>
__device__ __forceinline__ void put_sums(const Acc& acc, const Output<T>& out, const Parts& parts,
                                         int64_t m0) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (lane % 4) return;
#pragma unroll
  for (int i = 0; i < 2 * Tile::kWarpM / 16; ++i) {
    const int64_t m = m0 + 8 * i + lane / 4;
    const float sum = acc.sums[i / 2][0][i % 2 * 2];
    if (parts.splits > 1)
      parts.row_sums(blockIdx.z)[m] = sum;
    else if (m < out.M)
      out.row_sums[m] = from_float<T>(sum);
  }
}

// Steps [begin, end) of a tile's sums, from rows m0 of A and n0 of B on.
template <class Tile, Math kMath, class A, class B, class Acc>
__device__ __forceinline__ void multiply_steps(Acc& acc, const A& a, const B& b, int64_t m0,
                                               int64_t n0, int begin, int end, bool sums) {
  using T = typename A::T;
  constexpr int kStep = 128 / sizeof(T), kAhead = Tile::kStages - 1;
  unsigned char* shared = shared_memory();
  const Loader<A, Tile::kM, Tile::kThreads> load_a(a, m0);
  const Loader<B, Tile::kN, Tile::kThreads> load_b(b, n0);
  const Fragments<T, A::kKInner, Tile::kM> rows(Tile::warp_m());
  const Fragments<T, B::kKInner, Tile::kN> columns(Tile::warp_n());
  // Loads run kAhead steps before products; so the first steps only load, and the last only
  // multiply. A stage is loaded into after the barrier behind which all have multiplied it.
  int load_to = 0, multiply_from = 0;
  for (int step = begin - kAhead; step < end; ++step) {
    if (step >= begin) {
      wait_copies<kAhead - 1>();
      __syncthreads();
    }
    if (step + kAhead < end) {
      unsigned char* stage = shared + load_to * Tile::kStage;
      const int64_t k = int64_t{step + kAhead} * kStep;
      load_a.copy(stage, k);
      load_b.copy(stage + Tile::kM * 128, k);
      load_to = load_to + 1 < Tile::kStages ? load_to + 1 : 0;
    }
    commit_copies();
    if (step >= begin) {
      const unsigned char* stage = shared + multiply_from * Tile::kStage;
      multiply_step<kMath, T>(acc, rows, stage, columns, stage + Tile::kM * 128, sums);
      multiply_from = multiply_from + 1 < Tile::kStages ? multiply_from + 1 : 0;
    }
  }
  wait_copies<0>();
}

// The same, and with care where some sum of the block is not finite, which is seldom.
template <class Tile, Math kMath, class A, class B, class Acc>
__device__ __forceinline__ void multiply_tile(Acc& acc, const A& a, const B& b, int64_t m0,
                                              int64_t n0, int begin, int end, bool sums) {
  multiply_steps<Tile, kMath>(acc, a, b, m0, n0, begin, end, sums);
  if constexpr (sizeof(typename A::T) == 4 && kMath == Math::kExact)
    if (__syncthreads_or(!acc.finite())) {
      acc = {};
      multiply_steps<Tile, Math::kCareful>(acc, a, b, m0, n0, begin, end, sums);
    }
}

template <class Tile, Math kMath, class A, class B>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    gemm_kernel(const A a, const B b, const Output<typename A::T> out, const Parts parts,
                const TileGrid grid, int steps) {
  unsigned tile_m, tile_n;
  grid.find(blockIdx.x, tile_m, tile_n);
  const int64_t m0 = int64_t{tile_m} * Tile::kM, n0 = int64_t{tile_n} * Tile::kN;
  const bool sums = !A::kKInner && out.row_sums && tile_n == 0 && Tile::warp_n() == 0;
  Accumulators<Tile, !A::kKInner> acc;
  const int begin = static_cast<int>(int64_t{steps} * blockIdx.z / parts.splits);
  const int end = static_cast<int>(int64_t{steps} * (blockIdx.z + 1) / parts.splits);
  multiply_tile<Tile, kMath>(acc, a, b, m0, n0, begin, end, sums);
  if constexpr (!A::kKInner)
    if (sums) put_sums<Tile>(acc, out, parts, m0 + Tile::warp_m());
  put_tile<Tile>(acc, out, parts, m0, n0);
}

// C and the row sums from their parts, in the order of K: 32 rows of 8 packs a block, which divide
// a tile.
template <class T>
__global__ void __launch_bounds__(256) sum_parts_kernel(const Parts parts, const Output<T> out) {
  constexpr int kPack = Pack<T>::kSize;
  const unsigned across = static_cast<unsigned>(parts.cols / (8 * kPack));
  const int64_t m = int64_t{blockIdx.x / across} * 32 + threadIdx.x / 8;
  const int64_t n = (int64_t{blockIdx.x % across} * 8 + threadIdx.x % 8) * kPack;
  if (m >= out.M) return;
  if (n < out.N) {
    float sum[kPack] = {}, bias[kPack];
#pragma unroll 4
    for (int split = 0; split < parts.splits; ++split)
#pragma unroll
      for (int i = 0; i < kPack; i += 4) {
        const auto x =
            *reinterpret_cast<const Pack<float>*>(parts.c(split) + m * parts.cols + n + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i + j] += x.values[j];
      }
#pragma unroll
    for (int i = 0; i < kPack; ++i) bias[i] = out.bias_at(n + i);
    out.put(m, n, sum, bias);
  }
  if (n == 0 && out.row_sums) {
    float sum = 0;
    for (int split = 0; split < parts.splits; ++split) sum += parts.row_sums(split)[m];
    out.row_sums[m] = from_float<T>(sum);
  }
}

// ---- launches ---------------------------------------------------------------------------------

using SmallTile = Tile<64, 64, 32, 32, 4, 3>;
// A warp's 64x64 halves what reduced floats read from shared memory, which bounds them; split
// float32 operands leave the registers for 64x32, and for one block.
template <class T>
using LargeTile =
    std::conditional_t<sizeof(T) == 4, Tile<128, 128, 64, 32, 3, 1>, Tile<128, 128, 64, 64, 3, 2>>;

template <class Tile, Math kMath, class A, class B, class T>
Error multiply_by(const A& a, const B& b, const Output<T>& out, int64_t K, const Parts& parts,
                  Stream stream) {
  const TileGrid grid = {static_cast<unsigned>(parts.rows / Tile::kM),
                         static_cast<unsigned>(parts.cols / Tile::kN)};
  const Error error =
      launch(gemm_kernel<Tile, kMath, A, B>, dim3(grid.tiles_m * grid.tiles_n, 1, parts.splits),
             Tile::kThreads, Tile::kShared, stream, a, b, out, parts, grid,
             static_cast<int>(ceil_div(K, 128 / sizeof(T))));
  if (error || parts.splits == 1) return error;
  const int64_t blocks = parts.cols / (8 * Pack<T>::kSize) * ceil_div(out.M, 32);
  return launch(sum_parts_kernel<T>, dim3(static_cast<unsigned>(blocks)), 256, 0, stream, parts,
                out);
}

// C = A * B^T with K numbers a row. workspace, of workspace_bytes, is aligned to 16 bytes.
template <Math kMath, class A, class B, class T>
Error multiply(const A& a, const B& b, const Output<T>& out, int64_t K, const Plan& plan,
               void* workspace, Stream stream) {
  if (out.N == 0 && !out.row_sums) return 0;
  const Parts parts = parts_of(plan, out.M, out.N, workspace);
  return plan.large ? multiply_by<LargeTile<T>, kMath>(a, b, out, K, parts, stream)
                    : multiply_by<SmallTile, kMath>(a, b, out, K, parts, stream);
}

}  // namespace dlkernels::cuda
