// Torch-free tests of the CUDA kernels, run on the CPU (cuda_on_cpu.h), in each order of threads,
// each buffer against a guard page.
#pragma once
#include "cuda_on_cpu.h"
#include "kernels_test.h"

namespace dlkernels::test {

// A test returns the number of wrong results; a static CudaTest registers it.
struct CudaTest {
  using Run = int (*)();
  CudaTest(const char* name, Run run) { all().push_back({name, run}); }

  struct Entry {
    const char* name;
    Run run;
  };
  static std::vector<Entry>& all() {
    static std::vector<Entry> tests;
    return tests;
  }
};

template <class T>
constexpr cuda::DType kDType = std::is_same_v<T, float>        ? cuda::DType::kFloat32
                               : std::is_same_v<T, cuda::bf16> ? cuda::DType::kBFloat16
                                                               : cuda::DType::kFloat16;
// Half the distance between 1 and the next number.
template <class T>
constexpr double kEps = std::is_same_v<T, float>        ? 0x1p-24
                        : std::is_same_v<T, cuda::bf16> ? 0x1p-8
                                                        : 0x1p-11;

// f(T()) for each type; the sum of what it returns.
template <class F>
int each_type(const F& f) {
  return f(float()) + f(cuda::bf16()) + f(cuda::half());
}

// n numbers in [-1, 1), or NaN where there is no seed. It is as aligned as its size: to 16 bytes if
// n is a multiple of that many.
template <class T>
class CudaBuffer : public Buffer<T> {
 public:
  explicit CudaBuffer(int64_t n, uint32_t seed = 0) : Buffer<T>(n) {
    Buffer<float> values(n, seed);
    for (int64_t i = 0; i < n; ++i) (*this)[i] = cuda::from_float<T>(seed ? values[i] : NAN);
  }
  double at(int64_t i) { return cuda::to_float((*this)[i]); }
};

}  // namespace dlkernels::test
