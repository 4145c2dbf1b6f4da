// conv2d with few channels a group, and its gradients:
//   y[pixel, g, j] = sum_{i, tap} x[pixel at tap, g, i] * w[g, j, i, tap],  i < c, j < k
// Lanes are groups, so nothing is broadcast. A panel is kTileCols groups: in scratch the first
// channels of its groups are contiguous, then the second ones, ...
// Loads bound it: each multiply-add takes one (docs/performance/conv2d.md).
#pragma once
#include "cpu/simd/vec.h"
#include "cpu/conv2d/block.inl.h"
#include "cpu/conv2d/blocking.inl.h"
#include "cpu/gemm/gemm.inl.h"
#include "cpu/gemm/pack.inl.h"
#include "cpu/gemm/tile.inl.h"

namespace dlkernels::cpu {
namespace {

// How blocks are cut, and what a thread has in scratch.
struct DepthwiseBlocking {
  int64_t c, k;       // channels a group
  Blocking blocking;  // for one panel
  int64_t g_floats;   // of its gradient
  int64_t chunk;      // groups that are done together
  int64_t row_pitch, g, rows, temp, biases, floats;

  explicit DepthwiseBlocking(const Conv2d& conv)
      : c(conv.x.C / conv.groups), k(conv.K / conv.groups), blocking(panel(conv)) {
    // In channels_last as many as L2 holds, but no fewer than kRun of a pixel's channels: short
    // runs of memory are slow.
    constexpr int64_t kFloats = 1 << 16, kRun = 512;
    g_floats = blocking.rows * blocking.cols * k * kTileCols;
    const int64_t panels = ceil_div(conv.groups, kTileCols);
    const int64_t fit = max(kFloats / (blocking.x_floats + g_floats), kRun / (c * kTileCols));
    const int64_t chunks = ceil_div(panels, conv.x.sc == 1 ? max(fit, 1) : 1);
    const int64_t together = ceil_div(panels, chunks);  // evenly
    chunk = together * kTileCols;
    row_pitch = k * chunk;
    g = together * blocking.x_floats;
    rows = g + together * g_floats;
    temp = rows + 3 * blocking.cols * row_pitch;
    biases = temp +
             max(c * Span(conv.w, 0, blocking.cols).size() * kTileCols, blocking.cols * row_pitch);
    floats = biases + row_pitch;
  }

 private:
  static Conv2d panel(Conv2d conv) {
    conv.x.C = conv.x.C / conv.groups * kTileCols, conv.K = conv.K / conv.groups * kTileCols;
    return conv;
  }
};

// With more, the tiles of direct fill their lanes as well.
static bool depthwise_supports(const Conv2d& conv) {
  constexpr int64_t kFew = 8;
  return conv.groups != 1 && conv.x.C <= kFew * conv.groups && conv.K <= kFew * conv.groups;
}
static int64_t depthwise_blocks(const Conv2d& conv) {
  return DepthwiseBlocking(conv).blocking.count;
}
static int64_t depthwise_scratch(const Conv2d& conv) { return DepthwiseBlocking(conv).floats; }
static int64_t depthwise_panels(const Conv2d& conv) { return ceil_div(conv.groups, kTileCols); }
static int64_t depthwise_weights(const Conv2d& conv) {
  return conv.h.taps * conv.w.taps * (conv.x.C / conv.groups) * (conv.K / conv.groups) * kTileCols;
}
static int64_t depthwise_panel_floats(const Conv2d& conv) {
  return depthwise_weights(conv) + kWord;
}
static int64_t depthwise_sum_floats(const Conv2d& conv) {
  return depthwise_panels(conv) * depthwise_weights(conv);
}

// f(g, lanes, j, i, kh, at): the taps of row kh, for groups [g, g + lanes) of a panel, are
// at[tap * kTileCols + lane] of the weights, of panels that are `beside` floats from each other.
template <class F>
static void each_tap_row(const Conv2d& conv, int64_t begin, int64_t end, int64_t gap, const F& f) {
  const int64_t c = conv.x.C / conv.groups, k = conv.K / conv.groups;
  int64_t at = begin * (depthwise_weights(conv) + gap);
  for (int64_t g = begin * kTileCols; g < min(end * kTileCols, conv.groups);
       g += kTileCols, at += gap)
    for (int64_t j = 0; j < k; ++j)
      for (int64_t i = 0; i < c; ++i)
        for (int64_t kh = 0; kh < conv.h.taps; ++kh, at += conv.w.taps * kTileCols)
          f(g, min(conv.groups - g, kTileCols), j, i, kh, at);
}

static void depthwise_pack(const Conv2d& conv, const WeightView& f, float* to, int64_t begin,
                           int64_t end) {
  with_type(conv.x.dtype, [&]<class T>() {
    const MaskedInput<T> s(f.data);
    each_tap_row(conv, begin, end, kWord,
                 [&](auto g, auto lanes, auto j, auto i, auto kh, auto at) {
                   const int64_t from = g * f.sg + j * f.so + i * f.si + kh * f.sh;
                   pack_panel<kTileCols>(s, from, f.sg, f.sw, lanes, conv.w.taps, to + at);
                 });
  });
  for (int64_t i = begin; i < end; ++i)
    write_word(to + i * depthwise_panel_floats(conv), depthwise_weights(conv));
}

static void depthwise_unpack(const Conv2d& conv, const float* sums, const WeightView& f, void* to,
                             int64_t begin, int64_t end) {
  with_type(conv.x.dtype, [&]<class T>() {
    T* const weight = static_cast<T*>(to);
    each_tap_row(conv, begin, end, 0, [&](auto g, auto lanes, auto j, auto i, auto kh, auto at) {
      unpack_panel(sums + at, kTileCols, lanes, conv.w.taps,
                   weight + g * f.sg + j * f.so + i * f.si + kh * f.sh, f.sg, f.sw);
    });
  });
}

// (pixels, groups, each) to (pixels, panels, each, kTileCols), or that back, a pixel every `pitch`
// floats.
static void split_groups(const float* from, int64_t pitch, int64_t pixels, int64_t groups,
                         int64_t each, float* to, bool back = false) {
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t g = 0; g < groups; g += kTileCols) {
      const int64_t at = p * pitch + g * each, lanes = min(groups - g, kTileCols);
      if (back)
        transpose_copy(MaskedInput<float>(from), at, kTileCols, each, lanes, to + at, each);
      else
        transpose_copy(MaskedInput<float>(from), at, each, lanes, each, to + at, kTileCols);
    }
}

// c[r, v] += sum_k a[r * row + k * col, v] * b[k * step, v]
template <int R, int V>
__attribute__((always_inline)) static inline void add_lanes(Tile<R, V>& tile, const float* a,
                                                            int64_t row, int64_t col,
                                                            const float* b, int64_t step,
                                                            int64_t depth) {
  const float* p[(R + 2) / 3];  // as in Tile::add_rows
#pragma GCC unroll 5
  for (int g = 0; g < (R + 2) / 3; ++g) p[g] = a + 3 * g * row;
  for (int64_t k = 0; k < depth; ++k, b += step) {
    Vec bk[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) bk[v] = Vec::load(b + v * Vec::kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v)
        tile.c[r][v] =
            fma(Vec::load(p[r / 3] + r % 3 * row + v * Vec::kWidth), bk[v], tile.c[r][v]);
#pragma GCC unroll 5
    for (int g = 0; g < (R + 2) / 3; ++g) p[g] += col;
  }
}

// Row h of a block, all groups of a chunk, some columns, to y: a pixel every y_step floats from b.w
// on, panel by panel.
static void depthwise_pixels(const Conv2d& conv, const DepthwiseBlocking& blocking, const Block& b,
                             const float* x, const float* weight, int64_t groups, const float* bias,
                             int64_t h, Range pixels, float* y, int64_t y_step) {
  const Taps th = b.rows.taps(h).inside(conv.x.H);
  const int64_t pixel = blocking.c * kTileCols;
  const int64_t x_row = b.cols.size() * pixel, x_step = b.cols.output_step() * pixel;
  for (int64_t w = pixels.begin; w < min(pixels.begin + conv.w.input_dilation, pixels.end); ++w) {
    const Taps tw = columns(conv, b, w, pixels.size() == 1);
    const int64_t taps_h = tw.count ? th.count : 0;
    const float* const first = x + th.at * x_row + tw.at * pixel;
    const float* taps = weight + (th.first * conv.w.taps + tw.first) * kTileCols;
    for (int64_t g = 0; g < groups; g += kTileCols, taps += kWord)
      for (int64_t j = 0; j < blocking.k;
           ++j, taps += blocking.c * conv.h.taps * conv.w.taps * kTileCols) {
        const int64_t at = g * blocking.k + j * kTileCols, lanes = min(groups - g, kTileCols);
        const float* const panel = first + g / kTileCols * blocking.blocking.x_floats;
        const GemmOutput out = {.c = y + (w - b.w) * y_step + at,
                                .row = conv.w.input_dilation * y_step,
                                .col_bias = bias ? bias + at : nullptr,
                                .relu = conv.on_store.relu};
        each_tile(ceil_div(pixels.end - w, conv.w.input_dilation), lanes,
                  [&]<int R, int V>(int64_t o) __attribute__((always_inline)) {
                    Tile<R, V> tile;
                    for (int64_t i = 0; i < blocking.c; ++i)
                      for (int64_t t = 0; t < taps_h; ++t)
                        add_lanes(tile, panel + o * x_step + i * kTileCols + t * th.at_step * x_row,
                                  x_step, tw.at_step * pixel,
                                  taps + (i * conv.h.taps + t * th.step) * conv.w.taps * kTileCols,
                                  tw.step * kTileCols, tw.count);
                    tile.store(out, o, 0, lanes);
                  });
      }
  }
}

static void depthwise_row(const Conv2d& conv, const DepthwiseBlocking& blocking, const Block& b,
                          const float* x, const float* weight, bool finite, int64_t groups,
                          const float* bias, int64_t h, float* y, int64_t y_step) {
  row_with_edges(b, finite, [&](Range pixels) {
    depthwise_pixels(conv, blocking, b, x, weight, groups, bias, h, pixels, y, y_step);
  });
}

// The hardware does not follow many small planes at once: asks for those that come after these.
// Inline, as prefetch_rows is.
__attribute__((always_inline)) static inline void prefetch_planes(const void* data, DType dtype,
                                                                  int64_t first, int64_t pitch,
                                                                  int64_t channels) {
  constexpr int64_t kSmall = 1 << 10;
  if (pitch <= 1 || pitch > kSmall) return;
  with_type(dtype, [&]<class T>() __attribute__((always_inline)) {
    const T* const next = static_cast<const T*>(data) + first + channels * pitch;
    for (int64_t i = 0; i < channels * pitch; i += 64 / sizeof(T)) __builtin_prefetch(next + i);
  });
}

// A region of one row whose channels are groups, `each` channels of each:
// to[panel * floats + (column * each + i) * kTileCols + lane].
static void load_groups(const ImageView& x, const Region& region, int64_t step, int64_t each,
                        float* to, int64_t floats, float* temp) {
  const auto [n, h, rows, w, cols, first, groups] = region;
  for (int64_t g = 0; g < groups; g += kTileCols, to += floats) {
    const int64_t lanes = min(groups - g, kTileCols), pitch = each * kTileCols;
    if (each == 1) {  // a pitch that the compiler knows
      load_row(x, {n, h, 1, w, cols, first + g, lanes}, step, kTileCols, to);
    } else {
      load_row(x, {n, h, 1, w, cols, (first + g) * each, lanes * each}, step, pitch, temp);
      split_groups(temp, pitch, cols, lanes, each, to);
    }
  }
}

// A block's inputs.
static void depthwise_load(const ImageView& images, const DepthwiseBlocking& blocking,
                           const Block& b, int64_t first, int64_t groups, float* x, float* temp) {
  prefetch_planes(images.data, images.dtype, b.n * images.sn + first * blocking.c * images.sc,
                  images.sc, groups * blocking.c);
  b.each_run([&](int64_t h, int64_t w) {
    load_groups(images, {b.n, h, 1, w, b.cols.run, first, groups}, b.cols.step, blocking.c, x,
                blocking.blocking.x_floats, temp);
    x += b.cols.run * blocking.c * kTileCols;
  });
}

static void depthwise(const Conv2d& conv, const float* weight, int64_t begin, int64_t end,
                      int64_t panel_begin, int64_t panel_end, float* scratch) {
  const DepthwiseBlocking blocking(conv);
  const int64_t k = blocking.k, pool = conv.on_store.argmax ? 2 : 1, pitch = blocking.row_pitch;
  float *const rows = scratch + blocking.rows, *const temp = scratch + blocking.temp;
  const int64_t last = min(panel_end * kTileCols, conv.groups);
  const int64_t panel_floats = depthwise_panel_floats(conv);
  for (int64_t n = begin; n < end; ++n) {
    const Block b(conv, blocking.blocking, n);
    const int64_t cols = b.w_end - b.w;
    for (int64_t g = panel_begin * kTileCols; g < last; g += blocking.chunk) {
      const int64_t groups = min(last - g, blocking.chunk);
      const float* const taps = weight + g / kTileCols * panel_floats;
      bool finite = true;
      for (int64_t i = 0; i < ceil_div(groups, kTileCols); ++i)
        finite = finite && is_finite(taps + i * panel_floats, panel_floats - kWord);
      depthwise_load(conv.x, blocking, b, g, groups, scratch, temp);
      prefetch_planes(conv.y, conv.x.dtype, b.n * conv.yn + g * k * conv.yc, conv.yc, groups * k);
      const float* bias = conv.on_store.bias ? conv.on_store.bias + g * k : nullptr;
      if (bias && k > 1) {
        split_groups(bias, 0, 1, groups, k, scratch + blocking.biases);
        bias = scratch + blocking.biases;
      }
      for (int64_t h = b.h; h < b.h_end; h += pool) {
        if (k == 1 && is_direct(conv)) {
          depthwise_row(
              conv, blocking, b, scratch, taps, finite, groups, bias, h,
              static_cast<float*>(conv.y) + b.n * conv.yn + h * conv.yh + b.w * conv.yw + g,
              conv.yw);
          continue;
        }
        for (int64_t r = 0; r < pool; ++r) {
          float* const row = rows + r * cols * pitch;
          depthwise_row(conv, blocking, b, scratch, taps, finite, groups, bias, h + r,
                        k > 1 ? temp : row, pitch);
          if (k > 1) split_groups(temp, pitch, cols, groups, k, row, true);
        }
        store_row(conv, {b.n, h, pool, b.w, cols, g * k, groups * k}, rows, rows + cols * pitch,
                  pitch, rows + 2 * cols * pitch);
      }
    }
  }
}

// sums (groups, k) (+)= the sums of the pixels of a block's gradient, for a chunk of groups.
static void depthwise_sum_pixels(const DepthwiseBlocking& blocking, int64_t groups, int64_t pixels,
                                 float* scratch, float* sums, bool add) {
  const int64_t k = blocking.k, pitch = k * kTileCols;
  float *const temp = scratch + blocking.temp, *const biases = scratch + blocking.biases;
  for (int64_t g = 0; g < groups; g += kTileCols) {
    const int64_t lanes = min(groups - g, kTileCols);
    float* const to = sums + g * k;
    const View view = {scratch + blocking.g + g / kTileCols * blocking.g_floats, 1, pitch};
    sum_columns(view, pitch, pixels, temp, false);
    split_groups(temp, 0, 1, lanes, k, biases, true);
    for (int64_t i = 0; i < lanes * k; ++i) to[i] = biases[i] + (add ? to[i] : 0.0f);
  }
}

// sums: as packed weights
static void depthwise_grad_weight(const Conv2d& conv, const ImageView& grad_y, int64_t begin,
                                  int64_t end, int64_t panel_begin, int64_t panel_end, float* sums,
                                  float* bias_sums, float* scratch) {
  const DepthwiseBlocking blocking(conv);
  const int64_t c = blocking.c, k = blocking.k, x_pitch = c * kTileCols, g_pitch = k * kTileCols;
  float *const g_block = scratch + blocking.g, *const temp = scratch + blocking.temp;
  const int64_t last = min(panel_end * kTileCols, conv.groups);
  for (int64_t n = begin; n < end; ++n) {
    const Block b(conv, blocking.blocking, n);
    const int64_t rows = b.h_end - b.h, cols = b.w_end - b.w, x_row = b.cols.size() * x_pitch;
    const int64_t x_step = b.cols.output_step() * x_pitch, out_row = b.rows.output_step() * x_row;
    const Taps th = b.rows.taps(b.h), tw = b.cols.taps(b.w);
    const int64_t step = max(kDepth / cols, 1);  // sums of sums, for their error
    for (int64_t first = panel_begin * kTileCols; first < last; first += blocking.chunk) {
      const int64_t groups = min(last - first, blocking.chunk);
      depthwise_load(conv.x, blocking, b, first, groups, scratch, temp);
      for (int64_t h = 0; h < rows; ++h) {
        load_groups(grad_y, {b.n, b.h + h, 1, b.w, cols, first, groups}, 1, k,
                    g_block + h * cols * g_pitch, blocking.g_floats, temp);
      }
      if (bias_sums)
        depthwise_sum_pixels(blocking, groups, rows * cols, scratch, bias_sums + first * k,
                             n > begin);
      if (!sums) continue;
      each_tap_row(
          conv, first / kTileCols, ceil_div(first + groups, kTileCols), 0,
          [&](auto g, auto lanes, auto j, auto i, auto kh, auto at) {
            const Range inside = b.rows.inside(conv.x.H, kh, kh);
            const int64_t top = inside.begin - b.h, bottom = inside.end - b.h;
            const int64_t panel = (g - first) / kTileCols;
            const float* const x = scratch + panel * blocking.blocking.x_floats +
                                   kh * th.at_step * x_row + i * kTileCols;
            const float* const gs = g_block + panel * blocking.g_floats + j * kTileCols;
            each_tile(conv.w.taps, lanes, [=]<int R, int V>(int64_t kw) {
              for (int64_t h = 0; h < rows; h += step) {
                const auto add = [&](auto& tile, int64_t kw,
                                     Range w) __attribute__((always_inline)) {
                  const int64_t column = w.begin - b.w;
                  for (int64_t r = max(top, h); r < min(bottom, h + step); ++r)
                    add_lanes(tile, x + r * out_row + kw * tw.at_step * x_pitch + column * x_step,
                              tw.at_step * x_pitch, x_step, gs + (r * cols + column) * g_pitch,
                              g_pitch, w.size());
                };
                const GemmOutput out = {.c = sums + at, .row = kTileCols};
                const Step sum = {.first = n == begin && h == 0};
                Tile<R, V> tile;
                add(tile, kw, {b.w, b.w_end});
                if (!b.has_edges() || tile.is_finite()) {
                  tile.store(out, kw, 0, kTileCols, sum);
                  continue;
                }
                for (int64_t row = kw; row < kw + R; ++row) {
                  Tile<1, V> one;
                  add(one, row, b.cols.inside(conv.x.W, row, row));
                  one.store(out, row, 0, kTileCols, sum);
                }
              }
            });
          });
    }
  }
}

constexpr Conv2dAlgorithm kDepthwise = {.supports = depthwise_supports,
                                        .blocks = depthwise_blocks,
                                        .batch = one_block,
                                        .scratch = depthwise_scratch,
                                        .panels = depthwise_panels,
                                        .panel_floats = depthwise_panel_floats,
                                        .sum_floats = depthwise_sum_floats,
                                        .pack = depthwise_pack,
                                        .forward = depthwise,
                                        .grad_weight = depthwise_grad_weight,
                                        .unpack = depthwise_unpack};

}  // namespace
}  // namespace dlkernels::cpu
