// What the optimizers share: one launch over many tensors, in chunks of kChunk elements. An
// optimizer is a functor:
//   kArrays      how many arrays a tensor has (parameter, gradient, state), all of one dtype
//   Tensor       what differs between tensors besides, held in the kernel's parameters
//   bool skip()  whether nothing is to be done
//   Scalars scalars(Tensor, i)                           of tensor i, read once a block
//   void operator()(float (&v)[kArrays], const Scalars&) one element of each array, changed
//   bool writes(a)                                       whether array a is stored
#pragma once
#include "cuda/common.cuh"

namespace dlkernels::cuda {

constexpr int kChunk = 2048, kChunkThreads = 256;

// A tensor as the caller lists it.
template <class F>
struct Listed {
  void* arrays[F::kArrays];
  int64_t n;
  typename F::Tensor tensor;
};

// As many tensors as a kernel's parameters hold: 4 KB, with the functor. Not a table in memory: a
// CUDA graph keeps parameters, and nobody has to keep the table alive.
template <class F>
struct TensorTable {
  static constexpr int kMost =
      (3968 - static_cast<int>(sizeof(F))) / static_cast<int>(sizeof(Listed<F>) + sizeof(int));
  Listed<F> tensors[kMost];
  int chunk_end[kMost];  // of tensors 0 to i
  int count = 0;
  int first = 0;  // where this table starts in the caller's list

  // False where it does not fit. A tensor without elements takes a place, and no block.
  bool add(const Listed<F>& tensor) {
    const int before = count ? chunk_end[count - 1] : 0;
    const int64_t end = before + ceil_div(tensor.n, kChunk);
    if (count == kMost || end > INT32_MAX) return false;
    tensors[count] = tensor;
    chunk_end[count++] = static_cast<int>(end);
    return true;
  }
};

template <class T, class F>
__global__ void __launch_bounds__(kChunkThreads)
    multi_tensor_kernel(const __grid_constant__ TensorTable<F> table, const F f) {
  constexpr int P = Pack<T>::kSize, kPacks = kChunk / P / kChunkThreads;
  if (f.skip()) return;
  int low = 0, high = table.count - 1;  // the first tensor that ends behind this chunk
  while (low < high) {
    const int middle = (low + high) / 2;
    if (table.chunk_end[middle] > static_cast<int>(blockIdx.x))
      high = middle;
    else
      low = middle + 1;
  }
  const Listed<F>& tensor = table.tensors[low];
  const int chunk = static_cast<int>(blockIdx.x) - (low ? table.chunk_end[low - 1] : 0);
  const auto scalars = f.scalars(tensor.tensor, table.first + low);
  const int64_t begin = int64_t{chunk} * kChunk;
  const int n = static_cast<int>(min(tensor.n - begin, int64_t{kChunk}));
  T* arrays[F::kArrays];
  bool aligned = true;
#pragma unroll
  for (int a = 0; a < F::kArrays; ++a) {
    arrays[a] = static_cast<T*>(tensor.arrays[a]) + begin;
    aligned = aligned && reinterpret_cast<uintptr_t>(arrays[a]) % 16 == 0;
  }
  if (aligned && n == kChunk) {
    Pack<T> packs[kPacks][F::kArrays];  // all on their way before the first is used
#pragma unroll
    for (int i = 0; i < kPacks; ++i)
#pragma unroll
      for (int a = 0; a < F::kArrays; ++a)
        packs[i][a] = load_pack<P>(arrays[a] + (i * kChunkThreads + threadIdx.x) * P);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
#pragma unroll
      for (int j = 0; j < P; ++j) {
        float v[F::kArrays];
#pragma unroll
        for (int a = 0; a < F::kArrays; ++a) v[a] = to_float(packs[i][a].values[j]);
        f(v, scalars);
#pragma unroll
        for (int a = 0; a < F::kArrays; ++a) packs[i][a].values[j] = from_float<T>(v[a]);
      }
#pragma unroll
      for (int a = 0; a < F::kArrays; ++a)
        if (f.writes(a)) store_pack(packs[i][a], arrays[a] + (i * kChunkThreads + threadIdx.x) * P);
    }
    return;
  }
  for (int i = threadIdx.x; i < n; i += kChunkThreads) {
    float v[F::kArrays];
#pragma unroll
    for (int a = 0; a < F::kArrays; ++a) v[a] = to_float(arrays[a][i]);
    f(v, scalars);
#pragma unroll
    for (int a = 0; a < F::kArrays; ++a)
      if (f.writes(a)) arrays[a][i] = from_float<T>(v[a]);
  }
}

// f over tensors [0, count), of which listed(i) is one, in as few launches as hold them.
template <class F, class List>
Error each_tensor(DType dtype, int64_t count, const List& listed, const F& f, Stream stream) {
  static_assert(sizeof(TensorTable<F>) + sizeof(F) <= 4096, "the most a kernel can be handed");
  return with_type(dtype, [&](auto zero) -> Error {
    for (int64_t i = 0; i < count;) {
      TensorTable<F> table;
      table.first = static_cast<int>(i);
      while (i < count && table.add(listed(i))) ++i;
      const unsigned chunks = static_cast<unsigned>(table.chunk_end[table.count - 1]);
      const Error error = launch(multi_tensor_kernel<decltype(zero), F>, chunks, kChunkThreads, 0,
                                 stream, table, f);
      if (error) return error;
    }
    return 0;
  });
}

}  // namespace dlkernels::cuda
