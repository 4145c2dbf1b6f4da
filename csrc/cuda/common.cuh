// What the kernels share: types, 16-byte accesses, grids that stride, sums over a warp and a block.
#pragma once
#ifdef __CUDACC__
#include "cuda/device.cuh"  // else tests/cuda_on_cpu.h came first
#endif

namespace dlkernels::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// f(T()) with the type that dtype stands for.
template <class F>
Error with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kBFloat16:
      return f(bf16());
    case DType::kFloat16:
      return f(half());
    default:
      return f(float());
  }
}

// N elements of T, moved at once: 16 bytes, if nothing else is said.
template <class T, int N = 16 / sizeof(T)>
struct alignas(N * sizeof(T)) Pack {
  static constexpr int kSize = N;
  T values[N];
};
template <int N, class T>
__device__ Pack<T, N> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}
template <class T, int N>
__device__ void store_pack(const Pack<T, N>& pack, T* p) {
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

template <class... P>
bool aligned16(const P*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks for `items` of work, `per_block` of them at a time, where a block strides on to its next
// items: no more than fill the device a few times over, so that no size is too large for a grid.
inline unsigned striding_grid(int64_t items, int64_t per_block) {
  const int64_t wanted = ceil_div(items, per_block), max_blocks = int64_t{32} * multiprocessors();
  return static_cast<unsigned>(wanted < max_blocks ? wanted : max_blocks);
}
// This thread's place in such a grid, and the distance to its next.
__device__ inline int64_t global_thread() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
__device__ inline int64_t global_threads() { return int64_t{gridDim.x} * blockDim.x; }

// Division of 0 <= n < 2^31 by a divisor in [1, 2^30] that the host knows: a multiplication
// (Granlund and Montgomery, Division by Invariant Integers using Multiplication, 1994).
struct Divider {
  uint32_t divisor = 1, multiplier = 1, shift = 0;

  Divider() = default;
  explicit Divider(int64_t d) : divisor(static_cast<uint32_t>(d)) {
    while ((int64_t{1} << shift) < d) ++shift;
    multiplier = static_cast<uint32_t>((((int64_t{1} << shift) - d) << 32) / d + 1);
  }
  __device__ int divide(int n) const {
    const uint32_t high =
        static_cast<uint32_t>(uint64_t{multiplier} * static_cast<uint32_t>(n) >> 32);
    return static_cast<int>((high + static_cast<uint32_t>(n)) >> shift);
  }
  __device__ int remainder(int n, int quotient) const {
    return n - quotient * static_cast<int>(divisor);
  }
  // n becomes n / divisor; what remains is returned.
  __device__ int split(int& n) const {
    const int quotient = divide(n), rest = remainder(n, quotient);
    n = quotient;
    return rest;
  }
};

struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Max {  // a NaN wins
  __device__ float operator()(float a, float b) const { return a > b || a != a ? a : b; }
};

// Of all lanes of a warp, in an order that does not change; every lane gets it.
template <class F>
__device__ float over_warp(float x, const F& f) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    x = f(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}

// Of all threads of a block of whole warps; every thread gets it. `shared` holds a float a warp and
// may be used again after the next barrier.
template <class F>
__device__ float over_block(float x, float* shared, const F& f) {
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  x = over_warp(x, f);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  float all = shared[0];
  for (int i = 1; i < warps; ++i) all = f(all, shared[i]);
  return all;
}

}  // namespace dlkernels::cuda
