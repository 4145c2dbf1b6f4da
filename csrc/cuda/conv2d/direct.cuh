// Convolutions by the direct sum on the ordinary units: for few channels a group, where tensor
// cores have little to do. It is right for every convolution.
#pragma once
#include "cuda/conv2d/finish.cuh"

namespace dlkernels::cuda::conv {

constexpr int kDirectThreads = 256;
constexpr int kDirectRows = 4, kDirectChannels = 8;  // a thread computes
constexpr int kDirectTerms = 64;  // of each sum at a time, with their weights shared
struct Direct {
  Pass pass;
  View x;
  WeightView filter;
  Finish finish;
  Divider by_summed;
  int lanes;           // threads along the channels, a power of two of at most 8
  bool channels_last;  // neighbouring threads are neighbours in channels, else in rows
  int channel_tiles;   // a group
  int64_t row_tiles;   // a gather

  Direct(const Pass& pass, const View& x, const WeightView& filter, const Finish& finish)
      : pass(pass), x(x), filter(filter), finish(finish), by_summed(pass.summed), lanes(1) {
    while (lanes < 8 && lanes * kDirectChannels < pass.written) lanes *= 2;
    channels_last = finish.y.sc == 1;
    channel_tiles = static_cast<int>(ceil_div(pass.written, lanes * kDirectChannels));
    row_tiles = ceil_div(pass.rows(), tile_rows());
  }
  __host__ __device__ int tile_rows() const { return kDirectThreads / lanes * kDirectRows; }
  int64_t tiles() const { return row_tiles * pass.gathers() * channel_tiles * pass.groups; }
};

// Terms [begin, begin + n) of the sums: their weights for a tile of channels, [term][channel].
template <class T>
__device__ void load_weights(const Direct& d, const Piece& piece, int channel, int begin, int n,
                             float* weights) {
  const Gather &h = piece.h, &w = piece.w;
  const int width = d.lanes * kDirectChannels;
  const T* const from = static_cast<const T*>(d.filter.data) + piece.group * d.filter.sg;
  for (int i = threadIdx.x; i < n * width; i += kDirectThreads) {
    const int term = begin + i / width, o = channel + i % width;
    const int tap = d.by_summed.divide(term), c = d.by_summed.remainder(term, tap);
    const int th = w.by_taps.divide(tap), tw = w.by_taps.remainder(tap, th);
    const int64_t at = (h.tap + th * h.tap_step) * d.filter.sh +
                       (w.tap + tw * w.tap_step) * d.filter.sw + c * d.filter.si;
    weights[i] = o < d.pass.written ? to_float(from[at + o * d.filter.so]) : 0;
  }
}

// What a thread's rows read: one tap after the other, its channels one by one.
template <class T>
struct DirectRows {
  Place places[kDirectRows];     // n < 0: there is no such row
  const T* images[kDirectRows];  // from the group's first channel on
  int64_t offsets[kDirectRows];
  bool inside[kDirectRows];

  __device__ void find(const Direct& d, const Piece& piece, const Rows& tile, int j, int row) {
    Place& p = places[j] = tile.place(d.pass, row);
    if (p.n >= tile.images || p.a >= piece.h.count || p.b >= piece.w.count) p.n = -1;
    images[j] =
        static_cast<const T*>(d.x.data) + (tile.first_image + p.n) * d.x.sn + piece.group * d.x.sg;
  }
  __device__ void move_to(const View& x, const Gather& h, const Gather& w, int th, int tw, int c) {
#pragma unroll
    for (int j = 0; j < kDirectRows; ++j) {
      const int ih = h.input(places[j].a) + th * h.step, iw = w.input(places[j].b) + tw * w.step;
      inside[j] = places[j].n >= 0 && h.inside(ih) && w.inside(iw);
      offsets[j] = ih * x.sh + iw * x.sw + c * x.sc;
    }
  }
  __device__ void next(const View& x, float (&values)[kDirectRows]) {
#pragma unroll
    for (int j = 0; j < kDirectRows; ++j) {
      values[j] = inside[j] ? to_float(images[j][offsets[j]]) : 0;
      offsets[j] += x.sc;
    }
  }
};

// sums += a term's x by its weights, which begin at `weights`.
__device__ inline void add_term(float (&sums)[kDirectRows][kDirectChannels],
                                const float (&x)[kDirectRows], const float* weights) {
  constexpr int kSize = Pack<float>::kSize;
#pragma unroll
  for (int p = 0; p < kDirectChannels / kSize; ++p) {
    const Pack<float> weight = reinterpret_cast<const Pack<float>*>(weights)[p];
#pragma unroll
    for (int q = 0; q < kSize; ++q)
#pragma unroll
      for (int j = 0; j < kDirectRows; ++j) sums[j][p * kSize + q] += x[j] * weight.values[q];
  }
}

// A block: a tile of rows by a tile of channels; a thread: kDirectRows by kDirectChannels of it.
// The rows are a window where the pass pools.
template <class T, bool kPool>
__global__ void __launch_bounds__(kDirectThreads) direct_kernel(const __grid_constant__ Direct d) {
  float* const weights = reinterpret_cast<float*>(shared_memory());
  const int thread = threadIdx.x, row_lanes = kDirectThreads / d.lanes;
  const int channel_lane = d.channels_last ? thread % d.lanes : thread / row_lanes;
  const int row_lane = d.channels_last ? thread / d.lanes : thread % row_lanes;
  const Piece piece(d.pass, d.channel_tiles, blockIdx.x, d.pass.gradient);
  const Gather &h = piece.h, &w = piece.w;
  const int width = d.lanes * kDirectChannels, channel_tile = piece.channel_tile * width;
  const Rows tile(d.pass, piece.row_tile * d.tile_rows());
  DirectRows<T> rows;
#pragma unroll
  for (int j = 0; j < kDirectRows; ++j)
    rows.find(d, piece, tile, j, kPool ? row_lane * kDirectRows + j : j * row_lanes + row_lane);

  float sums[kDirectRows][kDirectChannels] = {};
  int c = 0, th = 0, tw = 0;
  const int terms = h.taps * w.taps * d.pass.summed;
  for (int begin = 0; begin < terms; begin += kDirectTerms) {
    const int n = min(terms - begin, kDirectTerms);
    __syncthreads();
    load_weights<T>(d, piece, channel_tile, begin, n, weights);
    __syncthreads();
    for (int i = 0; i < n; ++i) {
      if (i == 0 || c == 0) rows.move_to(d.x, h, w, th, tw, c);
      float x[kDirectRows];
      rows.next(d.x, x);
      add_term(sums, x, weights + i * width + channel_lane * kDirectChannels);
      if (++c == d.pass.summed) {
        c = 0;
        if (++tw == w.taps) tw = 0, ++th;
      }
    }
  }

  const int first = channel_tile + channel_lane * kDirectChannels;  // in its group
  const int n = min(d.pass.written - first, kDirectChannels);
  if (n <= 0) return;
  if constexpr (kPool) {
    if (rows.places[0].n >= 0)
      d.finish.put_window<T>(d.pass, piece, tile.first_image + rows.places[0].n, rows.places[0],
                             first, n, sums);
  } else {
#pragma unroll
    for (int j = 0; j < kDirectRows; ++j)
      if (rows.places[j].n >= 0)
        d.finish.put<T>(piece, tile.first_image + rows.places[j].n, rows.places[j], first, n,
                        sums[j]);
  }
}

template <class T>
Error direct(const Direct& d, Stream stream) {
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
__global__ void __launch_bounds__(kDirectThreads)
    direct_weight_kernel(const __grid_constant__ DirectWeight d) {
  const int64_t element = global_thread() / kWarp;
  if (element >= d.weights) return;
  const int lane = threadIdx.x % kWarp;
  const int taps_w = d.pass.w.taps, taps = d.pass.h.taps * taps_w;
  const int c = static_cast<int>(element % d.pass.summed);
  const int64_t rest = element / d.pass.summed;
  const int tap = static_cast<int>(rest % taps), th = tap / taps_w, tw = tap % taps_w;
  const int64_t o = rest / taps, group = o / d.pass.written;
  const Gather h = d.pass.h.gather(0, false), w = d.pass.w.gather(0, false);
  const int64_t begin = blockIdx.y * d.rows_a_split;
  const int64_t end = min(begin + d.rows_a_split, d.pass.rows());
  const T* const x = static_cast<const T*>(d.x.data) + group * d.x.sg + c * d.x.sc;
  const T* const grad_y = static_cast<const T*>(d.grad_y.data) + group * d.grad_y.sg +
                          (o - group * d.pass.written) * d.grad_y.sc;
  float sum = 0;
  for (int64_t first = begin; first < end; first += kWarp) {
    const Rows tile(d.pass, first);
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

}  // namespace dlkernels::cuda::conv
