// A tile of a matrix product: its operands are copied from global memory to shared memory, and from
// there to the tensor cores.
//
// A step is 128 bytes of K: kStep numbers of each row of A and of B. An operand has the same layout
// in shared memory as in global memory: contiguous runs, one of K for each row (kKInner), or one of
// rows for each k.
#pragma once
#include "cuda/common.cuh"

namespace dlkernels::cuda {

// How float32 is multiplied: in three products of TF32, which is as exact as float32's own, or in
// one, where PyTorch's user allows it. Reduced floats have one only. kExact gives NaN where
// an operand is infinite or all but: kCareful does not, and takes longer.
enum class Math { kExact, kCareful, kTF32 };

// kM x kN of C by a block, kWarpM x kWarpN of it by a warp, with kStages steps of K under way.
template <int M, int N, int WarpM, int WarpN, int Stages, int Blocks>
struct Tile {
  static constexpr int kM = M, kN = N, kWarpM = WarpM, kWarpN = WarpN, kStages = Stages;
  static constexpr int kBlocks = Blocks;  // a multiprocessor, which bounds the registers
  static constexpr int kThreads = kWarp * (kM / kWarpM) * (kN / kWarpN);
  static constexpr int kStage = (kM + kN) * 128;       // bytes
  static constexpr int kStagedRow = kN + 8;            // floats of C in shared memory: 8 rows
  static constexpr int kStaged = kM * kStagedRow * 4;  // of 4 lanes meet no bank twice
  static constexpr int kShared = kStages * kStage > kStaged ? kStages * kStage : kStaged;

  // The part of C that is this thread's warp's.
  __device__ static int warp_m() {
    return static_cast<int>(threadIdx.x) / kWarp % (kM / kWarpM) * kWarpM;
  }
  __device__ static int warp_n() {
    return static_cast<int>(threadIdx.x) / kWarp / (kM / kWarpM) * kWarpN;
  }
};

// Of 16 bytes in global memory those that are the operand's: from[0, valid). The rest counts as 0.
template <class T>
struct Access {
  const T* from;
  int valid;
};

// An operand as a matrix in memory. This is what the tile asks of any operand: access(run(i),
// at(j)) is the 16 bytes of run i from number j on, a multiple of so many; both may be behind the
// end. Lines are asked for once a tile and `at` once a step if kKInner, else the other way round,
// so that an operand which is no matrix (the pixels under a window) works out little in a step.
template <class Type, bool kKInner_>
struct MatrixSource {
  using T = Type;
  static constexpr bool kKInner = kKInner_;
  static constexpr int kPack = Pack<T>::kSize;

  const T* data;
  int64_t stride, runs, size;  // from run to run; how many; numbers a run
  int alignment;               // of every run, in bytes: 16, 4 or 2 (float: 16 or 4)

  struct At {
    int64_t offset;
    int valid;
  };
  using Run = const T*;  // null behind the last

  __device__ Run run(int64_t i) const { return i < runs ? data + i * stride : nullptr; }
  __device__ At at(int64_t j) const {
    const int64_t left = size - j;
    return {j, left <= 0 ? 0 : left < kPack ? static_cast<int>(left) : kPack};
  }
  __device__ Access<T> access(Run run, const At& at) const {
    if (!run || !at.valid) return {data, 0};
    return {run + at.offset, at.valid};
  }
};

// Where pack p (16 bytes) of run r is: at p ^ swizzle(r) of its run, so that 8 runs'
// same packs (a matrix's rows) are in all banks, and 4 runs' same two packs where floats are read
// alone.
template <class T, bool kKInner, int kOuter>
struct Layout {
  static constexpr int kPack = Pack<T>::kSize, kStep = 128 / static_cast<int>(sizeof(T));
  static constexpr int kRuns = kKInner ? kOuter : kStep;
  static constexpr int kPacks = (kKInner ? kStep : kOuter) / kPack;  // a run

  __device__ static int at(int run, int pack) {  // in bytes
    const int swizzle = !kKInner && sizeof(T) == 4 ? run % 4 * 2 : run % 8;
    return (run * kPacks + (pack ^ swizzle)) * 16;
  }
};

// Copies a block's part of an operand, kOuter rows from `outer` on, step by step.
template <class Operand, int kOuter, int kThreads>
class Loader {
  using T = typename Operand::T;
  using L = Layout<T, Operand::kKInner, kOuter>;
  static constexpr bool kKInner = Operand::kKInner;
  static constexpr int kRows = kThreads / L::kPacks, kEach = L::kRuns / kRows;  // runs
  static_assert(kThreads % L::kPacks == 0 && L::kRuns % kRows == 0);

 public:
  __device__ Loader(const Operand& source, int64_t outer)
      : source_(source),
        outer_(outer),
        row_(static_cast<int>(threadIdx.x) / L::kPacks),
        pack_(static_cast<int>(threadIdx.x) % L::kPacks) {
    if constexpr (kKInner) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) runs_[i] = source.run(outer + row_ + i * kRows);
    } else {
      at_ = source.at(outer + pack_ * L::kPack);
    }
  }

  __device__ __forceinline__ void copy(unsigned char* tile, int64_t k) const {
    if (source_.alignment == 16) {
      const auto at = kKInner ? source_.at(k + pack_ * L::kPack) : at_;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int run = row_ + i * kRows;
        const Access<T> access =
            source_.access(kKInner ? runs_[kKInner ? i : 0] : source_.run(k + run), at);
        copy_async<16>(tile + L::at(run, pack_), access.from,
                       access.valid * static_cast<int>(sizeof(T)));
      }
    } else {
#pragma unroll 1
      for (int run = row_; run < L::kRuns; run += kRows) {
        const int64_t i = kKInner ? outer_ : k, j = kKInner ? k : outer_;
        put(tile + L::at(run, pack_),
            source_.access(source_.run(i + run), source_.at(j + pack_ * L::kPack)));
      }
    }
  }

 private:
  // 16 bytes that are not aligned to as many.
  __device__ void put(unsigned char* to, const Access<T>& access) const {
    if (source_.alignment == 4) {
      constexpr int kPer = 4 / sizeof(T);
#pragma unroll
      for (int i = 0; i < L::kPack; i += kPer) {
        const int valid = access.valid - i < 0      ? 0
                          : access.valid - i < kPer ? access.valid - i
                                                    : kPer;
        copy_async<4>(to + i * sizeof(T), valid ? access.from + i : access.from,
                      valid * static_cast<int>(sizeof(T)));
      }
    } else {  // seen by the others after the barrier that the next step begins with
      Pack<T> pack;
#pragma unroll
      for (int i = 0; i < L::kPack; ++i)
        pack.values[i] = i < access.valid ? access.from[i] : from_float<T>(0);
      *reinterpret_cast<Pack<T>*>(to) = pack;
    }
  }

  const Operand source_;
  const int64_t outer_;
  const int row_, pack_;
  typename Operand::Run runs_[kKInner ? kEach : 1];
  typename Operand::At at_;
};

// Reads a warp's part of an operand, the rows from `outer` on, out of shared memory. load(r, i,
// part) is its rows [16 i, 16 i + 16) in part `part` (of 4) of the step, as multiply_add_16x8x16
// and multiply_add_16x8x8_tf32 take A: r[0] rows g, r[1] rows g + 8, both in the part's first half;
// r[2], r[3] the same in its second. For B these are two tiles of 8: {r[0], r[2]}, {r[1], r[3]}.
template <class T, bool kKInner, int kOuter>
class Fragments {
  using L = Layout<T, kKInner, kOuter>;
  static constexpr bool kMatrices = kKInner || sizeof(T) == 2;  // which ldmatrix can read

 public:
  __device__ explicit Fragments(int outer) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    if constexpr (kKInner)
      offset_ = outer * 128 + L::at(lane % 16, lane / 16);
    else if constexpr (kMatrices)
      offset_ = L::at(lane / 16 * 8 + lane % 8, lane / 8 % 2) ^ outer * 2;
    else
      offset_ = (L::at(lane % 4, lane / 16) ^ outer * 4) + lane / 4 % 4 * 4;
  }

  // A swizzle is linear: at(l, p ^ q) = at(l, p) ^ 16 q. So a lane needs one offset, and numbers
  // known to the compiler.
  __device__ __forceinline__ void load(uint32_t (&r)[4], const unsigned char* tile, int i,
                                       int k_chunk) const {
    constexpr int kRunBytes = L::kPacks * 16;
    if constexpr (kKInner) {
      load_matrices(r, tile + i * 16 * kRunBytes + (offset_ ^ k_chunk * 32));
    } else if constexpr (kMatrices) {
      load_matrices_transposed(r, tile + k_chunk * 16 * kRunBytes + (offset_ ^ i * 32));
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        r[j] = *reinterpret_cast<const uint32_t*>(tile + (8 * k_chunk + j / 2 * 4) * kRunBytes +
                                                  (offset_ ^ (i * 64 + j % 2 * 32)));
    }
  }

 private:
  int offset_;
};

__device__ __forceinline__ bool is_infinite(uint32_t x) { return (x << 1) == 0xff000000; }

// x = big + small: big is x rounded to TF32, and small has 12 bits, of which tensor cores drop the
// last.
template <Math kMath>
__device__ __forceinline__ void split(uint32_t x, uint32_t& big, uint32_t& small) {
  big = (x + 0x1000) & ~0x1fffu;  // may turn a NaN to something else; small is one then
  if constexpr (kMath == Math::kCareful) {
    small = 0;
    if (is_infinite(x)) return;
    if (is_infinite(big)) big = x & ~0x1fffu;
  }
  small = __float_as_uint(__uint_as_float(x) - __uint_as_float(big));
}

// What small parts are multiplied by: an infinity times 0, or one less another, would be NaN.
template <Math kMath, int n>
struct Factor {
  uint32_t values[n];

  __device__ __forceinline__ explicit Factor(const uint32_t (&big)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i)
      values[i] = kMath == Math::kCareful && is_infinite(big[i]) ? 0 : big[i];
  }
};

// c += a * b, kI x kJ products of 16x8; a(i) is a's fragment i, asked for just before its use, so
// that it takes no registers before.
template <class T, Math kMath, int kI, int kJ, class F>
__device__ __forceinline__ void multiply_add(float (&c)[kI][kJ][4], const F& a_fragment,
                                             const uint32_t (&b)[kJ][2]) {
  constexpr bool kSplit = sizeof(T) == 4 && kMath != Math::kTF32;
  uint32_t big_b[kJ][2], small_b[kSplit ? kJ : 1][2];
#pragma unroll
  for (int j = 0; j < kJ; ++j)
#pragma unroll
    for (int k = 0; k < 2; ++k)
      if constexpr (kSplit) split<kMath>(b[j][k], big_b[j][k], small_b[j][k]);
#pragma unroll
  for (int i = 0; i < kI; ++i) {
    uint32_t a[4];
    a_fragment(a, i);
    if constexpr (kSplit) {
      uint32_t big_a[4], small_a[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) split<kMath>(a[k], big_a[k], small_a[k]);
#pragma unroll
      for (int j = 0; j < kJ; ++j) {
        // Tensor cores round sums toward zero, which would add up over a long K: so each 8 of K are
        // summed there, small before big, and added here.
        float sum[4] = {};
        multiply_add_16x8x8_tf32(sum, small_a, Factor<kMath, 2>(big_b[j]).values);
        multiply_add_16x8x8_tf32(sum, Factor<kMath, 4>(big_a).values, small_b[j]);
        multiply_add_16x8x8_tf32(sum, big_a, big_b[j]);
#pragma unroll
        for (int k = 0; k < 4; ++k) c[i][j][k] += sum[k];
      }
    } else {
#pragma unroll
      for (int j = 0; j < kJ; ++j)
        if constexpr (sizeof(T) == 4)
          multiply_add_16x8x8_tf32(c[i][j], a, b[j]);
        else
          multiply_add_16x8x16<T>(c[i][j], a, b[j]);
    }
  }
}

}  // namespace dlkernels::cuda
