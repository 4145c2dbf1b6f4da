// max_pool2d, its gradient as a gather over the windows that cover an element, and PyTorch's
// indices. A thread takes packs: 16 bytes of channels, or of a row in a plane's gradient. Memory
// bounds it.
#include "cuda/common.cuh"

namespace dlkernels::cuda {

namespace {

constexpr int kThreads = 256;

// PoolAxis in 32 bits.
struct Axis {
  int in, out, kernel, stride, pad, dilation;
  int reach;  // from a window's first element to its last, or to outside
  Divider by_stride, by_dilation;

  explicit Axis(const PoolAxis& a)
      : in(static_cast<int>(a.in)),
        out(static_cast<int>(a.out)),
        kernel(static_cast<int>(a.kernel)),
        stride(static_cast<int>(smaller(a.stride, a.in + a.pad))),  // then there is one window
        pad(static_cast<int>(a.pad)),
        // From its first element, while that is outside.
        dilation(static_cast<int>(smaller(a.dilation, a.in + a.pad))),
        reach(static_cast<int>(smaller((a.kernel - 1) * a.dilation, a.in + a.pad))),
        by_stride(stride),
        by_dilation(dilation) {}

  __device__ int start(int o) const { return o * stride - pad; }
  // The windows that may cover position i are [first(i), last(i)].
  __device__ int first(int i) const {
    const int start = i + pad - reach;
    return start <= 0 ? 0 : by_stride.divide(start + stride - 1);
  }
  __device__ int last(int i) const { return min(by_stride.divide(i + pad), out - 1); }
  // Which element of window o position i is, or -1.
  __device__ int element(int o, int i) const {
    int k = i + pad - o * stride;
    return by_dilation.split(k) == 0 ? k : -1;
  }

  static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
};

// One of (images, rows, columns, packs).
struct Place {
  int64_t image;
  int row, column, pack;
};

// Finds them by a block's first, so that 32 bits are enough for the others.
struct Places {
  int rows, columns, packs;
  Divider by_rows, by_columns, by_packs;

  Places(int64_t rows, int64_t columns, int64_t packs)
      : rows(static_cast<int>(rows)),
        columns(static_cast<int>(columns)),
        packs(static_cast<int>(packs)),
        by_rows(rows),
        by_columns(columns),
        by_packs(packs) {}

  __device__ Place first(int64_t i) const {
    const int64_t pixel = i / packs, row = pixel / columns, image = row / rows;
    return {image, static_cast<int>(row - image * rows), static_cast<int>(pixel - row * columns),
            static_cast<int>(i - pixel * packs)};
  }
  __device__ Place after(Place p, int n) const {
    int carry = p.pack + n;
    p.pack = by_packs.split(carry);
    carry += p.column;
    p.column = by_columns.split(carry);
    carry += p.row;
    p.row = by_rows.split(carry);
    p.image += carry;
    return p;
  }
};

struct Shape {
  Axis h, w;
  int64_t C;
  int64_t row_step, step;  // from one element of a window to the next
  Places places;           // of what is written
  int64_t count;           // of places

  __device__ int64_t window(const Place& p, int oh, int ow) const {
    return ((p.image * h.out + oh) * w.out + ow) * C;
  }
};

Shape shape(const Pool& p, const Places& places, int64_t count) {
  const Axis h(p.h), w(p.w);
  return {h, w, p.C, h.dilation * p.w.in * p.C, w.dilation * p.C, places, count};
}
Shape windows(const Pool& p, int pack) {
  const int64_t packs = p.C / pack;
  return shape(p, Places(p.h.out, p.w.out, packs), p.images * p.h.out * p.w.out * packs);
}
// A pack is of channels, or in planes of a row.
Shape elements(const Pool& p, int pack) {
  const int64_t columns = p.C == 1 ? p.w.in / pack : p.w.in, packs = p.C == 1 ? 1 : p.C / pack;
  return shape(p, Places(p.h.in, columns, packs), p.images * p.h.in * columns * packs);
}

// ---- forward ----------------------------------------------------------------------------------

template <int P>
struct Best {
  float value[P];
  int at[P];  // kh * KW + kw

  // PyTorch's rule: a later element wins if it is greater or NaN.
  template <class T>
  __device__ void meet(const Pack<T, P>& x, int k) {
#pragma unroll
    for (int j = 0; j < P; ++j) {
      const float v = to_float(x.values[j]);
      if (v > value[j] || v != v) {
        value[j] = v;
        at[j] = k;
      }
    }
  }
};

// The position of the first element inside, or the number of elements if there is none.
__device__ inline int first_inside(const Axis& a, int start) {
  int k = start < 0 ? a.by_dilation.divide(a.dilation - 1 - start) : 0;
  return k < a.kernel && start + int64_t{k} * a.dilation < a.in ? k : a.kernel;
}

// Of a K x K window, unrolled; of any window for K = 0.
template <int P, int K, class T>
__device__ Best<P> best_of(const T* __restrict__ x, const Shape& s, const Place& p) {
  const int h0 = s.h.start(p.row), w0 = s.w.start(p.column);
  const int KW = K ? K : s.w.kernel;
  const int64_t at = ((p.image * s.h.in + h0) * s.w.in + w0) * s.C + p.pack * P;
  const auto outside = [](int i, const Axis& a) {
    return static_cast<unsigned>(i) >= static_cast<unsigned>(a.in);
  };
  Best<P> best;
#pragma unroll
  for (int j = 0; j < P; ++j) {
    best.value[j] = -INFINITY;
    best.at[j] = kNoElement;
  }
  if constexpr (K > 0) {
#pragma unroll
    for (int kh = 0; kh < K; ++kh) {
      const bool no_row = outside(h0 + kh * s.h.dilation, s.h);
      Pack<T, P> v[K];  // all on their way before the first is compared
#pragma unroll
      for (int kw = 0; kw < K; ++kw) {
#pragma unroll
        for (int j = 0; j < P; ++j) v[kw].values[j] = from_float<T>(-INFINITY);
        if (!no_row && !outside(w0 + kw * s.w.dilation, s.w))
          v[kw] = load_pack<P>(x + (at + (kh * s.row_step + kw * s.step)));
      }
#pragma unroll
      for (int kw = 0; kw < K; ++kw) best.meet(v[kw], kh * K + kw);
    }
  } else {
    for (int kh = 0, h = h0; kh < s.h.kernel && h < s.h.in; ++kh, h += s.h.dilation)
      for (int kw = 0, w = w0; kw < KW && w < s.w.in; ++kw, w += s.w.dilation)
        if (h >= 0 && w >= 0)
          best.meet(load_pack<P>(x + (at + (kh * s.row_step + kw * s.step))), kh * KW + kw);
  }
  return best;
}

// Where nothing has won against -inf it is the first element, if there is one.
template <int P>
__device__ void settle(Best<P>& best, const Shape& s, const Place& p) {
#pragma unroll
  for (int j = 0; j < P; ++j)
    if (best.at[j] == kNoElement) {
      const int kh = first_inside(s.h, s.h.start(p.row));
      const int kw = first_inside(s.w, s.w.start(p.column));
      if (kh < s.h.kernel && kw < s.w.kernel) best.at[j] = kh * s.w.kernel + kw;
    }
}

// A thread does several: 2 bytes on their way from each of few threads would not fill the memory's
// pipe.
template <class T, int P, int K>
__global__ void __launch_bounds__(kThreads)
    max_pool2d_kernel(const T* __restrict__ x, T* __restrict__ y, uint8_t* __restrict__ argmax,
                      Shape s) {
  constexpr int kItems = P == 1 && K > 0 ? 4 : 1;
  const int64_t begin = int64_t{blockIdx.x} * (kThreads * kItems);
  const Place first = s.places.first(begin);
  Best<P> best[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int64_t n = i * kThreads + threadIdx.x;
    const int64_t there = min(n, s.count - 1 - begin);  // the last one again: no branch
    best[i] = best_of<P, K>(x, s, s.places.after(first, static_cast<int>(there)));
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int64_t o = begin + i * kThreads + threadIdx.x;
    if (o >= s.count) return;
    settle(best[i], s, s.places.after(first, i * kThreads + threadIdx.x));
    Pack<T, P> values;
    Pack<uint8_t, P> at;
#pragma unroll
    for (int j = 0; j < P; ++j) {
      values.values[j] = from_float<T>(best[i].value[j]);
      at.values[j] = static_cast<uint8_t>(best[i].at[j]);
    }
    store_pack(values, y + o * P);
    if (argmax) store_pack(at, argmax + o * P);
  }
}

template <int K, int P, class T>
Error pool(const void* x, T* y, uint8_t* argmax, const Pool& p, Stream stream) {
  constexpr int kItems = P == 1 && K > 0 ? 4 : 1;
  const Shape s = windows(p, P);
  return launch(max_pool2d_kernel<T, P, K>,
                static_cast<unsigned>(ceil_div(s.count, kThreads * kItems)), kThreads, 0, stream,
                static_cast<const T*>(x), y, argmax, s);
}

// ---- backward ---------------------------------------------------------------------------------

// Of P channels of an element.
template <class T, int P>
__global__ void __launch_bounds__(kThreads)
    max_pool2d_backward_kernel(const T* __restrict__ grad_y, const uint8_t* __restrict__ argmax,
                               T* __restrict__ grad_x, Shape s) {
  const int64_t begin = int64_t{blockIdx.x} * kThreads, i = begin + threadIdx.x;
  if (i >= s.count) return;
  const Place p = s.places.after(s.places.first(begin), threadIdx.x);
  float sums[P] = {};
  const int last_h = s.h.last(p.row), first_w = s.w.first(p.column), last_w = s.w.last(p.column);
  for (int oh = s.h.first(p.row); oh <= last_h; ++oh) {
    const int kh = s.h.element(oh, p.row);
    for (int ow = first_w; kh >= 0 && ow <= last_w; ++ow) {
      const int kw = s.w.element(ow, p.column);
      if (kw < 0) continue;
      const int64_t o = s.window(p, oh, ow) + int64_t{p.pack} * P;
      const auto grad = load_pack<P>(grad_y + o);
      const auto at = load_pack<P>(argmax + o);
#pragma unroll
      for (int j = 0; j < P; ++j)
        if (at.values[j] == kh * s.w.kernel + kw) sums[j] += to_float(grad.values[j]);
    }
  }
  Pack<T, P> out;
#pragma unroll
  for (int j = 0; j < P; ++j) out.values[j] = from_float<T>(sums[j]);
  store_pack(out, grad_x + i * P);
}

// Of P elements of a plane's row: each window that covers one is read once for all of them.
template <class T, int P>
__global__ void __launch_bounds__(kThreads)
    max_pool2d_backward_plane_kernel(const T* __restrict__ grad_y,
                                     const uint8_t* __restrict__ argmax, T* __restrict__ grad_x,
                                     Shape s) {
  const int64_t begin = int64_t{blockIdx.x} * kThreads, i = begin + threadIdx.x;
  if (i >= s.count) return;
  const Place p = s.places.after(s.places.first(begin), threadIdx.x);
  const int w = p.column * P, KW = s.w.kernel;
  float sums[P] = {};
  const int last_h = s.h.last(p.row), first_w = s.w.first(w), last_w = s.w.last(w + P - 1);
  for (int oh = s.h.first(p.row); oh <= last_h; ++oh) {
    const int kh = s.h.element(oh, p.row);
    const int64_t row = s.window(p, oh, 0);
    for (int ow = first_w; kh >= 0 && ow <= last_w; ++ow) {
      const float grad = to_float(grad_y[row + ow]);
      const int kw = argmax[row + ow] - kh * KW;
      const int64_t at = kw >= 0 && kw < KW ? s.w.start(ow) + int64_t{kw} * s.w.dilation - w : -1;
#pragma unroll
      for (int j = 0; j < P; ++j)
        if (at == j) sums[j] += grad;
    }
  }
  Pack<T, P> out;
#pragma unroll
  for (int j = 0; j < P; ++j) out.values[j] = from_float<T>(sums[j]);
  store_pack(out, grad_x + i * P);
}

template <int P, class T>
Error pool_backward(const void* grad_y, const uint8_t* argmax, T* grad_x, const Pool& p,
                    Stream stream) {
  const Shape s = elements(p, P);
  return launch(
      p.C == 1 ? max_pool2d_backward_plane_kernel<T, P> : max_pool2d_backward_kernel<T, P>,
      static_cast<unsigned>(ceil_div(s.count, kThreads)), kThreads, 0, stream,
      static_cast<const T*>(grad_y), argmax, grad_x, s);
}

__global__ void __launch_bounds__(kThreads)
    max_pool2d_indices_kernel(const uint8_t* argmax, int64_t* indices, Shape s, Divider by_kw) {
  const int64_t begin = int64_t{blockIdx.x} * kThreads, o = begin + threadIdx.x;
  if (o >= s.count) return;
  const Place p = s.places.after(s.places.first(begin), threadIdx.x);
  int kh = argmax[o];
  const bool any = kh < s.h.kernel * s.w.kernel;
  const int kw = by_kw.split(kh);
  const int64_t h = s.h.start(p.row) + int64_t{kh} * s.h.dilation;
  const int64_t w = s.w.start(p.column) + int64_t{kw} * s.w.dilation;
  const bool inside = any && h >= 0 && h < s.h.in && w >= 0 && w < s.w.in;
  indices[o] = inside ? h * s.w.in + w : -1;
}

bool is_empty(const Pool& p) {
  return p.images == 0 || p.C == 0 || p.h.in == 0 || p.w.in == 0 || p.h.out == 0 || p.w.out == 0;
}

bool can_pack(int64_t side, int pack, const uint8_t* argmax) {
  return side % pack == 0 && reinterpret_cast<uintptr_t>(argmax) % pack == 0;
}

}  // namespace

Error max_pool2d(DType dtype, const void* x, void* y, uint8_t* argmax, const Pool& pool,
                 Stream stream) {
  if (is_empty(pool)) return 0;
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int P = Pack<T>::kSize;
    const bool packed = can_pack(pool.C, P, argmax) && aligned16(x, y);
    const auto side = [&](int64_t k) { return pool.h.kernel == k && pool.w.kernel == k; };
    const auto f = side(2)   ? packed ? cuda::pool<2, P, T> : cuda::pool<2, 1, T>
                   : side(3) ? packed ? cuda::pool<3, P, T> : cuda::pool<3, 1, T>
                   : packed  ? cuda::pool<0, P, T>
                             : cuda::pool<0, 1, T>;
    return f(x, static_cast<T*>(y), argmax, pool, stream);
  });
}

Error max_pool2d_backward(DType dtype, const void* grad_y, const uint8_t* argmax, void* grad_x,
                          const Pool& pool, Stream stream) {
  if (is_empty(pool)) return 0;
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int P = Pack<T>::kSize;
    const bool packed = pool.C == 1 ? pool.w.in % P == 0 && aligned16(grad_x)
                                    : can_pack(pool.C, P, argmax) && aligned16(grad_y, grad_x);
    const auto f = packed ? pool_backward<P, T> : pool_backward<1, T>;
    return f(grad_y, argmax, static_cast<T*>(grad_x), pool, stream);
  });
}

Error max_pool2d_indices(const uint8_t* argmax, int64_t* indices, const Pool& pool, Stream stream) {
  if (is_empty(pool)) return 0;
  const Shape s = windows(pool, 1);
  return launch(max_pool2d_indices_kernel, static_cast<unsigned>(ceil_div(s.count, kThreads)),
                kThreads, 0, stream, argmax, indices, s, Divider(pool.w.kernel));
}

}  // namespace dlkernels::cuda
