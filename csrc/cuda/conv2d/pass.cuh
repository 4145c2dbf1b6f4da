// A pass of a convolution as a gather: what forward and grad_input have in common, and where the
// rows of a pass and its taps are.
#pragma once
#include "cuda/common.cuh"

namespace dlkernels::cuda::conv {

// One axis of a pass: output a, of `count`, is written at first + a * every; its tap t reads input
// a * stride + base + t * step, 0 outside [0, in), and weight tap + t * tap_step.
struct Gather {
  int count, first, every;
  int in, stride, base, step;
  int taps, tap, tap_step;
  Divider by_taps;

  __device__ int input(int a) const { return a * stride + base; }
  __device__ bool inside(int at) const {
    return static_cast<unsigned>(at) < static_cast<unsigned>(in);
  }
};

inline int64_t greatest_common_divisor(int64_t a, int64_t b) {
  return b ? greatest_common_divisor(b, a % b) : a;
}

// That axis of a forward pass, and of grad_input. Input h of a convolution gets a gradient from
// output o through tap t if o * stride = h + pad - t * dilation: only one tap in `period` can meet
// the h of one residue modulo stride, and these taps meet neighbouring outputs. So each residue is
// a gather of its own.
struct PassAxis {
  int in, out, taps, stride, pad, dilation;
  int residues = 1;  // gathers of this axis
  int rows;          // the most outputs of one
  int common = 1, period = 1, inverse = 0;
  Divider by_max_taps, by_fewer_taps;  // all gathers have one number of taps or the other, or none

  PassAxis(const ConvAxis& a, bool gradient)
      : in(static_cast<int>(a.in)),
        out(static_cast<int>(a.out)),
        taps(static_cast<int>(a.taps)),
        stride(static_cast<int>(a.stride)),
        pad(static_cast<int>(a.pad)),
        dilation(static_cast<int>(a.dilation)),
        rows(out) {
    if (gradient) {
      residues = min(stride, in);
      rows = static_cast<int>(ceil_div(in, stride));
      common = static_cast<int>(greatest_common_divisor(stride, dilation));
      period = stride / common;
      // inverse * (dilation / common) = 1 modulo period, by Euclid's algorithm
      int64_t r = period, next = dilation / common % period, t = 0, next_t = 1;
      while (next != 0) {
        const int64_t q = r / next;
        const int64_t r2 = r - q * next, t2 = t - q * next_t;
        r = next, next = r2, t = next_t, next_t = t2;
      }
      inverse = static_cast<int>((t % period + period) % period);
    }
    const int64_t max_taps = ceil_div(taps, period);
    by_max_taps = Divider(max_taps);
    by_fewer_taps = Divider(max_taps > 1 ? max_taps - 1 : 1);
  }

  // Where it is known that there is but one, most of it stays in the kernel's parameters.
  __device__ __forceinline__ Gather gather(int residue, bool gradient) const {
    if (!gradient) return {out, 0, 1, in, stride, -pad, dilation, taps, 0, 1, by_max_taps};
    Gather g = {};
    g.count = (in - residue + stride - 1) / stride, g.first = residue, g.every = stride;
    g.in = out, g.stride = 1, g.step = -(dilation / common), g.tap_step = period;
    const int from = residue + pad;
    if (from % common != 0) return g;
    g.tap = static_cast<int>(int64_t{from / common % period} * inverse % period);
    if (g.tap >= taps) return g;
    g.taps = (taps - 1 - g.tap) / period + 1;
    g.base = (from - g.tap * dilation) / stride;  // exact
    g.by_taps = g.taps == static_cast<int>(by_max_taps.divisor) ? by_max_taps : by_fewer_taps;
    return g;
  }
};

// Channel c of group g of pixel (n, h, w) of a tensor is at n * sn + g * sg + c * sc + h * sh + w *
// sw.
struct View {
  const void* data;
  int64_t sn, sg, sc, sh, sw;
};
inline View view(const void* data, int64_t groups, int64_t channels, int64_t H, int64_t W,
                 bool channels_last) {
  const int64_t C = groups * channels;
  if (channels_last) return {data, C * H * W, channels, 1, W * C, C};
  return {data, C * H * W, channels * H * W, H * W, W, 1};
}

// Where the weights of written channel o and summed channel i of a group are.
struct WeightView {
  const void* data;
  int64_t sg, so, si, sh, sw;
};

// A pass: its rows are the outputs of all images, in order, a gather at a time. Where it pools,
// they are four to a window, window by window, so that rows 4 q to 4 q + 3 are window q's.
struct Pass {
  int64_t N;
  int groups, summed, written;  // channels a group
  PassAxis h, w;
  bool gradient;
  int pool;   // 2 where the outputs are max-pooled, else 1
  int plane;  // rows an image and gather, / pool^2
  Divider by_plane, by_width;

  Pass(const Conv2d& c, bool gradient, bool pools)
      : N(c.N),
        groups(static_cast<int>(c.groups)),
        summed(static_cast<int>((gradient ? c.K : c.C) / c.groups)),
        written(static_cast<int>((gradient ? c.C : c.K) / c.groups)),
        h(c.h, gradient),
        w(c.w, gradient),
        gradient(gradient),
        pool(pools ? 2 : 1),
        plane(h.rows / pool * (w.rows / pool)),
        by_plane(max(plane, 1)),
        by_width(max(w.rows / pool, 1)) {}

  int gathers() const { return h.residues * w.residues; }
  __host__ __device__ int64_t rows() const { return N * plane * pool * pool; }  // of one gather
};

// Row `row` of the tile whose first row is at `begin`: image n, counted from `first_image`, and
// output (a, b), both counted in its gather. Rows behind the last have n >= images.
struct Place {
  int n, a, b;
};
struct Rows {
  int64_t first_image, images;
  int begin;  // in windows or outputs of that image

  __device__ Rows(const Pass& pass, int64_t begin_row) {
    const int64_t begin_window = begin_row / (pass.pool * pass.pool);
    first_image = begin_window / pass.plane;
    images = pass.N - first_image;
    begin = static_cast<int>(begin_window - first_image * pass.plane);
  }
  __device__ Place place(const Pass& pass, int row) const {
    const int at = begin + (pass.pool == 2 ? row / 4 : row);
    const int n = pass.by_plane.divide(at), p = pass.by_plane.remainder(at, n);
    const int a = pass.by_width.divide(p), b = pass.by_width.remainder(p, a);
    if (pass.pool == 1) return {n, a, b};
    return {n, 2 * a + row % 4 / 2, 2 * b + row % 2};
  }
};

// What a block does of a pass: one gather of one group, a tile of its channels and of its rows.
// Blocks of the same rows come one after the other.
struct Piece {
  int group, channel_tile;
  int64_t row_tile;
  Gather h, w;

  __device__ __forceinline__ Piece(const Pass& pass, int channel_tiles, int64_t block,
                                   bool gradient) {
    const auto next = [&](int n) {
      if (n == 1) return 0;
      const int64_t quotient = block / n, remainder = block - quotient * n;
      block = quotient;
      return static_cast<int>(remainder);
    };
    channel_tile = next(channel_tiles);
    group = next(pass.groups);
    w = pass.w.gather(gradient ? next(pass.w.residues) : 0, gradient);
    h = pass.h.gather(gradient ? next(pass.h.residues) : 0, gradient);
    row_tile = block;
  }
};

}  // namespace dlkernels::cuda::conv
