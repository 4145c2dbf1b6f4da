// conv2d by the direct sum, and its gradients. For every output channel o of group g:
//   y[n, o, h, w] = sum_{i, kh, kw} x[n, g * c + i, h * stride - pad + kh * dilation, ...] *
//                   weight[o, i, kh, kw]
// A register tile is pixels by output channels: inputs of a block are broadcast against panels of
// weights. The taps of a row of the window are contiguous in a block, so there is no im2col matrix.
// Multiply-adds bound it where there are 16 channels or more; with 1 or 3, loads and stores do.
#pragma once
#include "cpu/simd/vec.h"
#include "cpu/conv2d/block.inl.h"
#include "cpu/conv2d/blocking.inl.h"
#include "cpu/gemm/gemm.inl.h"
#include "cpu/gemm/pack.inl.h"
#include "cpu/gemm/tile.inl.h"

namespace dlkernels::cpu {
namespace {

constexpr int64_t kFewChannels = 8;

static int64_t direct_blocks(const Conv2d& conv) { return Blocking(conv).count; }
static int64_t direct_scratch(const Conv2d& conv) {
  const Blocking blocking(conv);
  const int64_t rows =
      max((conv.on_store.argmax ? 3 : 1) * blocking.cols * kTileCols, blocking.g_floats);
  return blocking.x_floats + rows;
}

// ---- weights -------------------------------------------------------------------------------

// Panels: (groups, ceil(k / kTileCols), KH, KW, c, kTileCols), zeros beyond k, each with its word.
static int64_t direct_panels(const Conv2d& conv) {
  return conv.groups * ceil_div(conv.K / conv.groups, kTileCols);
}
static int64_t direct_weights(const Conv2d& conv) {
  return conv.h.taps * conv.w.taps * (conv.x.C / conv.groups) * kTileCols;
}
static int64_t direct_panel_floats(const Conv2d& conv) { return direct_weights(conv) + kWord; }

// What panel `index` is of: channels [k, k + lanes) of group `group`, counted in the group.
struct Panel {
  int64_t group, k, lanes;
  Panel(const Conv2d& conv, int64_t index) {
    const int64_t channels = conv.K / conv.groups, panels = direct_panels(conv) / conv.groups;
    group = index / panels;
    k = index % panels * kTileCols;
    lanes = min(channels - k, kTileCols);
  }
};

static void direct_pack(const Conv2d& conv, const WeightView& f, float* to, int64_t begin,
                        int64_t end) {
  const int64_t c = conv.x.C / conv.groups;
  with_type(conv.x.dtype, [&]<class T>() {
    const MaskedInput<T> s(f.data);
    for (int64_t i = begin; i < end; ++i) {
      const Panel p(conv, i);
      float* panel = to + i * direct_panel_floats(conv);
      const int64_t from = p.group * f.sg + p.k * f.so;
      for (int64_t kh = 0; kh < conv.h.taps; ++kh)
        for (int64_t kw = 0; kw < conv.w.taps; ++kw, panel += c * kTileCols)
          pack_panel<kTileCols>(s, from + kh * f.sh + kw * f.sw, f.so, f.si, p.lanes, c, panel);
      write_word(panel - direct_weights(conv), direct_weights(conv));
    }
  });
}

// ---- forward, and grad_input, which is one with up = stride ----------------------------------

// Row h of a block, one panel, some columns, to y: a pixel every y_step floats from b.w on.
static void direct_pixels(const Conv2d& conv, const Block& b, const float* x, const Panel& p,
                          const float* weight, int64_t h, Range pixels, float* y, int64_t y_step) {
  const int64_t C = conv.x.C, c = C / conv.groups, lanes = p.lanes;
  const Taps th = b.rows.taps(h).inside(conv.x.H);
  const int64_t x_row = b.cols.size() * C, x_step = b.cols.output_step() * C;
  for (int64_t w = pixels.begin; w < min(pixels.begin + conv.w.input_dilation, pixels.end); ++w) {
    const Taps tw = columns(conv, b, w, pixels.size() == 1);
    const bool joined = c == C && tw.step == 1 && tw.at_step == 1;  // taps along memory
    const int64_t taps_h = tw.count ? th.count : 0, taps_w = joined ? 1 : tw.count;
    const int64_t depth = joined ? tw.count * c : c;
    const float* const first = x + th.at * x_row + tw.at * C + p.group * c;
    const int64_t first_row = th.at_step * x_row, first_col = tw.at_step * C;
    const float* const panel = weight + (th.first * conv.w.taps + tw.first) * c * kTileCols;
    const int64_t panel_row = th.step * conv.w.taps * c * kTileCols;
    const int64_t panel_col = tw.step * c * kTileCols;
    const GemmOutput out = {
        .c = y + (w - b.w) * y_step,
        .row = conv.w.input_dilation * y_step,
        .col_bias = conv.on_store.bias ? conv.on_store.bias + p.group * (conv.K / conv.groups) + p.k
                                       : nullptr,
        .relu = conv.on_store.relu};
    // Inline: a short sum is over before as many references are followed (10 % for one channel).
    each_tile(ceil_div(pixels.end - w, conv.w.input_dilation), lanes,
              [&]<int R, int V>(int64_t pixel) __attribute__((always_inline)) {
                Tile<R, V> tile;
                for (int64_t i = 0; i < taps_h; ++i)
                  for (int64_t j = 0; j < taps_w; ++j)
                    tile.add_rows(first + pixel * x_step + i * first_row + j * first_col, x_step,
                                  panel + i * panel_row + j * panel_col, kTileCols, depth);
                tile.store(out, pixel, 0, lanes);
              });
  }
}

static void direct_row(const Conv2d& conv, const Block& b, const float* x, const Panel& p,
                       const float* weight, bool finite, int64_t h, float* y, int64_t y_step) {
  row_with_edges(b, finite,
                 [&](Range pixels) { direct_pixels(conv, b, x, p, weight, h, pixels, y, y_step); });
}

static void direct(const Conv2d& conv, const float* weight, int64_t begin, int64_t end,
                   int64_t panel_begin, int64_t panel_end, float* scratch) {
  const Blocking blocking(conv);
  const int64_t pool = conv.on_store.argmax ? 2 : 1;
  const bool deep =
      conv.h.taps * conv.w.taps * conv.x.C >= 4 * conv.groups * Vec::kWidth;  // time to prefetch
  float* const rows = scratch + blocking.x_floats;  // channels last, for what is still to be done
  for (int64_t i = begin; i < end; ++i) {
    const Block b(conv, blocking, i);
    const int64_t cols = b.w_end - b.w;
    b.load(conv.x, 0, conv.x.C, scratch);
    float* const pooled = rows + 2 * cols * kTileCols;
    for (int64_t j = panel_begin; j < panel_end; ++j) {
      const Panel p(conv, j);
      const int64_t k = p.group * (conv.K / conv.groups) + p.k;
      const float* panel = weight + j * direct_panel_floats(conv);
      const bool finite = is_finite(panel, direct_weights(conv));
      for (int64_t h = b.h; h < b.h_end; h += pool) {
        if (is_direct(conv)) {
          float* y = static_cast<float*>(conv.y) + b.n * conv.yn + h * conv.yh + b.w * conv.yw + k;
          direct_row(conv, b, scratch, p, panel, finite, h, y, conv.yw);
          continue;
        }
        const Region region = {b.n, h, pool, b.w, cols, k, p.lanes};
        if (conv.yc != 1 && deep) prefetch_rows(conv, region);
        for (int64_t r = 0; r < pool; ++r)
          direct_row(conv, b, scratch, p, panel, finite, h + r, rows + r * cols * kTileCols,
                     kTileCols);
        store_row(conv, region, rows, rows + cols * kTileCols, kTileCols, pooled);
      }
    }
  }
}

// ---- grad_weight and grad_bias ---------------------------------------------------------------

// sums[lane] (+)= the sum of g's pixels, `pitch` floats apart: sums of 16 first, for their error.
static void sum_pixels(const float* g, int64_t pitch, int64_t pixels, int64_t lanes, float* sums,
                       bool add) {
  each_vector(0, lanes, [&](int64_t lane, int64_t n) {
    Vec total = add ? load(sums + lane, n) : Vec::zero();
    for (int64_t w = 0; w < pixels;) {
      Vec sum = Vec::zero();
      for (const int64_t end = min(pixels, w + 16); w < end; ++w)
        sum = sum + Vec::load(g + w * pitch + lane);
      total = total + sum;
    }
    store(total, sums + lane, n);
  });
}

// sums (groups, KH, KW, c, k): of x's windows times the gradient g, over blocks [begin, end).
static void direct_grad_weight(const Conv2d& conv, const ImageView& grad_y, int64_t begin,
                               int64_t end, int64_t panel_begin, int64_t panel_end, float* sums,
                               float* bias_sums, float* scratch) {
  const Blocking blocking(conv);
  const int64_t C = conv.x.C, c = C / conv.groups, k = conv.K / conv.groups,
                taps = conv.h.taps * conv.w.taps;
  float* const g_block = scratch + blocking.x_floats;
  for (int64_t i = begin; i < end; ++i) {
    const Block b(conv, blocking, i);
    b.load(conv.x, 0, C, scratch);
    const int64_t rows = b.h_end - b.h, cols = b.w_end - b.w, x_row = b.cols.size() * C;
    const int64_t x_step = b.cols.output_step() * C, out_row = b.rows.output_step() * x_row;
    const Taps th = b.rows.taps(b.h), tw = b.cols.taps(b.w);
    // Taps along memory, where a tap alone has few channels for a tile's rows.
    const bool joined = conv.groups == 1 && tw.at_step == 1 && c < kFewChannels;
    load_block(grad_y, {b.n, b.h, rows, b.w, cols, 0, conv.K}, blocking.g_pitch, g_block);
    for (int64_t q = panel_begin; q < panel_end; ++q) {
      const Panel p(conv, q);
      const int64_t lanes = p.lanes, g_pitch = blocking.g_pitch;
      const float* const g = g_block + p.group * k + p.k;
      if (bias_sums)
        sum_pixels(g, g_pitch, rows * cols, lanes, bias_sums + p.group * k + p.k, i > begin);
      if (!sums) continue;
      for (int64_t kh = 0; kh < conv.h.taps; ++kh) {
        const Range inside = b.rows.inside(conv.x.H, kh, kh);
        const int64_t top = inside.begin - b.h, bottom = inside.end - b.h;
        for (int64_t kw = 0; kw < (joined ? 1 : conv.w.taps); ++kw) {
          // Taps that are joined have their columns in common, also those beside the image.
          const auto range = [&](int64_t kw) { return b.cols.inside(conv.x.W, kw, kw); };
          const Range w = joined ? Range{b.w, b.w_end} : range(kw);
          const float* const first =
              scratch + kh * th.at_step * x_row + kw * tw.at_step * C + p.group * c;
          const GemmOutput out = {
              .c = sums + (p.group * taps + kh * conv.w.taps + kw) * c * k + p.k, .row = k};
          const int64_t step = max(kDepth / cols, 1);  // sums of sums, for their error
          each_tile(joined ? conv.w.taps * c : c, lanes, [=]<int R, int V>(int64_t j) {
            for (int64_t h = 0; h < rows; h += step) {
              const auto add = [&](auto& tile, int64_t j, Range w) __attribute__((always_inline)) {
                for (int64_t r = max(top, h); r < min(bottom, h + step); ++r)
                  tile.add_columns(first + r * out_row + (w.begin - b.w) * x_step + j, x_step,
                                   g + (r * cols + w.begin - b.w) * g_pitch, g_pitch, w.size());
              };
              const Step sum = {.first = i == begin && h == 0};
              Tile<R, V> tile;
              add(tile, j, w);
              if (!joined || !b.has_edges() || tile.is_finite()) {
                tile.store(out, j, 0, lanes, sum);
                continue;
              }
              for (int64_t row = j; row < j + R; ++row) {
                Tile<1, V> one;
                add(one, row, range(row / c));
                one.store(out, row, 0, lanes, sum);
              }
            }
          });
        }
      }
    }
  }
}

static int64_t direct_sum_floats(const Conv2d& conv) {
  return conv.h.taps * conv.w.taps * (conv.x.C / conv.groups) * conv.K;
}

// to[k, c, kh, kw] = sums as above, summed already, of panels [begin, end).
static void direct_unpack(const Conv2d& conv, const float* sums, const WeightView& f, void* to,
                          int64_t begin, int64_t end) {
  const int64_t c = conv.x.C / conv.groups, k = conv.K / conv.groups,
                taps = conv.h.taps * conv.w.taps;
  with_type(conv.x.dtype, [&]<class T>() {
    for (int64_t q = begin; q < end; ++q) {
      const Panel p(conv, q);
      T* const weight = static_cast<T*>(to) + p.group * f.sg + p.k * f.so;
      for (int64_t kh = 0; kh < conv.h.taps; ++kh)
        for (int64_t kw = 0; kw < conv.w.taps; ++kw) {
          const float* from = sums + (p.group * taps + kh * conv.w.taps + kw) * c * k + p.k;
          unpack_panel(from, k, p.lanes, c, weight + kh * f.sh + kw * f.sw, f.so, f.si);
        }
    }
  });
}

constexpr Conv2dAlgorithm kDirect = {.supports = [](const Conv2d&) { return true; },
                                     .blocks = direct_blocks,
                                     .batch = one_block,
                                     .scratch = direct_scratch,
                                     .panels = direct_panels,
                                     .panel_floats = direct_panel_floats,
                                     .sum_floats = direct_sum_floats,
                                     .pack = direct_pack,
                                     .forward = direct,
                                     .grad_weight = direct_grad_weight,
                                     .unpack = direct_unpack};

}  // namespace
}  // namespace dlkernels::cpu
