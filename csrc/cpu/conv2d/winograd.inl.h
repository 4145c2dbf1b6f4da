// conv2d of 3x3 windows with stride 1 by Winograd's algorithm: M x M outputs of a channel pair take
// (M + 2)^2 multiplications instead of 9 M^2. With the matrices of winograd_transforms.inl.h, for a
// tile x of (M + 2)^2 inputs and * element by element:
//   y = A' [sum_c (B' x B) * (G w G')] A         grad_w = G' [sum_tiles (B' x B) * (A grad_y A')] G
// Each of the (M + 2)^2 points is one matrix product. In cache the products take four fifths of the
// time and run at 95 % of the FMA peak; from DRAM, memory bounds the whole.
#pragma once
#include "cpu/simd/vec.h"
#include "cpu/conv2d/block.inl.h"
#include "cpu/conv2d/blocking.inl.h"
#include "cpu/conv2d/winograd_transforms.inl.h"
#include "cpu/gemm/pack.inl.h"
#include "cpu/gemm/tile.inl.h"

namespace dlkernels::cpu {
namespace {

// ---- blocks, and batches of them -------------------------------------------------------------

// How many channels and floats are loaded at a time: longer runs of memory, but in L1 or near it.
constexpr int64_t kLoadChannels = 128, kLoadFloats = 1 << 13;

// How the tiles of an image are cut into blocks, from the sizes alone. As many blocks as have
// kTiles tiles are a batch: products of matrices with that many rows. With 16 or 32 the weights are
// read too often, 128 is no better; a batch and its results need not fit into L2.
template <int M>
struct WinogradBlocking {
  static constexpr int64_t kPoints = (M + 2) * (M + 2);
  static constexpr int64_t kTiles = 64;
  int64_t tile_rows, tile_cols;  // of an image
  int64_t rows, cols;            // of a block
  int64_t count_w, count;        // blocks an image
  int64_t batch, tiles;          // blocks and tiles of a batch
  int64_t pitch, plane;          // of inputs, by tiles and by points
  int64_t in_floats, load_floats;

  explicit WinogradBlocking(const Conv2d& conv) {
    constexpr int64_t kCols = 16;
    tile_rows = ceil_div(conv.h.out, M), tile_cols = ceil_div(conv.w.out, M);
    count_w = ceil_div(tile_cols, kCols);
    cols = ceil_div(tile_cols, count_w);
    rows = min(tile_rows, max(1, kTiles / cols));
    const int64_t count_h = ceil_div(tile_rows, rows);
    rows = ceil_div(tile_rows, count_h);
    count = count_h * count_w;
    batch = max(1, kTiles / (rows * cols));
    tiles = batch * rows * cols;
    pitch = pitch_of(conv.x.C);
    plane = plane_of(tiles, pitch);
    in_floats = kPoints * plane;
    load_floats = (M * cols + 2) * (M + 2) * kLoadChannels + kLoadFloats;
  }
  // Rows and planes a power of two apart would meet in the same few sets of the cache.
  static int64_t pitch_of(int64_t channels) {
    const int64_t lines = ceil_div(channels, 16);
    return 16 * (lines + (lines % 8 == 0));
  }
  static int64_t plane_of(int64_t tiles, int64_t pitch) {
    return ((tiles * pitch + 15) / 16 | 1) * 16;
  }
};

static bool winograd_supports(const Conv2d& conv) {
  const auto is_plain_3 = [](const ConvAxis& a) {
    return a.taps == 3 && a.stride == 1 && a.dilation == 1 && a.input_dilation == 1;
  };
  return conv.groups == 1 && is_plain_3(conv.h) && is_plain_3(conv.w);
}

template <int M>
static int64_t winograd_blocks(const Conv2d& conv) {
  return WinogradBlocking<M>(conv).count;
}
template <int M>
static int64_t winograd_batch(const Conv2d& conv) {
  return WinogradBlocking<M>(conv).batch;
}

// One block: rows x cols tiles of image n.
struct TileBlock {
  int64_t n, row, rows, col, cols;

  template <class Blocking>
  TileBlock(const Blocking& blocking, int64_t index) {
    n = index / blocking.count;
    row = index % blocking.count / blocking.count_w * blocking.rows;
    col = index % blocking.count % blocking.count_w * blocking.cols;
    rows = min(blocking.rows, blocking.tile_rows - row),
    cols = min(blocking.cols, blocking.tile_cols - col);
  }
  int64_t tiles() const { return rows * cols; }
};

// Channels [c, c_end) of a block's tiles, transformed by m, to `to`: element (point, tile, c).
template <const auto& m, int M>
static void winograd_load(const ImageView& x, const TileBlock& b, int64_t top, int64_t left,
                          int64_t c, int64_t c_end, float* to, int64_t pitch, int64_t plane,
                          float* scratch) {
  constexpr int kFrom = sizeof m.at[0] / sizeof(float), kTo = sizeof m.at / sizeof m.at[0];
  // In the order of memory: many channels of a few rows, or the other way round.
  const int64_t channels = x.sc == 1 ? min(max(c_end - c, 1), kLoadChannels) : Vec::kWidth;
  const int64_t cols = M * (b.cols - 1) + kFrom;
  const int64_t rows = max(1, (kLoadFloats / (cols * channels) - kFrom + M) / M);
  for (int64_t row = 0; row < b.rows; row += rows)
    for (int64_t k = c; k < c_end; k += channels) {
      const int64_t row_end = min(row + rows, b.rows);
      const int64_t count = min(c_end - k, channels);
      const int64_t part_pitch = round_up(count);
      const Region region = {.n = b.n,
                             .h = M * (b.row + row) - top,
                             .rows = M * (row_end - row - 1) + kFrom,
                             .w = M * b.col - left,
                             .cols = cols,
                             .c = k,
                             .channels = count};
      load_block(x, region, part_pitch, scratch);
      float* tile = to + row * b.cols * pitch + k - c;
      for (int64_t i = 0; i < row_end - row; ++i)
        for (int64_t j = 0; j < b.cols; ++j, tile += pitch)
          for (int64_t v = 0; v < count; v += Vec::kWidth) {
            const float* from = scratch + (i * cols + j) * M * part_pitch + v;
            transform<m>(
                [&](int h, int w) { return Vec::load(from + (h * cols + w) * part_pitch); },
                [&](int h, int w, Vec e) { e.store(tile + v + (h * kTo + w) * plane); });
          }
    }
}

// ---- weights -------------------------------------------------------------------------------

// Panels (ceil(K / kTileCols), point, C, kTileCols), zeros beyond K; so are the sums of
// grad_weight.
static int64_t winograd_panels(const Conv2d& conv) { return ceil_div(conv.K, kTileCols); }
template <int M>
static int64_t winograd_panel_floats(const Conv2d& conv) {
  return WinogradBlocking<M>::kPoints * conv.x.C * kTileCols;
}

template <int M>
static int64_t winograd_sum_floats(const Conv2d& conv) {
  return winograd_panels(conv) * winograd_panel_floats<M>(conv);
}

// Inputs whose weights are transposed at a time.
constexpr int64_t kFilterInputs = 16;

template <int M, class T>
static void winograd_pack_of(const Conv2d& conv, const WeightView& f, float* to, int64_t begin,
                             int64_t end) {
  const MaskedInput<T> s(f.data);
  constexpr int64_t kPoints = WinogradBlocking<M>::kPoints;
  const int64_t C = conv.x.C;
  float taps[kFilterInputs * 9 * kTileCols];
  for (int64_t p = begin; p < end; ++p) {
    const int64_t lanes = min(conv.K - p * kTileCols, kTileCols);
    for (int64_t c = 0; c < C; c += kFilterInputs) {
      const int64_t inputs = min(C - c, kFilterInputs);
      const int64_t from = p * kTileCols * f.so + c * f.si;
      const bool reversed = f.sw == -1 && f.sh == -3;  // taps along memory, last to first
      const bool along = reversed || (f.sw == 1 && f.sh == 3);
      // taps[input][tap][output] or taps[tap][input][output], whichever is the weights' order
      const int64_t input = (along ? 9 : 1) * kTileCols, tap = (along ? 1 : inputs) * kTileCols;
      for (int64_t i = 0; i < inputs && along; ++i)
        pack_panel<kTileCols>(s, from + i * f.si - (reversed ? 8 : 0), f.so, 1, lanes, 9,
                              taps + i * input);
      for (int64_t i = 0; i < 9 && !along; ++i)
        pack_panel<kTileCols>(s, from + i / 3 * f.sh + i % 3 * f.sw, f.so, f.si, lanes, inputs,
                              taps + i * tap);
      for (int64_t i = 0; i < inputs; ++i)
        for (int64_t o = 0; o < kTileCols; o += Vec::kWidth) {
          const float* t = taps + i * input + o;
          float* const u = to + (p * kPoints * C + c + i) * kTileCols + o;
          const auto at = [&](int h, int w) {
            return Vec::load(t + (reversed ? 8 - 3 * h - w : 3 * h + w) * tap);
          };
          transform<Winograd<M>::kWeight>(
              at, [&](int h, int w, Vec e) { e.store(u + (h * (M + 2) + w) * C * kTileCols); });
        }
    }
  }
}
template <int M>
static void winograd_pack(const Conv2d& conv, const WeightView& f, float* to, int64_t begin,
                          int64_t end) {
  with_type(conv.x.dtype, [&]<class T>() { winograd_pack_of<M, T>(conv, f, to, begin, end); });
}

// ---- forward, and grad_input, which is one with rotated weights -------------------------------

template <int M>
static int64_t winograd_scratch(const Conv2d& conv) {
  using Blocking = WinogradBlocking<M>;
  const Blocking blocking(conv);
  const int64_t forward = Blocking::kPoints * Blocking::plane_of(blocking.tiles, kTileCols);
  const int64_t backward =
      Blocking::kPoints *
      Blocking::plane_of(blocking.tiles, Blocking::pitch_of(winograd_panels(conv) * kTileCols));
  return blocking.in_floats + blocking.load_floats + max(forward, backward);
}

// to[t, k] = sum_c a[t, c] * u[c, k], for `cols` of a panel's k.
static void winograd_product(int64_t tiles, int64_t cols, const float* a, int64_t pitch,
                             const float* u, int64_t depth, float* to) {
  each_tile(tiles, cols, [=]<int R, int V>(int64_t t) {
    Tile<R, V> tile;
    tile.add_rows(a + t * pitch, pitch, u, kTileCols, depth);
    tile.store({.c = to, .row = kTileCols}, t, 0);
  });
}

// Channels [k, k + lanes) of a block's outputs, from their points: element (point, tile, k).
template <int M>
static void winograd_store(const Conv2d& conv, const TileBlock& b, int64_t k, int64_t lanes,
                           const float* from, int64_t plane, float* scratch) {
  const Vec bias = conv.on_store.bias ? load(conv.on_store.bias + k, lanes) : Vec::zero();
  const int64_t pool = conv.on_store.argmax ? 2 : 1,
                width = min(conv.w.out - M * b.col, M * b.cols);
  float* const pooled = scratch + M * M * b.cols * Vec::kWidth;
  for (int64_t i = 0; i < b.rows; ++i) {
    const int64_t h0 = M * (b.row + i), rows = min(conv.h.out - h0, M);
    const bool whole = is_direct(conv) && lanes == Vec::kWidth && rows == M && width == M * b.cols;
    float* const to =
        whole ? static_cast<float*>(conv.y) + b.n * conv.yn + h0 * conv.yh + M * b.col * conv.yw + k
              : scratch;
    if (conv.yc != 1) prefetch_rows(conv, {b.n, h0, rows, M * b.col, width, k, lanes});
    const int64_t row = whole ? conv.yh : M * b.cols * Vec::kWidth,
                  col = whole ? conv.yw : Vec::kWidth;
    for (int64_t j = 0; j < b.cols; ++j, from += kTileCols)
      transform<Winograd<M>::kOut>(
          [&](int h, int w) { return Vec::load(from + (h * (M + 2) + w) * plane); },
          [&](int h, int w, Vec z) {
            z = z + bias;
            if (conv.on_store.relu) z = max(Vec::zero(), z);  // this order keeps NaN and -0.0
            z.store(to + h * row + (M * j + w) * col);
          });
    if (whole) continue;
    for (int64_t h = 0; h < rows; h += pool)
      store_row(conv, {b.n, h0 + h, pool, M * b.col, width, k, lanes}, to + h * row,
                to + (h + 1) * row, col, pooled);
  }
}

template <int M>
static void winograd(const Conv2d& conv, const float* packed, int64_t begin, int64_t end,
                     int64_t panel_begin, int64_t panel_end, float* scratch) {
  using Blocking = WinogradBlocking<M>;
  const Blocking blocking(conv);
  const int64_t C = conv.x.C, plane = Blocking::plane_of(blocking.tiles, kTileCols);
  float* const in = scratch;
  float* const row = in + blocking.in_floats;
  float* const out = row + blocking.load_floats;
  for (int64_t first = begin; first < end; first += blocking.batch) {
    const int64_t last = min(end, first + blocking.batch);
    int64_t tiles = 0;
    for (int64_t i = first; i < last; ++i) {
      const TileBlock b(blocking, i);
      winograd_load<Winograd<M>::kIn, M>(conv.x, b, conv.h.pad, conv.w.pad, 0, C,
                                         in + tiles * blocking.pitch, blocking.pitch,
                                         blocking.plane, row);
      tiles += b.tiles();
    }
    for (int64_t p = panel_begin; p < panel_end; ++p) {
      const int64_t k_begin = p * kTileCols, k_end = min(conv.K, k_begin + kTileCols);
      for (int64_t q = 0; q < Blocking::kPoints; ++q) {
        const float* const u = packed + (p * Blocking::kPoints + q) * C * kTileCols;
        winograd_product(tiles, k_end - k_begin, in + q * blocking.plane, blocking.pitch, u, C,
                         out + q * plane);
      }
      const float* from = out;
      for (int64_t i = first; i < last; ++i) {
        const TileBlock b(blocking, i);
        for (int64_t k = k_begin; k < k_end; k += Vec::kWidth)
          winograd_store<M>(conv, b, k, min(k_end - k, Vec::kWidth), from + k - k_begin, plane,
                            row);
        from += b.tiles() * kTileCols;
      }
    }
  }
}

// ---- grad_weight and grad_bias ---------------------------------------------------------------

// to[c, k] (+)= sum_t a[t, c] * g[t, k], for `cols` of a panel's k.
static void winograd_sum(int64_t channels, int64_t cols, const float* a, int64_t pitch,
                         const float* g, int64_t g_pitch, int64_t tiles, float* to, bool add) {
  each_tile(channels, cols, [=]<int R, int V>(int64_t c) {
    Tile<R, V> tile;
    tile.add_columns(a + c, pitch, g, g_pitch, tiles);
    tile.store({.c = to, .row = kTileCols, .accumulate = add}, c, 0);
  });
}

template <int M>
static void winograd_grad_weight(const Conv2d& conv, const ImageView& grad_y, int64_t begin,
                                 int64_t end, int64_t panel_begin, int64_t panel_end, float* sums,
                                 float* bias_sums, float* scratch) {
  using Blocking = WinogradBlocking<M>;
  const Blocking blocking(conv);
  const int64_t C = conv.x.C, k_begin = panel_begin * kTileCols;
  const int64_t k_end = min(conv.K, panel_end * kTileCols);
  const int64_t g_pitch = Blocking::pitch_of((panel_end - panel_begin) * kTileCols);
  const int64_t g_plane = Blocking::plane_of(blocking.tiles, g_pitch);
  float* const in = scratch;
  float* const row = in + blocking.in_floats;
  float* const g = row + blocking.load_floats;
  for (int64_t first = begin; first < end; first += blocking.batch) {
    const int64_t last = min(end, first + blocking.batch);
    int64_t tiles = 0;
    for (int64_t i = first; i < last; ++i) {
      const TileBlock b(blocking, i);
      winograd_load<Winograd<M>::kIn, M>(conv.x, b, conv.h.pad, conv.w.pad, 0, C,
                                         in + tiles * blocking.pitch, blocking.pitch,
                                         blocking.plane, row);
      winograd_load<Winograd<M>::kOutT, M>(grad_y, b, 0, 0, k_begin, k_end, g + tiles * g_pitch,
                                           g_pitch, g_plane, row);
      tiles += b.tiles();
    }
    if (bias_sums) {  // at the point (1, 1) the transform is the sum over a tile
      const float* const ones = g + (M + 3) * g_plane;
      each_vector(k_begin, k_end, [&](int64_t k, int64_t n) {
        Vec sum = Vec::zero();
        for (int64_t t = 0; t < tiles; ++t) sum = sum + Vec::load(ones + t * g_pitch + k - k_begin);
        store(first > begin ? sum + load(bias_sums + k, n) : sum, bias_sums + k, n);
      });
    }
    for (int64_t q = 0; q < Blocking::kPoints && sums; ++q)
      for (int64_t p = panel_begin; p < panel_end; ++p) {
        winograd_sum(C, conv.K - p * kTileCols, in + q * blocking.plane, blocking.pitch,
                     g + q * g_plane + (p - panel_begin) * kTileCols, g_pitch, tiles,
                     sums + (p * Blocking::kPoints + q) * C * kTileCols, first > begin);
      }
  }
}

// The gradient of panels [begin, end) from their sums, in the strides of a filter.
template <int M, class T>
static void winograd_unpack_of(const Conv2d& conv, const float* sums, const WeightView& f, T* to,
                               int64_t begin, int64_t end) {
  constexpr int64_t kPoints = WinogradBlocking<M>::kPoints;
  const int64_t C = conv.x.C;
  float taps[kFilterInputs * 9 * kTileCols];
  for (int64_t p = begin; p < end; ++p) {
    const int64_t lanes = min(conv.K - p * kTileCols, kTileCols);
    for (int64_t c = 0; c < C; c += kFilterInputs) {
      const int64_t inputs = min(C - c, kFilterInputs);
      for (int64_t i = 0; i < inputs; ++i)
        for (int64_t o = 0; o < lanes; o += Vec::kWidth) {
          const float* s = sums + (p * kPoints * C + c + i) * kTileCols + o;
          float* const t = taps + i * 9 * kTileCols + o;
          transform<Winograd<M>::kWeightT>(
              [&](int h, int w) { return Vec::load(s + (h * (M + 2) + w) * C * kTileCols); },
              [&](int h, int w, Vec e) { e.store(t + (3 * h + w) * kTileCols); });
        }
      T* const weight = to + p * kTileCols * f.so + c * f.si;
      const bool along = f.sw == 1 && f.sh == 3;  // taps along memory
      for (int64_t i = 0; i < inputs && along; ++i)
        unpack_panel(taps + i * 9 * kTileCols, kTileCols, lanes, 9, weight + i * f.si, f.so, 1);
      for (int64_t i = 0; i < 9 && !along; ++i)
        unpack_panel(taps + i * kTileCols, 9 * kTileCols, lanes, inputs,
                     weight + i / 3 * f.sh + i % 3 * f.sw, f.so, f.si);
    }
  }
}

template <int M>
static void winograd_unpack(const Conv2d& conv, const float* sums, const WeightView& f, void* to,
                            int64_t begin, int64_t end) {
  with_type(conv.x.dtype, [&]<class T>() {
    winograd_unpack_of<M>(conv, sums, f, static_cast<T*>(to), begin, end);
  });
}

template <int M>
constexpr Conv2dAlgorithm kWinograd = {.supports = winograd_supports,
                                       .blocks = winograd_blocks<M>,
                                       .batch = winograd_batch<M>,
                                       .scratch = winograd_scratch<M>,
                                       .panels = winograd_panels,
                                       .panel_floats = winograd_panel_floats<M>,
                                       .sum_floats = winograd_sum_floats<M>,
                                       .pack = winograd_pack<M>,
                                       .forward = winograd<M>,
                                       .grad_weight = winograd_grad_weight<M>,
                                       .unpack = winograd_unpack<M>};

}  // namespace
}  // namespace dlkernels::cpu
