// Operands in the layout of the matrix kernels: channels last, those of a group padded with zeros
// to whole 16-byte accesses. The ReLU mask or the max-pool's gradient is applied while packing, and
// the bias's gradient is summed. Also the sums of partial sums.
#pragma once
#include "cuda/conv2d/pass.cuh"

namespace dlkernels::cuda::conv {

constexpr int kPackThreads = 256;
constexpr int kPackRows = 64, kPackChannels = 64;  // a tile
constexpr int kPackPitch = kPackRows + 1;          // of the shared tile: no two lanes in one bank
constexpr int kBiasPartials = 256;                 // at most: how a bias's sum is cut

// to[(n * P + p) * groups * padded + g * padded + c] = x(n, g * channels + c, p), 0 for c >=
// channels, p being a pixel of H x W. x by its strides: sc = 1, or sw = 1 and sh = W.
struct Packing {
  int64_t N;
  int H, W;  // of `to`
  int groups, channels, padded;
  View x;
  const void* relu_y;     // as x, or null
  const uint8_t* argmax;  // (N, H / 2, W / 2, C), then x is as large; or null
  void* to;               // or null
  float* sums;            // [partials][groups * padded] of what goes to `to`, or null
  bool whole = false;     // x and argmax can be read 16 bytes of x at a time
  Divider by_plane, by_width, by_padded;

  Packing(int64_t N, int64_t H, int64_t W, int64_t groups, int64_t channels, int64_t padded,
          const View& x, void* to)
      : N(N),
        H(static_cast<int>(H)),
        W(static_cast<int>(W)),
        groups(static_cast<int>(groups)),
        channels(static_cast<int>(channels)),
        padded(static_cast<int>(padded)),
        x(x),
        relu_y(nullptr),
        argmax(nullptr),
        to(to),
        sums(nullptr),
        by_plane(H * W),
        by_width(W),
        by_padded(padded) {}

  __host__ __device__ int64_t rows() const { return N * H * W; }
  __host__ __device__ int64_t width() const { return int64_t{groups} * padded; }
  __host__ __device__ int64_t row_tiles() const { return ceil_div(rows(), kPackRows); }
  int64_t partials() const { return min(row_tiles(), int64_t{kBiasPartials}); }
};

// One element: 0 where there is none, or where its gradient does not pass.
template <class T>
__device__ T packed_element(const Packing& p, int64_t n, int h, int w, int padded_channel) {
  const T zero = from_float<T>(0);
  const int g = p.by_padded.divide(padded_channel), i = p.by_padded.remainder(padded_channel, g);
  if (g >= p.groups || i >= p.channels) return zero;
  if (p.argmax) {
    const int PH = p.H / 2, PW = p.W / 2;
    if (h / 2 >= PH || w / 2 >= PW) return zero;
    const int64_t C = int64_t{p.groups} * p.channels, c = int64_t{g} * p.channels + i;
    if (p.argmax[((n * PH + h / 2) * PW + w / 2) * C + c] != h % 2 * 2 + w % 2) return zero;
    h /= 2, w /= 2;
  }
  const int64_t at = n * p.x.sn + g * p.x.sg + i * p.x.sc + h * p.x.sh + w * p.x.sw;
  if (p.relu_y && to_float(static_cast<const T*>(p.relu_y)[at]) <= 0) return zero;
  return static_cast<const T*>(p.x.data)[at];
}

// A run of them. Where x is channels last in whole runs, 16 bytes are read at once.
template <class T>
__device__ Pack<T> packed_run(const Packing& p, int64_t n, int h, int w, int channel) {
  constexpr int kSize = Pack<T>::kSize;
  Pack<T> run;
  if (!p.whole) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) run.values[j] = packed_element<T>(p, n, h, w, channel + j);
    return run;
  }
  struct alignas(kSize) Elements {
    uint8_t values[kSize];
  };
  Elements elements = {};
  const int element = h % 2 * 2 + w % 2;
  bool none = false;
  if (p.argmax) {
    const int PH = p.H / 2, PW = p.W / 2;
    h /= 2, w /= 2;
    none = h >= PH || w >= PW;
    if (!none)
      elements = *reinterpret_cast<const Elements*>(p.argmax + ((n * PH + h) * PW + w) * p.width() +
                                                    channel);
  }
  Pack<T> of_y = {};
  if (!none) {
    const int64_t at = (n * p.x.sn + h * p.x.sh + w * p.x.sw + channel) / kSize;
    run = static_cast<const Pack<T>*>(p.x.data)[at];
    if (p.relu_y) of_y = static_cast<const Pack<T>*>(p.relu_y)[at];
  }
#pragma unroll
  for (int j = 0; j < kSize; ++j)
    if (none || (p.argmax && elements.values[j] != element) ||
        (p.relu_y && to_float(of_y.values[j]) <= 0))
      run.values[j] = from_float<T>(0);
  return run;
}

// A block's sums of its channels, from those of its threads, kSize channels each.
template <int kSize>
__device__ void store_sums(const Packing& p, const float (&sums)[kSize], int first_channel) {
  constexpr int kRuns = kPackChannels / kSize;
  float* const all = reinterpret_cast<float*>(shared_memory());  // [row of threads][channel]
#pragma unroll
  for (int j = 0; j < kSize; ++j)
    all[threadIdx.x / kRuns * kPackChannels + threadIdx.x % kRuns * kSize + j] = sums[j];
  __syncthreads();
  const int c = threadIdx.x;
  const int64_t width = p.width();
  if (c >= kPackChannels || first_channel + c >= width) return;
  float sum = 0;
  for (int i = 0; i < kPackThreads / kRuns; ++i) sum += all[i * kPackChannels + c];
  p.sums[blockIdx.x * width + first_channel + c] = sum;
}

// Blocks stride over tiles of rows; blockIdx.y is the tile of channels. Where x is in planes
// (kPlanes), lanes read along a row of pixels and write along channels, through shared memory.
template <class T, bool kPlanes>
__global__ void __launch_bounds__(kPackThreads) pack_kernel(const __grid_constant__ Packing p) {
  constexpr int kSize = Pack<T>::kSize, kRuns = kPackChannels / kSize;
  constexpr int kRowStep = kPackThreads / kRuns;
  T* const shared = reinterpret_cast<T*>(shared_memory());
  const int first_channel = static_cast<int>(blockIdx.y) * kPackChannels;
  const int run = threadIdx.x % kRuns;
  const int channel = first_channel + run * kSize;
  const int64_t rows = p.rows(), width = p.width();
  float sums[kSize] = {};
  for (int64_t tile = blockIdx.x; tile < p.row_tiles(); tile += gridDim.x) {
    const int64_t begin = tile * kPackRows, plane = int64_t{p.H} * p.W;
    const int64_t first_image = begin / plane;
    const int in_image = static_cast<int>(begin - first_image * plane);
    const auto with_pixel = [&](int row, const auto& f) {
      const int at = in_image + row;
      const int n = p.by_plane.divide(at), pixel = p.by_plane.remainder(at, n);
      const int h = p.by_width.divide(pixel), w = p.by_width.remainder(pixel, h);
      f(first_image + n, h, w);
    };
    if constexpr (kPlanes) {
      const int row = threadIdx.x % kPackRows;
      if (begin + row < rows)
        with_pixel(row, [&](int64_t n, int h, int w) {
#pragma unroll
          for (int i = 0; i < kPackChannels; i += kPackThreads / kPackRows) {
            const int c = i + threadIdx.x / kPackRows;
            shared[c * kPackPitch + row] = packed_element<T>(p, n, h, w, first_channel + c);
          }
        });
      __syncthreads();
    }
    if (channel < width) {
#pragma unroll
      for (int i = 0; i < kPackRows; i += kRowStep) {
        const int row = i + threadIdx.x / kRuns;
        if (begin + row >= rows) continue;
        Pack<T> pack;
        if constexpr (kPlanes)
#pragma unroll
          for (int j = 0; j < kSize; ++j)
            pack.values[j] = shared[(run * kSize + j) * kPackPitch + row];
        else
          with_pixel(row,
                     [&](int64_t n, int h, int w) { pack = packed_run<T>(p, n, h, w, channel); });
#pragma unroll
        for (int j = 0; j < kSize; ++j) sums[j] += to_float(pack.values[j]);
        if (p.to)
          reinterpret_cast<Pack<T>*>(p.to)[((begin + row) * width + channel) / kSize] = pack;
      }
    }
    if constexpr (kPlanes) __syncthreads();
  }
  if (p.sums) store_sums(p, sums, first_channel);
}

template <class T>
Error pack(Packing p, Stream stream) {
  p.whole = p.x.sc == 1 && p.channels == p.padded &&
            aligned16(static_cast<const T*>(p.x.data), static_cast<const T*>(p.relu_y)) &&
            reinterpret_cast<uintptr_t>(p.argmax) % Pack<T>::kSize == 0;
  const int64_t blocks = p.sums ? p.partials() : striding_grid(p.row_tiles(), 1);
  const dim3 grid(static_cast<unsigned>(blocks),
                  static_cast<unsigned>(ceil_div(p.width(), kPackChannels)));
  constexpr int kTile = kPackChannels * kPackPitch * int{sizeof(T)};
  constexpr int kSums = kPackThreads * 16 / int{sizeof(T)} * int{sizeof(float)};
  return launch(p.x.sc == 1 ? pack_kernel<T, false> : pack_kernel<T, true>, grid, kPackThreads,
                max(kTile, kSums), stream, p);
}

// out(o, i, tap) = sum over `rows` of partials[row][(o * taps + tap) * padded + i], in order, for i
// < channels; out is (o, tap, i), or (o, i, tap) in planes.
struct Summing {
  const float* partials;
  int rows;
  int64_t outer;
  int taps, channels, padded;
  bool planes;
  void* out;
};

constexpr int kSumRows = 8;  // threads that share a sum

template <class T>
__global__ void __launch_bounds__(kWarp* kSumRows) sum_kernel(const __grid_constant__ Summing s) {
  float* const shared = reinterpret_cast<float*>(shared_memory());
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t width = s.outer * s.taps * s.padded;
  const int64_t at = int64_t{blockIdx.x} * kWarp + lane;
  float sum = 0;
  if (at < width)
#pragma unroll 8
    for (int row = warp; row < s.rows; row += kSumRows) sum += s.partials[row * width + at];
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || at >= width) return;
#pragma unroll
  for (int i = 1; i < kSumRows; ++i) sum += shared[i * kWarp + lane];
  const int64_t rest = at / s.padded, o = rest / s.taps;
  const int64_t i = at - rest * s.padded, tap = rest - o * s.taps;
  if (i >= s.channels) return;
  const int64_t to =
      s.planes ? (o * s.channels + i) * s.taps + tap : (o * s.taps + tap) * s.channels + i;
  static_cast<T*>(s.out)[to] = from_float<T>(sum);
}

template <class T>
Error sum_partials(const Summing& s, Stream stream) {
  return launch(sum_kernel<T>, static_cast<unsigned>(ceil_div(s.outer * s.taps * s.padded, kWarp)),
                kWarp * kSumRows, kWarp * kSumRows * int{sizeof(float)}, stream, s);
}

}  // namespace dlkernels::cuda::conv
