// Memory around a kernel's call: scratch, huge pages, and tensors converted to float32.
#pragma once
#include "ops/core/torch_headers.h"

#include <sys/mman.h>

#include <cstdlib>
#include <memory>
#include <new>

namespace dlkernels {

// A new tensor of 32 MB or more, for which malloc maps fresh pages each time: huge ones took a
// cross-entropy of 2048x32000 from 49 ms to 26. Smaller memory is mostly used again.
inline Tensor advise_huge_pages(Tensor t) {
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  if (t.is_cpu() && t.nbytes() >= 16 * kHuge) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
    const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, end = begin + t.nbytes();
    madvise(reinterpret_cast<void*>(first), (end - first) / kHuge * kHuge, MADV_HUGEPAGE);
  }
  return t;
}

// 64-byte aligned floats that belong to the calling thread, until its next call.
inline float* scratch(int64_t floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<float, Free> buffer;
  thread_local int64_t size = 0;
  if (size < floats) {
    buffer.reset();
    size = 0;
    const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
    buffer.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (!buffer) throw std::bad_alloc();
    size = floats;
  }
  return buffer.get();
}

// A vector as the kernels read it: bias and its sums are float32, whatever the op's dtype.
inline Tensor to_float32(const Tensor& t) {
  return t.scalar_type() == at::kFloat ? t.contiguous() : t.to(at::kFloat).contiguous();
}
// Memory for what is to be rounded to t, which is t itself where that is float32.
inline Tensor empty_float32(const Tensor& t) {
  return t.scalar_type() == at::kFloat ? t : at::empty_like(t, at::kFloat);
}

}  // namespace dlkernels
