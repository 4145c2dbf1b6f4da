// What the kernels share: types, 16-byte accesses, grids that stride, sums over a warp and a block.
#pragma once
#ifdef __CUDACC__
#include "device.cuh"  // else tests/cuda_on_cpu.h came first
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

// 16 bytes of T, moved at once.
template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

template <class... P>
bool aligned16(const P*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks for `items` of work, `per_block` of them at a time, where a block strides on to its next
// items: no more than fill the device a few times over, so that no size is too large for a grid.
inline unsigned striding_grid(int64_t items, int64_t per_block) {
  const int64_t wanted = ceil_div(items, per_block), most = int64_t{32} * multiprocessors();
  return static_cast<unsigned>(wanted < most ? wanted : most);
}
// This thread's place in such a grid, and the distance to its next.
__device__ inline int64_t global_thread() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
__device__ inline int64_t global_threads() { return int64_t{gridDim.x} * blockDim.x; }

struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Max {  // a NaN wins
  __device__ float operator()(float a, float b) const { return a > b || a != a ? a : b; }
};

// Of all lanes of a warp, in an order that does not change; every lane gets it.
template <class F>
__device__ float over_warp(float x, const F& f) {
  for (int apart = kWarp / 2; apart > 0; apart /= 2) x = f(x, __shfl_xor_sync(kAllLanes, x, apart));
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
