// conv2d where the window reaches far beyond the image, as in the gradient of a convolution without
// padding. The sum is that of direct.inl.h in another order: every input is multiplied by the whole
// window, and each row of products, (KW, K), is added to the outputs that read the input.
// Lanes are the window's columns times the few output channels.
// The direct sum would multiply mostly zeros there; this one multiplies none.
#pragma once
#include "cpu/simd/vec.h"
#include "cpu/conv2d/block.inl.h"
#include "cpu/conv2d/blocking.inl.h"
#include "cpu/conv2d/direct.inl.h"
#include "cpu/conv2d/small_k.inl.h"
#include "cpu/gemm/pack.inl.h"
#include "cpu/gemm/tile.inl.h"

namespace dlkernels::cpu {
namespace {

struct Scatter {
  int64_t lanes, panels;       // of a row of the window
  int64_t margin, pitch, out;  // a row of outputs in scratch: as many columns more on both sides
  int64_t floats;

  Scatter(const Conv2d& conv, const Blocking& blocking)
      : lanes(conv.w.taps * conv.K),
        panels(ceil_div(lanes, kTileCols)),
        margin((conv.w.taps - 1) * conv.K),
        pitch(conv.w.out * conv.K + 2 * margin),
        out(round_up(Span(conv.h, 0, blocking.rows).size() * conv.x.W * conv.x.C)),
        floats(out + round_up(blocking.rows * pitch) + Vec::kWidth) {}
};

static bool scatter_supports(const Conv2d& conv) {
  const int64_t taps = conv.w.taps * conv.K;
  return conv.x.C >= Vec::kWidth && conv.w.dilation == 1 && conv.h.pad >= 0 && conv.w.pad >= 0 &&
         !conv.on_store.bias && !conv.on_store.relu && !conv.on_store.argmax &&
         conv.x.H * conv.x.W * round_up(taps) <
             conv.h.out * (conv.w.out + conv.w.taps - 1) * taps &&
         small_k_supports(conv) && Blocking(conv).count_w == 1;
}

// To (KH, panels, C, kTileCols), the window's columns from last to first.
static void scatter_pack(const Conv2d& conv, const WeightView& f, float* to, int64_t begin,
                         int64_t end) {
  if (begin == end) return;  // all channels are one panel
  const Blocking blocking(conv);
  const Scatter s(conv, blocking);
  const int64_t C = conv.x.C, K = conv.K;
  store_zeros(to, conv.h.taps * s.panels * C * kTileCols);
  with_type(conv.x.dtype, [&]<class T>() {
    const MaskedInput<T> from(f.data);
    for (int64_t kh = 0; kh < conv.h.taps; ++kh)
      for (int64_t kw = 0; kw < conv.w.taps; ++kw)
        for (int64_t k = 0; k < K; ++k) {
          const int64_t lane = (conv.w.taps - 1 - kw) * K + k;
          float* const panel = to + (kh * s.panels + lane / kTileCols) * C * kTileCols;
          for (int64_t c = 0; c < C; ++c)
            panel[c * kTileCols + lane % kTileCols] =
                from.at(k * f.so + c * f.si + kh * f.sh + kw * f.sw);
        }
  });
}

static void scatter_block(const Conv2d& conv, const Blocking& blocking, const Block& b,
                          const float* weight, float* x) {
  const Scatter s(conv, blocking);
  const int64_t C = conv.x.C, W = conv.x.W, K = conv.K, rows = b.h_end - b.h;
  const int64_t top = max(0, b.h - conv.h.pad),
                bottom = min(conv.x.H, b.rows.begin(0) + b.rows.size());
  for (int64_t h = top; h < bottom; ++h)
    load_row(conv.x, {b.n, h, 1, 0, W, 0, C}, 1, C, x + (h - top) * W * C);
  float* const out = x + s.out;
  store_zeros(out, rows * s.pitch);
  // Inputs in one column see outputs in one column, each its own: they are a tile's rows.
  for (int64_t kh = 0; kh < conv.h.taps; ++kh) {
    const int64_t down = conv.h.pad - kh * conv.h.dilation - b.h;  // from an input to its output
    const int64_t first = max(top, -down), last = min(bottom, rows - down);
    for (int64_t w = 0; w < min(W, conv.w.out + conv.w.taps - 1 - conv.w.pad); ++w)
      for (int64_t j = 0; j < s.panels; ++j) {
        const int64_t lanes = min(s.lanes - j * kTileCols, kTileCols);
        const float* const panel = weight + (kh * s.panels + j) * C * kTileCols;
        const float* const from = x + ((first - top) * W + w) * C;
        const GemmOutput to = {
            .c = out + (first + down) * s.pitch + (w + conv.w.pad) * K + j * kTileCols,
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
    store_row(conv, {b.n, b.h + h, 1, 0, conv.w.out, 0, K}, out + h * s.pitch + s.margin, nullptr,
              K, nullptr);
}

static int64_t scatter_scratch(const Conv2d& conv) {
  return max(direct_scratch(conv), Scatter(conv, Blocking(conv)).floats);
}

static void scatter(const Conv2d& conv, const float* weight, int64_t begin, int64_t end,
                    int64_t panel_begin, int64_t panel_end, float* scratch) {
  if (panel_begin == panel_end) return;  // all channels are one panel
  const Blocking blocking(conv);
  for (int64_t i = begin; i < end; ++i)
    scatter_block(conv, blocking, Block(conv, blocking, i), weight, scratch);
}

constexpr Conv2dAlgorithm kScatter = {.supports = scatter_supports,
                                      .blocks = direct_blocks,
                                      .batch = one_block,
                                      .scratch = scatter_scratch,
                                      .panels = direct_panels,
                                      .panel_floats = direct_panel_floats,
                                      .sum_floats = direct_sum_floats,
                                      .pack = scatter_pack,
                                      .forward = scatter,
                                      .grad_weight = direct_grad_weight,
                                      .unpack = direct_unpack};

}  // namespace
}  // namespace dlkernels::cpu
