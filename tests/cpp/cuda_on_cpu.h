// CUDA C++ for a plain C++ compiler: the names of csrc/cuda/device.cuh and of the language, so that
// a test can include a .cu file and run its kernels without a GPU, block by block (cuda_block.h).
// An asynchronous copy arrives no sooner than it must: a missing wait gives wrong results.
#pragma once
#include "cuda/kernels.h"

#include "cuda_block.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace dlkernels::cuda {

template <class... Params, class... Args>
Error launch(void (*kernel)(Params...), dim3 grid, int block, int shared, Stream,
             const Args&... args) {
  if (grid.y > 65535 || grid.z > 65535 || block < 1 || block > 1024 || shared > 227 * 1024)
    Block::fail("a launch that CUDA would refuse");
  gridDim = grid;
  blockDim = dim3(block);
  const std::function<void()> thread = [&] { kernel(Params(args)...); };
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t b = 0; b < blocks; ++b) {
    const uint64_t i = schedule == Schedule::kBackward ? blocks - 1 - b : b;
    blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    Block::get().run(thread, block, shared);
  }
  return 0;
}

inline int multiprocessors() { return 2; }  // so few that a small test strides, too
inline int capability(int) { return 90; }
inline const char* error_string(Error) { return "none"; }
inline int version() { return 0; }
inline unsigned char* shared_memory() { return Block::get().shared(); }
inline void raise_flag(int* flag) { __atomic_store_n(flag, 1, __ATOMIC_RELAXED); }

// ---- types ------------------------------------------------------------------------------------

using half = _Float16;

struct bf16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(half x) { return static_cast<float>(x); }
inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
template <class T>
T from_float(float x) {
  return static_cast<T>(x);
}
template <>
inline bf16 from_float<bf16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// ---- asynchronous copies ------------------------------------------------------------------------

template <int kBytes>
void copy_async(void* to_shared, const void* from, int valid) {
  const auto misaligned = [](const void* p) {
    return reinterpret_cast<uintptr_t>(p) % kBytes != 0;
  };
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if (misaligned(to_shared) || (valid > 0 && misaligned(from)) || valid < 0 || valid > kBytes)
    Block::fail("a misaligned asynchronous copy");
  Block::get().copies().back().push_back({to_shared, from, kBytes, valid});
}
inline void commit_copies() { Block::get().copies().emplace_back(); }
template <int kPending>
void wait_copies() {
  auto& groups = Block::get().copies();  // the last is still open
  const int arrived = std::max(0, static_cast<int>(groups.size()) - 1 - kPending);
  for (int i = 0; i < arrived; ++i)
    for (const auto& copy : groups[i]) {
      if (copy.valid > 0) std::memcpy(copy.to, copy.from, copy.valid);
      std::memset(static_cast<char*>(copy.to) + copy.valid, 0, copy.bytes - copy.valid);
    }
  groups.erase(groups.begin(), groups.begin() + arrived);
}

// ---- tensor cores
// ---------------------------------------------------------------------------------

template <bool kTransposed>
void load_matrices_on_cpu(uint32_t (&r)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) Block::fail("a misaligned row of a matrix");
  const int lane = Block::get().lane(), g = lane / 4, t = lane % 4;
  const auto rows = Block::get().exchange(row);
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 2; ++j) {
      const int at_row = kTransposed ? 2 * t + j : g, at_col = kTransposed ? g : 2 * t + j;
      std::memcpy(reinterpret_cast<char*>(&r[i]) + 2 * j,
                  static_cast<const char*>(rows[8 * i + at_row]) + 2 * at_col, 2);
    }
}
inline void load_matrices(uint32_t (&r)[4], const void* row) {
  load_matrices_on_cpu<false>(r, row);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  load_matrices_on_cpu<true>(r, row);
}

template <class T, int K>
void multiply_add_on_cpu(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    T a[16 / sizeof(T)], b[8 / sizeof(T)];
  } mine;
  constexpr int kPer = 4 / sizeof(T);  // elements a register
  std::memcpy(mine.a, a, 16);
  std::memcpy(mine.b, b, 8);
  const int lane = Block::get().lane(), g = lane / 4, t = lane % 4;
  const auto of = Block::get().exchange(mine);
  double sums[4] = {c[0], c[1], c[2], c[3]};
  for (int k = 0; k < K; ++k) {
    const int kt = k / kPer % 4, half_of_k = k / (4 * kPer), j = k % kPer;
    const Operands& upper = of[4 * g + kt];
    for (int i = 0; i < 4; ++i) {
      const float x = to_float(upper.a[(i / 2 + 2 * half_of_k) * kPer + j]);
      const float y = to_float(of[4 * (2 * t + i % 2) + kt].b[half_of_k * kPer + j]);
      sums[i] += static_cast<double>(x) * y;
    }
  }
  for (int i = 0; i < 4; ++i) {  // rounded toward zero, as tensor cores do
    c[i] = static_cast<float>(sums[i]);
    if (std::fabs(c[i]) > std::fabs(sums[i])) c[i] = std::nextafter(c[i], 0.0f);
  }
}

template <class T>
void multiply_add_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_add_on_cpu<T, 16>(c, a, b);
}

inline void multiply_add_16x8x8_tf32(float (&c)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
  // The tensor cores read no more than TF32 keeps.
  uint32_t at[4], bt[2];
  for (int i = 0; i < 4; ++i) at[i] = a[i] & ~0x1fffu;
  for (int i = 0; i < 2; ++i) bt[i] = b[i] & ~0x1fffu;
  multiply_add_on_cpu<float, 8>(c, at, bt);
}

}  // namespace dlkernels::cuda

// ---- the language's own functions --------------------------------------------------------------

inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }

inline void __syncthreads() { dlkernels::cuda::Block::get().barrier(); }
inline int __syncthreads_or(int x) { return dlkernels::cuda::Block::get().any(x); }
inline void __syncwarp(unsigned = 0xffffffffu) { dlkernels::cuda::Block::get().warp_barrier(); }

template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  auto& block = dlkernels::cuda::Block::get();
  return block.exchange(x)[block.lane() ^ mask];
}
inline float __expf(float x) { return std::exp(x); }
using std::max;
using std::min;
