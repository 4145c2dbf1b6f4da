// Convolutions as they are defined, on the ordinary units: for a few channels a group, where little
// is left to do for tensor cores, and right for any.
#pragma once
#include "conv2d_pass.cuh"

namespace dlkernels::cuda {

constexpr int kDirectThreads = 256;
constexpr int kDirectRows = 4, kDirectChannels = 8;  // a thread computes
constexpr int kDirectTerms = 64;                     // of each sum at a time, with their weights shared
constexpr uint8_t kNoElement = 255;

// What becomes of a sum on its way to y. bias and argmax may be null.
struct Finish {
  View y;  // not const
  const void* bias;
  uint8_t* argmax;
  bool relu;
};

struct Direct {
  Pass pass;
  View x;
  Filter filter;
  Finish finish;
  Divisor by_summed;
  int lanes;           // threads along the channels, a power of two of at most 8
  bool channels_last;  // neighbouring threads are neighbours in channels, else in rows
  bool packed;         // 16 bytes of channels can be written at once
  int channel_tiles;   // a group
  int64_t row_tiles;   // a gather

  Direct(const Pass& pass, const View& x, const Filter& filter, const Finish& finish)
      : pass(pass), x(x), filter(filter), finish(finish), by_summed(pass.summed), lanes(1) {
    while (lanes < 8 && lanes * kDirectChannels < pass.written) lanes *= 2;
    channels_last = finish.y.sc == 1;
    packed = false;
    channel_tiles = static_cast<int>(ceil_div(pass.written, lanes * kDirectChannels));
    row_tiles = ceil_div(pass.rows(), tile_rows());
  }
  __device__ int tile_rows() const { return kDirectThreads / lanes * kDirectRows; }
  int64_t tiles() const { return row_tiles * pass.gathers() * channel_tiles * pass.groups; }
};

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

// n <= kDirectChannels values to channels from `to` on, `step` apart.
template <class T>
__device__ void store_channels(T* to, int64_t step, const float (&values)[kDirectChannels], int n,
                               bool packed) {
  if (packed && n == kDirectChannels) {
    constexpr int kSize = Pack<T>::kSize;
#pragma unroll
    for (int p = 0; p < kDirectChannels / kSize; ++p) {
      Pack<T> pack;
#pragma unroll
      for (int i = 0; i < kSize; ++i) pack.values[i] = from_float<T>(values[p * kSize + i]);
      reinterpret_cast<Pack<T>*>(to)[p] = pack;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kDirectChannels; ++i)
    if (i < n) to[i * step] = from_float<T>(values[i]);
}

// Terms [begin, begin + n) of the sums: their weights for a tile of channels, [term][channel].
template <class T>
__device__ void load_weights(const Direct& d, const Gather& h, const Gather& w, int group,
                             int channel, int begin, int n, float* weights) {
  const int width = d.lanes * kDirectChannels;
  const T* const from = static_cast<const T*>(d.filter.data) + group * d.filter.sg;
  for (int i = threadIdx.x; i < n * width; i += kDirectThreads) {
    const int term = begin + i / width, o = channel + i % width;
    const int tap = d.by_summed.quotient(term), c = d.by_summed.remainder(term, tap);
    const int th = w.by_taps.quotient(tap), tw = w.by_taps.remainder(tap, th);
    const int64_t at = (h.tap + th * h.tap_step) * d.filter.sh +
                       (w.tap + tw * w.tap_step) * d.filter.sw + c * d.filter.si;
    weights[i] = o < d.pass.written ? to_float(from[at + o * d.filter.so]) : 0;
  }
}

// A block: a tile of rows by a tile of channels; a thread: kDirectRows by kDirectChannels of it.
// The rows are a window where the pass pools.
template <class T, bool kPool>
__global__ void __launch_bounds__(kDirectThreads) direct_kernel(const Direct d) {
  float* const weights = reinterpret_cast<float*>(shared_memory());
  const int channel_lane = d.channels_last ? threadIdx.x % d.lanes
                                           : threadIdx.x / (kDirectThreads / d.lanes);
  const int row_lane = d.channels_last ? threadIdx.x / d.lanes
                                       : threadIdx.x % (kDirectThreads / d.lanes);
  int64_t rest = blockIdx.x;
  const auto next = [&](int64_t n) {
    const int64_t quotient = rest / n, remainder = rest - quotient * n;
    rest = quotient;
    return remainder;
  };
  const int channel_tile = static_cast<int>(next(d.channel_tiles)) * d.lanes * kDirectChannels;
  const int group = static_cast<int>(next(d.pass.groups));
  const Gather w = d.pass.w.gather(static_cast<int>(next(d.pass.w.residues)));
  const Gather h = d.pass.h.gather(static_cast<int>(next(d.pass.h.residues)));
  const Tile tile(d.pass, rest * d.tile_rows());

  const T* images[kDirectRows];  // the row's image, from the group's first channel on
  Place places[kDirectRows];
#pragma unroll
  for (int j = 0; j < kDirectRows; ++j) {
    const int row =
        kPool ? row_lane * kDirectRows + j : j * (kDirectThreads / d.lanes) + row_lane;
    Place& p = places[j] = tile.place(d.pass, row);
    if (p.n >= tile.images || p.a >= h.count || p.b >= w.count) p.n = -1;
    images[j] = static_cast<const T*>(d.x.data) + (tile.first_image + p.n) * d.x.sn +
                group * d.x.sg;
  }

  float sums[kDirectRows][kDirectChannels] = {};
  int64_t offsets[kDirectRows];
  bool inside[kDirectRows];
  int c = 0, th = 0, tw = 0;
  const int terms = h.taps * w.taps * d.pass.summed;
  for (int begin = 0; begin < terms; begin += kDirectTerms) {
    const int n = min(terms - begin, kDirectTerms);
    __syncthreads();
    load_weights<T>(d, h, w, group, channel_tile, begin, n, weights);
    __syncthreads();
    for (int i = 0; i < n; ++i) {
      if (i == 0 || c == 0) {
#pragma unroll
        for (int j = 0; j < kDirectRows; ++j) {
          const int ih = h.input(places[j].a) + th * h.step, iw = w.input(places[j].b) + tw * w.step;
          inside[j] = places[j].n >= 0 && h.inside(ih) && w.inside(iw);
          offsets[j] = ih * d.x.sh + iw * d.x.sw + c * d.x.sc;
        }
      }
      float x[kDirectRows];
#pragma unroll
      for (int j = 0; j < kDirectRows; ++j) {
        x[j] = inside[j] ? to_float(images[j][offsets[j]]) : 0;
        offsets[j] += d.x.sc;
      }
      const Pack<float>* const of_term =
          reinterpret_cast<const Pack<float>*>(weights) +
          (i * d.lanes + channel_lane) * (kDirectChannels / Pack<float>::kSize);
#pragma unroll
      for (int p = 0; p < kDirectChannels / Pack<float>::kSize; ++p) {
        const Pack<float> weight = of_term[p];
#pragma unroll
        for (int q = 0; q < Pack<float>::kSize; ++q)
#pragma unroll
          for (int j = 0; j < kDirectRows; ++j)
            sums[j][p * Pack<float>::kSize + q] += x[j] * weight.values[q];
      }
      if (++c == d.pass.summed) {
        c = 0;
        if (++tw == w.taps) tw = 0, ++th;
      }
    }
  }

  const int first = channel_tile + channel_lane * kDirectChannels;  // in its group
  const int n = min(d.pass.written - first, kDirectChannels);
  if (n <= 0) return;
  const int64_t channel = int64_t{group} * d.pass.written + first;
  float bias[kDirectChannels] = {};
  if (d.finish.bias)
#pragma unroll
    for (int i = 0; i < kDirectChannels; ++i)
      if (i < n) bias[i] = to_float(static_cast<const T*>(d.finish.bias)[channel + i]);
  const View& to = d.finish.y;
  T* const y = static_cast<T*>(const_cast<void*>(to.data)) + group * to.sg + first * to.sc;
  if constexpr (kPool) {
    const Place& p = places[0];
    if (p.n < 0) return;
    float pooled[kDirectChannels];
    const int64_t image = tile.first_image + p.n;
    const int64_t channels = int64_t{d.pass.groups} * d.pass.written;
    const int64_t window = image * d.pass.plane + p.a / 2 * int64_t{w.count / 2} + p.b / 2;
#pragma unroll
    for (int i = 0; i < kDirectChannels; ++i) {
      const float z[4] = {sums[0][i] + bias[i], sums[1][i] + bias[i], sums[2][i] + bias[i],
                          sums[3][i] + bias[i]};
      const Pooled best = pool_window(z);
      pooled[i] = best.value;
      if (d.finish.argmax && i < n)
        d.finish.argmax[window * channels + channel + i] = best.element;
    }
    store_channels(y + image * to.sn + p.a / 2 * to.sh + p.b / 2 * to.sw, to.sc, pooled, n,
                   d.packed);
  } else {
#pragma unroll
    for (int j = 0; j < kDirectRows; ++j) {
      const Place& p = places[j];
      if (p.n < 0) continue;
#pragma unroll
      for (int i = 0; i < kDirectChannels; ++i) {
        const float z = sums[j][i] + bias[i];
        sums[j][i] = d.finish.relu ? relu_of(z) : z;
      }
      const int64_t a = h.first + int64_t{p.a} * h.every, b = w.first + int64_t{p.b} * w.every;
      store_channels(y + (tile.first_image + p.n) * to.sn + a * to.sh + b * to.sw, to.sc, sums[j],
                     n, d.packed);
    }
  }
}

template <class T>
Error direct(Direct d, Stream stream) {
  const int64_t channels = int64_t{d.pass.groups} * d.pass.written;
  d.packed = d.channels_last && channels % kDirectChannels == 0 &&
             d.pass.written % kDirectChannels == 0 && aligned16(d.finish.y.data);
  return launch(d.pass.pool == 2 ? direct_kernel<T, true> : direct_kernel<T, false>,
                static_cast<unsigned>(d.tiles()), kDirectThreads,
                kDirectTerms * d.lanes * kDirectChannels * int{sizeof(float)}, stream, d);
}

// partials[split][o][kh][kw][i] = the sum over a part of the pixels of x * grad_y: a warp each.
struct DirectWeight {
  Pass pass;  // forward
  View x, grad_y;
  float* partials;
  int64_t weights;
  int splits;
  int64_t rows_a_split;
};

template <class T>
__global__ void __launch_bounds__(kDirectThreads) direct_weight_kernel(const DirectWeight d) {
  const int64_t element = global_thread() / kWarp;
  if (element >= d.weights) return;
  const int lane = threadIdx.x % kWarp;
  const int taps_w = d.pass.w.taps, taps = d.pass.h.taps * taps_w;
  const int c = static_cast<int>(element % d.pass.summed);
  const int64_t rest = element / d.pass.summed;
  const int tap = static_cast<int>(rest % taps), th = tap / taps_w, tw = tap % taps_w;
  const int64_t o = rest / taps, group = o / d.pass.written;
  const Gather h = d.pass.h.gather(0), w = d.pass.w.gather(0);
  const int64_t begin = blockIdx.y * d.rows_a_split;
  const int64_t end = min(begin + d.rows_a_split, d.pass.rows());
  const T* const x = static_cast<const T*>(d.x.data) + group * d.x.sg + c * d.x.sc;
  const T* const grad_y = static_cast<const T*>(d.grad_y.data) + group * d.grad_y.sg +
                          (o - group * d.pass.written) * d.grad_y.sc;
  float sum = 0;
  for (int64_t first = begin; first < end; first += kWarp) {
    const Tile tile(d.pass, first);
    if (first + lane >= end) break;
    const Place p = tile.place(d.pass, lane);
    const int ih = h.input(p.a) + th * h.step, iw = w.input(p.b) + tw * w.step;
    if (!h.inside(ih) || !w.inside(iw)) continue;
    const int64_t n = tile.first_image + p.n;
    sum += to_float(x[n * d.x.sn + ih * d.x.sh + iw * d.x.sw]) *
           to_float(grad_y[n * d.grad_y.sn + p.a * d.grad_y.sh + p.b * d.grad_y.sw]);
  }
  sum = over_warp(sum, Sum());
  if (lane == 0) d.partials[blockIdx.y * d.weights + element] = sum;
}

template <class T>
Error direct_weight(const DirectWeight& d, Stream stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(d.weights, kDirectThreads / kWarp));
  return launch(direct_weight_kernel<T>, dim3(blocks, d.splits), kDirectThreads, 0, stream, d);
}

}  // namespace dlkernels::cuda
