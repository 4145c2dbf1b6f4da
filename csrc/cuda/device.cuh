// Everything that only nvcc understands: the runtime, the launch, the reduced floats and the
// instructions of the tensor cores. tests/cpp/cuda_on_cpu.h has the same names in plain C++, so
// that all other files of this folder compile and run without a GPU.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/kernels.h"

namespace dlkernels::cuda {

using bf16 = __nv_bfloat16;
using half = __half;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(half x) { return __half2float(x); }
template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline half from_float<half>(float x) {
  return __float2half_rn(x);
}

// The only launch there is. A grid without blocks is no error here, and no launch.
template <class... Params, class... Args>
Error launch(void (*kernel)(Params...), dim3 grid, int block, int shared, Stream stream,
             const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  if (shared > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(Params(args)...);
  return cudaGetLastError();
}

// How many multiprocessors the current device has: what a grid that strides is sized by.
inline int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 1;
  return count;
}

inline int capability(int device) {
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
    (void)cudaGetLastError();  // the next launch must not report it
    return 0;
  }
  return 10 * major + minor;
}

inline const char* error_string(Error error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

inline int version() { return CUDART_VERSION; }

// The block's dynamic shared memory.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char dlkernels_shared[];
  return dlkernels_shared;
}

// Any threads may do so at once, and memory of the host will do.
__device__ inline void raise_flag(int* flag) { *static_cast<volatile int*>(flag) = 1; }

// ---- asynchronous copies from global to shared memory (PTX ISA, cp.async) --------------------

// kBytes (4, 8 or 16, to which both pointers are aligned), of which the first `valid` are read and
// the others become zero. It is there after a wait and, for other threads, a barrier.
template <int kBytes>
__device__ inline void copy_async(void* to_shared, const void* from, int valid) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(to_shared));
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes),
                 "r"(valid)
                 : "memory");
}
// Ends a group of this thread's copies.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the last kPending groups of this thread are there.
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- tensor cores (PTX ISA, ldmatrix and mma.sync) -------------------------------------------
// All threads of a warp call these together. With g = lane / 4 and t = lane % 4:

// Four 8x8 matrices of 16-bit elements: lane 8 i + r gives the address of row r of matrix i,
// aligned to 16 bytes. r[i] is elements (g, 2 t) and (g, 2 t + 1) of matrix i, or of its transpose.
__device__ inline void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
}

// c (16x8, float32) += a (16x16) * b (16x8), of T = bf16 or half, two elements a register:
//   a[0] (g, 2 t), a[1] (g + 8, 2 t), a[2] (g, 2 t + 8), a[3] (g + 8, 2 t + 8);
//   b[0] (2 t, g), b[1] (2 t + 8, g);  c[0], c[1] (g, 2 t); c[2], c[3] (g + 8, 2 t).
template <class T>
__device__ void multiply_add_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ inline void multiply_add_16x8x16<bf16>(float (&c)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ inline void multiply_add_16x8x16<half>(float (&c)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c (16x8, float32) += a (16x8) * b (8x8), of floats whose low 13 bits are not read (TF32):
//   a[0] (g, t), a[1] (g + 8, t), a[2] (g, t + 4), a[3] (g + 8, t + 4);
//   b[0] (t, g), b[1] (t + 4, g);  c as above.
__device__ inline void multiply_add_16x8x8_tf32(float (&c)[4], const uint32_t (&a)[4],
                                                const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace dlkernels::cuda
