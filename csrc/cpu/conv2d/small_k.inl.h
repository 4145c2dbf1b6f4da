// conv2d with few output channels, which as lanes would be few: two other ways to fill a vector.
#pragma once
#include "cpu/simd/vec.h"
#include "cpu/conv2d/block.inl.h"
#include "cpu/conv2d/blocking.inl.h"
#include "cpu/gemm/pack.inl.h"
#include "cpu/gemm/tile.inl.h"

namespace dlkernels::cpu {
namespace {

// ---- planes: lanes are pixels ----------------------------------------------------------------

// The channels are the tile's rows. An output's columns go on into the margin of its row of inputs,
// so that a block is one long row.
constexpr int64_t kFewChannels = 8, kPixel = most(kFewChannels, Vec::kWidth);

static bool are_planes(const Conv2d& v, const Cut& cut) {
  // The last block is the smallest: where its inputs are one run, so are those of all.
  const auto plain = [](const ConvAxis& a, int64_t size) {
    return a.stride == 1 && a.up == 1 && !Span(a, 0, (a.out - 1) % size + 1).apart;
  };
  return v.groups == 1 && v.K <= kFewChannels && plain(v.h, cut.rows) && plain(v.w, cut.cols) &&
         2 * cut.cols >= Span(v.w, 0, cut.cols).size();
}

// Where they are in scratch: a plane of inputs each for C channels, of outputs for K, then rows.
struct Planes {
  int64_t in_pitch, out_pitch, out, rows, floats;

  Planes(const Conv2d& v, const Cut& cut) {
    constexpr int64_t kBeyond = 4 * Vec::kWidth;  // the last tile's
    const int64_t cols = Span(v.w, 0, cut.cols).size();
    in_pitch = round_up(Span(v.h, 0, cut.rows).size() * cols);
    out_pitch = round_up(cut.rows * cols) + kBeyond;
    const int64_t in = v.x.C * in_pitch;  // and the same again, channels last
    out = 2 * in + kBeyond;
    rows = out + v.K * out_pitch;
    floats = rows + 3 * cut.cols * kPixel;
  }
};

// Outputs [o, o + V * kWidth) of R planes, the inputs of o's first tap at x.
// Not inline: the loops around it would take its registers (10 % for one channel).
template <int R, int V>
__attribute__((noinline)) static void planes_tile(const Conv2d& v, const float* weight,
                                                  const float* x, int64_t x_pitch, int64_t row,
                                                  const GemmOutput& y, int64_t o) {
  const int64_t C = v.x.C, tap = C * kTileCols;
  Tile<R, V> tile;
  for (int64_t c = 0; c < C; ++c)
    for (int64_t kh = 0; kh < v.h.taps; ++kh)
      tile.add_columns(weight + kh * v.w.taps * tap + c * kTileCols, tap,
                       x + o + c * x_pitch + kh * v.h.dilation * row, v.w.dilation, v.w.taps);
  tile.store(y, 0, o);
}

// What the zeros outside of the image have made NaN, again, without them.
static void planes_edges(const Conv2d& v, const Block& b, const Planes& p, const float* weight,
                         const float* x, float* out) {
  const int64_t C = v.x.C, row = b.cols.size();
  for (int64_t h = b.h; h < b.h_end; ++h)
    for (int64_t w = b.w; w < b.w_end; ++w)
      for (int64_t k = 0; k < v.K; ++k) {
        float& y = out[k * p.out_pitch + (h - b.h) * row + w - b.w];
        if (y == y) continue;
        const Taps th = b.rows.taps(h).inside(v.x.H), tw = b.cols.taps(w).inside(v.x.W);
        float sum = 0;
        for (int64_t c = 0; c < C; ++c)
          for (int64_t i = 0; i < th.count; ++i)
            for (int64_t j = 0; j < tw.count; ++j) {
              const int64_t tap = (th.first + i) * v.w.taps + tw.first + j;
              sum += x[c * p.in_pitch + (th.at + i * th.at_step) * row + tw.at + j * tw.at_step] *
                     weight[(tap * C + c) * kTileCols + k];
            }
        if (v.bias) sum += v.bias[k];
        y = v.relu && sum < 0 ? 0 : sum;
      }
}

static void conv2d_planes(const Conv2d& v, const Cut& cut, const Block& b, const float* weight,
                          float* scratch) {
  const Planes p(v, cut);
  const int64_t C = v.x.C, row = b.cols.size(), pixels = b.rows.size() * row;
  if (v.x.sw == 1 && !v.x.argmax) {
    for (int64_t c = 0; c < C; ++c) b.load(v.x, c, 1, scratch + c * p.in_pitch);
  } else {
    float* const last = scratch + C * p.in_pitch;
    b.load(v.x, 0, C, last);
    transpose_copy(Source<float>(last), 0, C, pixels, C, scratch, p.in_pitch);
  }
  const int64_t rows = b.h_end - b.h, cols = b.w_end - b.w, pool = v.argmax ? 2 : 1;
  float* const out = scratch + p.out;
  const GemmOutput y = {.c = out, .row = p.out_pitch, .row_bias = v.bias, .relu = v.relu};
  const int64_t size = (rows - 1) * row + cols;
  with_rows<kFewChannels>(v.K, [&]<int R>() {
    constexpr int V = least(4, most(1, kTileRows * kTileVecs / R)), kStep = V * Vec::kWidth;
    int64_t o = 0;
    for (; o + kStep <= size; o += kStep)
      planes_tile<R, V>(v, weight, scratch, p.in_pitch, row, y, o);
    for (; o < size; o += Vec::kWidth) planes_tile<R, 1>(v, weight, scratch, p.in_pitch, row, y, o);
  });
  if (!is_finite(weight, v.h.taps * v.w.taps * C * kTileCols))
    planes_edges(v, b, p, weight, scratch, out);
  for (int64_t h = 0; h < rows; h += pool) {
    if (v.yc != 1 && !v.argmax) {
      with_type(v.x.dtype, [&]<class T>() {
        T* const to = static_cast<T*>(v.y) + b.n * v.yn + (b.h + h) * v.yh + b.w;
        for (int64_t k = 0; k < v.K; ++k)
          pack_run(Source<float>(out), k * p.out_pitch + h * row, cols, cols, to + k * v.yc);
      });
      continue;
    }
    float* const last = scratch + p.rows;
    for (int64_t r = 0; r < pool; ++r)
      transpose_copy(Source<float>(out), (h + r) * row, p.out_pitch, v.K, cols,
                     last + r * cols * kPixel, kPixel);
    store_row(v, b.n, b.h + h, b.w, cols, 0, v.K, last, last + cols * kPixel, kPixel,
              last + 2 * cols * kPixel);
  }
}

// ---- scattered: lanes are the window's columns and the output channels -------------------------

// Where the window reaches far beyond the image, as it does in the gradient of a convolution
// without padding, most of an output's taps are zeros. Then every input is multiplied by the whole
// window instead, and a row of that, (KW, K), is added to the outputs that see it.
struct Scatter {
  int64_t lanes, panels;       // of a row of the window
  int64_t margin, pitch, out;  // a row of outputs in scratch: as many columns more on both sides
  int64_t floats;

  Scatter(const Conv2d& v, const Cut& cut)
      : lanes(v.w.taps * v.K),
        panels(ceil_div(lanes, kTileCols)),
        margin((v.w.taps - 1) * v.K),
        pitch(v.w.out * v.K + 2 * margin),
        out(round_up(Span(v.h, 0, cut.rows).size() * v.x.W * v.x.C)),
        floats(out + round_up(cut.rows * pitch) + Vec::kWidth) {}
};

static bool is_scattered(const Conv2d& v, const Cut& cut) {
  const int64_t taps = v.w.taps * v.K;
  return are_planes(v, cut) && v.x.C >= Vec::kWidth && v.w.dilation == 1 && v.h.pad >= 0 &&
         v.w.pad >= 0 && cut.count_w == 1 && !v.bias && !v.relu && !v.argmax &&
         v.x.H * v.x.W * round_up(taps) < v.h.out * (v.w.out + v.w.taps - 1) * taps;
}

// To (KH, panels, C, kTileCols), the window's columns from last to first.
static void scatter_pack(const Conv2d& v, const Cut& cut, const Filter& f, float* to) {
  const Scatter s(v, cut);
  const int64_t C = v.x.C, K = v.K;
  store_zeros(to, v.h.taps * s.panels * C * kTileCols);
  with_type(v.x.dtype, [&]<class T>() {
    const Source<T> from(f.data);
    for (int64_t kh = 0; kh < v.h.taps; ++kh)
      for (int64_t kw = 0; kw < v.w.taps; ++kw)
        for (int64_t k = 0; k < K; ++k) {
          const int64_t lane = (v.w.taps - 1 - kw) * K + k;
          float* const panel = to + (kh * s.panels + lane / kTileCols) * C * kTileCols;
          for (int64_t c = 0; c < C; ++c)
            panel[c * kTileCols + lane % kTileCols] =
                from.at(k * f.so + c * f.si + kh * f.sh + kw * f.sw);
        }
  });
}

static void conv2d_scatter(const Conv2d& v, const Cut& cut, const Block& b, const float* weight,
                           float* x) {
  const Scatter s(v, cut);
  const int64_t C = v.x.C, W = v.x.W, K = v.K, rows = b.h_end - b.h;
  const int64_t top = most(0, b.h - v.h.pad),
                bottom = least(v.x.H, b.rows.begin(0) + b.rows.size());
  for (int64_t h = top; h < bottom; ++h)
    load_row(v.x, b.n, h, 0, W, 1, 0, C, C, x + (h - top) * W * C);
  float* const out = x + s.out;
  store_zeros(out, rows * s.pitch);
  // Inputs in one column see outputs in one column, each its own: they are a tile's rows.
  for (int64_t kh = 0; kh < v.h.taps; ++kh) {
    const int64_t down = v.h.pad - kh * v.h.dilation - b.h;  // from an input to its output
    const int64_t first = most(top, -down), last = least(bottom, rows - down);
    for (int64_t w = 0; w < least(W, v.w.out + v.w.taps - 1 - v.w.pad); ++w)
      for (int64_t j = 0; j < s.panels; ++j) {
        const int64_t lanes = least(s.lanes - j * kTileCols, kTileCols);
        const float* const panel = weight + (kh * s.panels + j) * C * kTileCols;
        const float* const from = x + ((first - top) * W + w) * C;
        const GemmOutput to = {
            .c = out + (first + down) * s.pitch + (w + v.w.pad) * K + j * kTileCols,
            .row = s.pitch,
            .accumulate = true};
        each_tile(last - first, lanes, [&]<int R, int V>(int64_t i) __attribute__((always_inline)) {
          Tile<R, V> tile;
          tile.add_rows(from + i * W * C, W * C, panel, kTileCols, C);
          tile.store(to, i, 0, lanes);
        });
      }
  }
  for (int64_t h = 0; h < rows; ++h)
    store_row(v, b.n, b.h + h, 0, v.w.out, 0, K, out + h * s.pitch + s.margin, nullptr, K, nullptr);
}

}  // namespace
}  // namespace dlkernels::cpu
