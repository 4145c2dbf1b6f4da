// conv2d with at most 8 output channels, the sum of direct.inl.h. Lanes are pixels, since so few
// channels would fill few lanes, and the channels are a tile's rows.
// A row of outputs continues into the margin of its row of inputs, so a block is one long row.
// Weights and their gradient are those of direct.inl.h.
#pragma once
#include "cpu/simd/vec.h"
#include "cpu/conv2d/block.inl.h"
#include "cpu/conv2d/blocking.inl.h"
#include "cpu/conv2d/direct.inl.h"
#include "cpu/gemm/pack.inl.h"
#include "cpu/gemm/tile.inl.h"

namespace dlkernels::cpu {
namespace {

constexpr int64_t kPixel = max(kFewChannels, Vec::kWidth);

static bool small_k_supports(const Conv2d& conv) {
  if (conv.groups != 1 || conv.K > kFewChannels) return false;
  const Blocking blocking(conv);
  // The last block is the smallest: where its inputs are one run, so are those of all.
  const auto is_one_run = [](const ConvAxis& a, int64_t size) {
    return a.stride == 1 && a.input_dilation == 1 && !Span(a, 0, (a.out - 1) % size + 1).disjoint;
  };
  return is_one_run(conv.h, blocking.rows) && is_one_run(conv.w, blocking.cols) &&
         2 * blocking.cols >= Span(conv.w, 0, blocking.cols).size();
}

// Where they are in scratch: a plane of inputs each for C channels, of outputs for K, then rows.
struct Planes {
  int64_t in_pitch, out_pitch, out, rows, floats;

  Planes(const Conv2d& conv, const Blocking& blocking) {
    constexpr int64_t kBeyond = 4 * Vec::kWidth;  // the last tile's
    const int64_t cols = Span(conv.w, 0, blocking.cols).size();
    in_pitch = round_up(Span(conv.h, 0, blocking.rows).size() * cols);
    out_pitch = round_up(blocking.rows * cols) + kBeyond;
    const int64_t in = conv.x.C * in_pitch;  // and the same again, channels last
    out = 2 * in + kBeyond;
    rows = out + conv.K * out_pitch;
    floats = rows + 3 * blocking.cols * kPixel;
  }
};

// Outputs [o, o + V * kWidth) of R planes, the inputs of o's first tap at x.
// Not inline: the loops around it would take its registers (10 % for one channel).
template <int R, int V>
__attribute__((noinline)) static void planes_tile(const Conv2d& conv, const float* weight,
                                                  const float* x, int64_t x_pitch, int64_t row,
                                                  const GemmOutput& y, int64_t o) {
  const int64_t C = conv.x.C, tap = C * kTileCols;
  Tile<R, V> tile;
  for (int64_t c = 0; c < C; ++c)
    for (int64_t kh = 0; kh < conv.h.taps; ++kh)
      tile.add_columns(weight + kh * conv.w.taps * tap + c * kTileCols, tap,
                       x + o + c * x_pitch + kh * conv.h.dilation * row, conv.w.dilation,
                       conv.w.taps);
  tile.store(y, 0, o);
}

// What the zeros outside of the image have made NaN, again, without them.
static void planes_edges(const Conv2d& conv, const Block& b, const Planes& p, const float* weight,
                         const float* x, float* out) {
  const int64_t C = conv.x.C, row = b.cols.size();
  for (int64_t h = b.h; h < b.h_end; ++h)
    for (int64_t w = b.w; w < b.w_end; ++w)
      for (int64_t k = 0; k < conv.K; ++k) {
        float& y = out[k * p.out_pitch + (h - b.h) * row + w - b.w];
        if (y == y) continue;
        const Taps th = b.rows.taps(h).inside(conv.x.H), tw = b.cols.taps(w).inside(conv.x.W);
        float sum = 0;
        for (int64_t c = 0; c < C; ++c)
          for (int64_t i = 0; i < th.count; ++i)
            for (int64_t j = 0; j < tw.count; ++j) {
              const int64_t tap = (th.first + i) * conv.w.taps + tw.first + j;
              sum += x[c * p.in_pitch + (th.at + i * th.at_step) * row + tw.at + j * tw.at_step] *
                     weight[(tap * C + c) * kTileCols + k];
            }
        if (conv.on_store.bias) sum += conv.on_store.bias[k];
        y = conv.on_store.relu && sum < 0 ? 0 : sum;
      }
}

static void small_k_block(const Conv2d& conv, const Blocking& blocking, const Block& b,
                          const float* weight, float* scratch) {
  const Planes p(conv, blocking);
  const int64_t C = conv.x.C, row = b.cols.size(), pixels = b.rows.size() * row;
  if (conv.x.sw == 1 && !conv.x.on_load.argmax) {
    for (int64_t c = 0; c < C; ++c) b.load(conv.x, c, 1, scratch + c * p.in_pitch);
  } else {
    float* const last = scratch + C * p.in_pitch;
    b.load(conv.x, 0, C, last);
    transpose_copy(MaskedInput<float>(last), 0, C, pixels, C, scratch, p.in_pitch);
  }
  const int64_t rows = b.h_end - b.h, cols = b.w_end - b.w, pool = conv.on_store.argmax ? 2 : 1;
  float* const out = scratch + p.out;
  const GemmOutput y = {
      .c = out, .row = p.out_pitch, .row_bias = conv.on_store.bias, .relu = conv.on_store.relu};
  const int64_t size = (rows - 1) * row + cols;
  with_rows<kFewChannels>(conv.K, [&]<int R>() {
    constexpr int V = min(4, max(1, kTileRows * kTileVecs / R)), kStep = V * Vec::kWidth;
    int64_t o = 0;
    for (; o + kStep <= size; o += kStep)
      planes_tile<R, V>(conv, weight, scratch, p.in_pitch, row, y, o);
    for (; o < size; o += Vec::kWidth)
      planes_tile<R, 1>(conv, weight, scratch, p.in_pitch, row, y, o);
  });
  if (!is_finite(weight, conv.h.taps * conv.w.taps * C * kTileCols))
    planes_edges(conv, b, p, weight, scratch, out);
  for (int64_t h = 0; h < rows; h += pool) {
    if (conv.yc != 1 && !conv.on_store.argmax) {
      with_type(conv.x.dtype, [&]<class T>() {
        T* const to = static_cast<T*>(conv.y) + b.n * conv.yn + (b.h + h) * conv.yh + b.w;
        for (int64_t k = 0; k < conv.K; ++k)
          pack_run(MaskedInput<float>(out), k * p.out_pitch + h * row, cols, cols,
                   to + k * conv.yc);
      });
      continue;
    }
    float* const last = scratch + p.rows;
    for (int64_t r = 0; r < pool; ++r)
      transpose_copy(MaskedInput<float>(out), (h + r) * row, p.out_pitch, conv.K, cols,
                     last + r * cols * kPixel, kPixel);
    store_row(conv, {b.n, b.h + h, pool, b.w, cols, 0, conv.K}, last, last + cols * kPixel, kPixel,
              last + 2 * cols * kPixel);
  }
}

static int64_t small_k_scratch(const Conv2d& conv) {
  return max(direct_scratch(conv), Planes(conv, Blocking(conv)).floats);
}

static void small_k(const Conv2d& conv, const float* weight, int64_t begin, int64_t end,
                    int64_t panel_begin, int64_t panel_end, float* scratch) {
  if (panel_begin == panel_end) return;  // all channels are one panel
  const Blocking blocking(conv);
  for (int64_t i = begin; i < end; ++i)
    small_k_block(conv, blocking, Block(conv, blocking, i), weight, scratch);
}

constexpr Conv2dAlgorithm kSmallK = {.supports = small_k_supports,
                                     .blocks = direct_blocks,
                                     .batch = one_block,
                                     .scratch = small_k_scratch,
                                     .panels = direct_panels,
                                     .panel_floats = direct_panel_floats,
                                     .sum_floats = direct_sum_floats,
                                     .pack = direct_pack,
                                     .forward = small_k,
                                     .grad_weight = direct_grad_weight,
                                     .unpack = direct_unpack};

}  // namespace
}  // namespace dlkernels::cpu
