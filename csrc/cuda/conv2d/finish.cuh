// The epilogue of a convolution: bias, ReLU, max-pool and the store.
#pragma once
#include "cuda/conv2d/pass.cuh"

namespace dlkernels::cuda::conv {

constexpr uint8_t kNoElement = 255;

// The maximum of a window after ReLU and which it is: the first, or the last NaN.
struct Pooled {
  float value;
  uint8_t element;
};
__device__ inline float relu_of(float x) { return x < 0 ? 0 : x; }  // NaN and -0.0 are not < 0
__device__ inline Pooled pool_window(const float (&z)[4]) {
  Pooled best = {relu_of(z[0]), 0};
#pragma unroll
  for (int e = 1; e < 4; ++e) {
    const float v = relu_of(z[e]);
    if (v > best.value || v != v) best = {v, static_cast<uint8_t>(e)};
  }
  if (best.value <= 0) best.element = kNoElement;
  return best;
}

// The first n of values to channels `to`, `step` apart; `packed` if whole runs are aligned.
template <class T, int kChannels>
__device__ void store_channels(T* to, int64_t step, const float (&values)[kChannels], int n,
                               bool packed) {
  constexpr int kSize = Pack<T>::kSize;
  if (packed && n == kChannels) {
#pragma unroll
    for (int p = 0; p < kChannels / kSize; ++p) {
      Pack<T> pack;
#pragma unroll
      for (int i = 0; i < kSize; ++i) pack.values[i] = from_float<T>(values[p * kSize + i]);
      reinterpret_cast<Pack<T>*>(to)[p] = pack;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kChannels; ++i)
    if (i < n) to[i * step] = from_float<T>(values[i]);
}

// bias may be null, and argmax is where the pass does not pool.
struct Finish {
  View y;  // not const
  const void* bias;
  uint8_t* argmax;
  bool relu;
  int64_t channels;  // a group
  bool packed;       // eight of y, from a multiple of as many on, are aligned to 16 bytes

  Finish(const View& y, int64_t channels, const void* bias, uint8_t* argmax, bool relu)
      : y(y),
        bias(bias),
        argmax(argmax),
        relu(relu),
        channels(channels),
        packed(y.sc == 1 && channels % 8 == 0 && aligned16(static_cast<const char*>(y.data))) {}

  // Of this block's gathers.
  template <class T, int kChannels>
  __device__ void put(const Piece& piece, int64_t image, const Place& p, int channel, int n,
                      float (&sums)[kChannels]) const {
    add_bias<T>(piece, channel, n, sums);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) sums[i] = relu ? relu_of(sums[i]) : sums[i];
    const int64_t a = piece.h.first + int64_t{p.a} * piece.h.every;
    const int64_t b = piece.w.first + int64_t{p.b} * piece.w.every;
    store_channels(at<T>(piece, channel) + image * y.sn + a * y.sh + b * y.sw, y.sc, sums, n,
                   packed);
  }

  // p is the first of four, which are a window.
  template <class T, int kChannels>
  __device__ void put_window(const Pass& pass, const Piece& piece, int64_t image, const Place& p,
                             int channel, int n, float (&sums)[4][kChannels]) const {
    const int64_t window = image * pass.plane + p.a / 2 * int64_t{piece.w.count / 2} + p.b / 2;
    const int64_t element = (window * pass.groups + piece.group) * pass.written + channel;
    float pooled[kChannels];
#pragma unroll
    for (int e = 0; e < 4; ++e) add_bias<T>(piece, channel, n, sums[e]);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const float z[4] = {sums[0][i], sums[1][i], sums[2][i], sums[3][i]};
      const Pooled best = pool_window(z);
      pooled[i] = best.value;
      if (i < n) argmax[element + i] = best.element;
    }
    store_channels(at<T>(piece, channel) + image * y.sn + p.a / 2 * y.sh + p.b / 2 * y.sw, y.sc,
                   pooled, n, packed);
  }

 private:
  template <class T>
  __device__ T* at(const Piece& piece, int channel) const {
    return static_cast<T*>(const_cast<void*>(y.data)) + piece.group * y.sg + channel * y.sc;
  }
  template <class T, int kChannels>
  __device__ void add_bias(const Piece& piece, int channel, int n, float (&sums)[kChannels]) const {
    if (!bias) return;
    const T* const b = static_cast<const T*>(bias) + piece.group * channels + channel;
#pragma unroll
    for (int i = 0; i < kChannels; ++i)
      if (i < n) sums[i] += to_float(b[i]);
  }
};

}  // namespace dlkernels::cuda::conv
