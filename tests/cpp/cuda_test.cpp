// Runs every CUDA test in each order of threads, after proof that the stand-in for a GPU
// sees the mistakes it is there for.
#include "cuda_test.h"

#include "cuda/common.cuh"

namespace dlkernels::test {
namespace {

// y[i] = sum of x over i's block, by its first thread; right only with both barriers.
__global__ void sum_kernel(const float* x, float* y, bool barrier) {
  float* shared = reinterpret_cast<float*>(cuda::shared_memory());
  shared[threadIdx.x] = x[cuda::global_thread()];
  if (barrier) __syncthreads();
  float sum = 0;
  for (unsigned i = 0; i < blockDim.x; ++i) sum += shared[i];
  y[cuda::global_thread()] = sum;
}

int wrong_sums(bool barrier) {
  constexpr int kThreads = 64, kBlocks = 3;
  CudaBuffer<float> x(kThreads * kBlocks), y(kThreads * kBlocks);
  x.fill(1);
  cuda::launch(sum_kernel, kBlocks, kThreads, kThreads * sizeof(float), nullptr, x.data(), y.data(),
               barrier);
  int wrong = 0;
  for (int64_t i = 0; i < y.size(); ++i) wrong += y[i] != kThreads;
  return wrong;
}

const CudaTest barrier_test("a barrier and none", [] {
  int wrong = wrong_sums(true);
#ifndef __SANITIZE_THREAD__  // there a missing barrier ends the program: main's `race`
  wrong += wrong_sums(false) == 0;
#endif
  return wrong;
});

// Each thread copies its element and reads it: right only if it waits.
__global__ void copy_kernel(const float* x, float* y, bool waits) {
  float* shared = reinterpret_cast<float*>(cuda::shared_memory());
  cuda::copy_async<4>(shared + threadIdx.x, x + threadIdx.x, threadIdx.x < 5 ? 4 : 0);
  cuda::commit_copies();
  if (waits) cuda::wait_copies<0>();
  y[threadIdx.x] = shared[threadIdx.x];
  cuda::wait_copies<0>();
}

const CudaTest copy_test("an asynchronous copy", [] {
  int wrong = 0;
  for (const bool waits : {true, false}) {
    CudaBuffer<float> x(5, 1), y(32);
    cuda::launch(copy_kernel, 1, 32, 32 * sizeof(float), nullptr, x.data(), y.data(), waits);
    for (int i = 0; i < 32; ++i) wrong += close(y[i], i < 5 ? x[i] : 0, 0) != waits;
  }
  return wrong;
});

// One warp's product of a (16, 16) and b (16, 8), b stored as b^T (8, 16), through shared memory.
template <class T>
__global__ void product_kernel(const T* a, const T* bt, float* c) {
  T* shared = reinterpret_cast<T*>(cuda::shared_memory());
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  for (int i = lane; i < 256; i += 32) shared[i] = a[i];
  for (int i = lane; i < 128; i += 32) shared[256 + i] = bt[i];
  __syncwarp();
  uint32_t ra[4], rb[4];
  const int row = lane % 16, col = lane / 16 * 8;  // matrices 0..3: upper left, lower left, right
  cuda::load_matrices(ra, shared + row * 16 + col);
  cuda::load_matrices(rb, shared + 256 + lane % 8 * 16 + lane / 8 % 2 * 8);
  float rc[4] = {};
  cuda::multiply_add_16x8x16<T>(rc, ra, {rb[0], rb[1]});
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = rc[i];
}

template <class T>
int wrong_products() {
  CudaBuffer<T> a(256, 1), bt(128, 2);
  CudaBuffer<float> c(128);
  cuda::launch(product_kernel<T>, 1, 32, 384 * sizeof(T), nullptr, a.data(), bt.data(), c.data());
  int wrong = 0;
  for (int i = 0; i < 128; ++i) {
    double sum = 0;
    for (int k = 0; k < 16; ++k) sum += a.at(i / 8 * 16 + k) * bt.at(i % 8 * 16 + k);
    wrong += !close(c[i], sum, 1e-6);
  }
  return wrong;
}

__global__ void tf32_kernel(const float* a, const float* b, float* c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t ra[4], rb[2];
  for (int i = 0; i < 4; ++i) ra[i] = __float_as_uint(a[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
  for (int i = 0; i < 2; ++i) rb[i] = __float_as_uint(b[(t + i * 4) * 8 + g]);
  float rc[4] = {};
  cuda::multiply_add_16x8x8_tf32(rc, ra, rb);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = rc[i];
}

const CudaTest product_test("tensor cores", [] {
  int wrong = wrong_products<cuda::bf16>() + wrong_products<cuda::half>();
  CudaBuffer<float> a(128, 1), b(64, 2), c(128);
  cuda::launch(tf32_kernel, 1, 32, 0, nullptr, a.data(), b.data(), c.data());
  for (int i = 0; i < 128; ++i) {
    double sum = 0;
    for (int k = 0; k < 8; ++k) sum += double{a[i / 8 * 8 + k]} * b[k * 8 + i % 8];
    wrong += !close(c[i], sum, 8 * 0x1p-10) || close(c[i], sum, 1e-7);
  }
  return wrong;
});

}  // namespace
}  // namespace dlkernels::test

int main(int argc, char** argv) {
  using namespace dlkernels::test;
  using dlkernels::cuda::Schedule;
  if (argc > 1 && !std::strcmp(argv[1], "race")) {
    const int wrong = wrong_sums(true);  // first, so that its fibres have run before
    return wrong_sums(false), wrong;
  }
#ifdef __SANITIZE_THREAD__  // which sees a race in any order
  const std::vector<Schedule> schedules = {Schedule::kShuffled};
  const std::vector<bool> guards = {true};
#else
  const std::vector<Schedule> schedules = {Schedule::kForward, Schedule::kBackward,
                                           Schedule::kShuffled};
  const std::vector<bool> guards = {true, false};
#endif
  int failed = 0;
  for (const Schedule schedule : schedules)
    for (const bool at_end : guards)
      for (const auto& test : CudaTest::all()) {
        dlkernels::cuda::schedule = schedule;
        guard_at_end = at_end;
        const int wrong = test.run();
        if (wrong)
          std::printf("%s, order %d: %d wrong\n", test.name, static_cast<int>(schedule), wrong);
        failed += wrong != 0;
      }
  std::printf("%zu CUDA tests on the CPU, threads in %zu orders: %d failed\n",
              CudaTest::all().size(), schedules.size(), failed);
  return failed != 0;
}
