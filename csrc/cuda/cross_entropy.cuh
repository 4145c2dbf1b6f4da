// How the rows of cross_entropy are assigned to threads, and a thread's part of a row.
#pragma once
#include "cuda/common.cuh"

namespace dlkernels::cuda {

constexpr int kThreads = 256, kLongThreads = 512;
constexpr int kCounts = 128;          // parts of the count that a mean divides by
constexpr int kReduction = 1024;      // bytes of shared memory: a float a thread
constexpr int kLongCache = 96 << 10;  // two blocks fit beside each other

// Who shares a row: 1 to 32 lanes of a warp, a block, or, where rows are interleaved, the threads
// of one lane in 1 to 8 warps.
enum class Team { kLanes, kBlock, kColumns };

// How rows are laid on threads. It follows their shape alone, as the order of adding does.
struct Plan {
  Team team;
  int threads, members, rows_a_block;
  int cached;  // packs of a row in shared memory
  int shared;  // bytes
};

inline int power_of_two(int64_t min, int max) {
  int n = 1;
  while (n < min && n < max) n *= 2;
  return n;
}

inline Plan plan_of(int64_t C, int64_t inner, int bytes) {
  const auto min64 = [](int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); };
  if (inner > 1) {
    const int members = power_of_two(ceil_div(C, 16), kThreads / kWarp);
    const int rows = kThreads / members, cached = min64(C, (40 << 10) / (rows * bytes));
    return {Team::kColumns, kThreads, members, rows, cached, kReduction + rows * cached * bytes};
  }
  const int64_t packs = ceil_div(C * bytes, 16) + 1;  // a row may begin in the middle of one
  if (C * bytes <= 4096) {
    const int members = power_of_two(packs - 1, kWarp), rows = kThreads / members;
    const int cached = static_cast<int>(packs);
    return {Team::kLanes, kThreads, members, rows, cached, kReduction + rows * cached * 16};
  }
  const int threads = packs <= 1024 ? kThreads : kLongThreads;
  const int cached = min64(packs, kLongCache / 16);
  return {Team::kBlock, threads, threads, 1, cached, kReduction + cached * 16};
}

template <class T>
struct Rows {
  const T *x, *probabilities, *weight;
  const int64_t* target;
  int64_t rows, C, inner, ignore_index;
  T *loss, *grad;
  int* no_class;
  float one_minus_smoothing, smoothing_per_class;  // of the target, and what every class gets
  float divisor;                                   // of the loss, where there are no counts
  const float* counts;                             // whose sum it is otherwise
  int count_parts;
  float* partials;  // of the loss, one a block; or null: the rows' own
  int members, cached;
  bool packed;  // arrays of x's layout have its alignment modulo 16 bytes

  __device__ bool ignores(int64_t row) const { return target && target[row] == ignore_index; }
};

template <class T>
__device__ float exp_of(float x) {
  if constexpr (sizeof(T) == 4)
    return expf(x);
  else
    return __expf(x);  // its error is far below what T keeps
}

// A thread's part of a row: packs index, index + size, ... of P classes, which pack 0 may begin
// `pad` classes before the first. [begin, end) are whole and aligned.
template <Team kTeam, class T>
struct Share {
  static constexpr int P = kTeam == Team::kColumns ? 1 : Pack<T>::kSize;
  using Packed = Pack<T, P>;

  int64_t row, first, step;  // first: the element of class 0
  int index, size, C, pad = 0, packs, begin, end;

  __device__ explicit Share(const Rows<T>& a)
      : step(a.inner), size(a.members), C(static_cast<int>(a.C)) {
    const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
    index = kTeam == Team::kColumns ? warp % size : kTeam == Team::kBlock ? thread : thread % size;
    const int team = kTeam == Team::kColumns ? warp / size * kWarp + lane : thread / size;
    row = int64_t{blockIdx.x} * (static_cast<int>(blockDim.x) / size) + team;
    if (row >= a.rows) C = 0;
    first = kTeam == Team::kColumns ? row / step * a.C * step + row % step : row * a.C;
    if (a.packed && C)
      pad = static_cast<int>(reinterpret_cast<uintptr_t>(a.x + first) % sizeof(Packed) / sizeof(T));
    packs = C ? (C + pad + P - 1) / P : 0;
    const bool whole = a.packed || P == 1;
    begin = whole ? (pad + P - 1) / P : packs;
    end = whole ? (C + pad) / P : 0;
  }

  __device__ int class_of(int pack) const { return pack * P - pad; }
  __device__ bool has(int c) const { return c >= 0 && c < C; }
  __device__ bool is_whole(int pack) const { return pack >= begin && pack < end; }

  // Pack i of what is laid out as x; classes that are not there are -inf.
  __device__ Packed load_whole(const T* from, int i) const {
    return load_pack<P>(from + (first + class_of(i) * step));
  }
  __device__ Packed load(const T* from, int i) const {
    if (is_whole(i)) return load_whole(from, i);
    Packed v;
#pragma unroll
    for (int j = 0; j < P; ++j)
      v.values[j] =
          has(class_of(i) + j) ? from[first + (class_of(i) + j) * step] : from_float<T>(-INFINITY);
    return v;
  }
  __device__ void store(const Packed& v, T* to, int i) const {
    if (is_whole(i)) return store_pack(v, to + (first + class_of(i) * step));
#pragma unroll
    for (int j = 0; j < P; ++j)
      if (has(class_of(i) + j)) to[first + (class_of(i) + j) * step] = v.values[j];
  }
  // f(i, pack i of `from`) for the thread's packs; of whole ones kUnroll are on their way before
  // the first is used.
  template <int kUnroll, class F>
  __device__ void each(const T* from, const F& f) const {
    int i = index;
#pragma unroll 1
    for (; i + (kUnroll - 1) * size < end; i += kUnroll * size) {
      Packed v[kUnroll];
      v[0] = load(from, i);  // a row's first may be a part of one
#pragma unroll
      for (int u = 1; u < kUnroll; ++u) v[u] = load_whole(from, i + u * size);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) f(i + u * size, v[u]);
    }
#pragma unroll 1
    for (; i < packs; i += size) f(i, load(from, i));
  }

  // Of all who share the row; each gets it.
  template <class F>
  __device__ float all(float x, const F& f) const {
    float* shared = reinterpret_cast<float*>(shared_memory());
    if constexpr (kTeam == Team::kLanes) {
      for (int distance = size / 2; distance > 0; distance /= 2)
        x = f(x, __shfl_xor_sync(kAllLanes, x, distance));
      return x;
    } else if constexpr (kTeam == Team::kBlock) {
      __syncthreads();  // the last one is read
      return over_block(x, shared, f);
    } else {
      if (size == 1) return x;
      __syncthreads();
      shared[threadIdx.x] = x;
      __syncthreads();
      const float* column = shared + (threadIdx.x / kWarp - index) * kWarp + threadIdx.x % kWarp;
      float sum = column[0];
      for (int i = 1; i < size; ++i) sum = f(sum, column[i * kWarp]);
      return sum;
    }
  }
  // The thread's place for pack i < cached in shared memory, which no other thread reads.
  __device__ Packed& cache(int i, int cached) const {
    Packed* packs = reinterpret_cast<Packed*>(shared_memory() + kReduction);
    const int thread = threadIdx.x;
    if constexpr (kTeam == Team::kColumns)
      return packs[(thread / kWarp / size * cached + i) * kWarp + thread % kWarp];
    else
      return packs[thread / size * cached + i];
  }
};

}  // namespace dlkernels::cuda
