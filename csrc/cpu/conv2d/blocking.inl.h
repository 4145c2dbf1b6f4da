// How an image is divided into blocks (block.inl.h) that fit into L2, and which inputs the outputs
// of a block read.
#pragma once
#include "cpu/simd/vec.h"
#include "cpu/conv2d/block.inl.h"
#include "cpu/gemm/gemm.inl.h"
#include "cpu/gemm/tile.inl.h"

namespace dlkernels::cpu {
namespace {

// ---- one axis of a block -------------------------------------------------------------------

static int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// The taps that output o has: tap first + i * step is at index at + i * at_step, i < count, and
// is input + i * input_step.
struct Taps {
  int64_t first, step, count, at, at_step, input, input_step;

  // Without those that lie outside of an axis of `size` inputs.
  Taps inside(int64_t size) const {
    Taps t = *this;
    for (; t.count > 0 && t.input < 0; --t.count)
      t.first += t.step, t.at += t.at_step, t.input += t.input_step;
    while (t.count > 0 && t.input + (t.count - 1) * t.input_step >= size) --t.count;
    return t;
  }
};

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// The inputs of outputs [o, o + size) in scratch: all from the first to the last of them, or, where
// fewer, those of each tap as a run of their own (a wide stride or dilation).
struct Span {
  const ConvAxis& axis;
  int64_t o, outputs, runs, run, step;  // `runs` runs of `run` inputs, `step` apart
  bool disjoint;

  Span(const ConvAxis& a, int64_t o, int64_t size) : axis(a), o(o), outputs(size) {
    const int64_t all = ((size - 1) * a.stride + (a.taps - 1) * a.dilation) / a.input_dilation + 1 +
                        (a.input_dilation > 1);
    const int64_t each = a.input_dilation > 1 ? (size - 1) / a.input_dilation + 2 : size;
    disjoint = each * a.taps < all;
    runs = disjoint ? a.taps : 1, run = disjoint ? each : all, step = disjoint ? a.stride : 1;
  }
  int64_t size() const { return runs * run; }
  int64_t begin(int64_t i) const {  // the first input of run i
    return floor_div(o * axis.stride - axis.pad + i * axis.dilation, axis.input_dilation);
  }
  // From an output to the next that has the same taps.
  int64_t output_step() const { return disjoint ? 1 : axis.stride; }

  // Those of the outputs of which neither tap `first` nor `last` lies outside of an axis of `size`
  // inputs. No division: it is asked for every tap.
  Range inside(int64_t size, int64_t first, int64_t last) const {
    const int64_t left = axis.pad - first * axis.dilation;
    const int64_t right = (size - 1) * axis.input_dilation + axis.pad - last * axis.dilation;
    Range r = {o, o + outputs};
    while (r.begin < r.end && r.begin * axis.stride < left) ++r.begin;
    while (r.begin < r.end && (r.end - 1) * axis.stride > right) --r.end;
    return r;
  }
  Range inside(int64_t size) const { return inside(size, 0, axis.taps - 1); }

  Taps taps(int64_t output) const {
    const int64_t start = output * axis.stride - axis.pad;
    if (axis.input_dilation == 1) {  // all of them, and no division: it is asked for every row
      const int64_t d = axis.dilation;
      if (disjoint) return {0, 1, axis.taps, output - o, run, start, d};
      return {0, 1, axis.taps, (output - o) * axis.stride, d, start, d};
    }
    int64_t gcd = axis.input_dilation;
    for (int64_t rest = axis.dilation; rest;) {
      const int64_t next = gcd % rest;
      gcd = rest, rest = next;
    }
    Taps t = {0, axis.input_dilation / gcd, 0, 0, axis.dilation / gcd, 0, axis.dilation / gcd};
    const int64_t phases = min(t.step, axis.taps);
    while (t.first < phases && (start + t.first * axis.dilation) % axis.input_dilation != 0)
      ++t.first;
    if (t.first == phases) return t;
    t.count = ceil_div(axis.taps - t.first, t.step);
    t.input = (start + t.first * axis.dilation) / axis.input_dilation;
    if (disjoint) {
      t.at = t.first * run + ceil_div(output - o, axis.input_dilation);
      t.at_step = t.step * run;
    } else {
      t.at = t.input - begin(0);
    }
    return t;
  }
};

// ---- blocks --------------------------------------------------------------------------------

// How an image's outputs are cut into blocks, from the sizes alone.
struct Blocking {
  int64_t rows, cols;      // outputs of a block
  int64_t count_w, count;  // blocks an image
  int64_t x_floats;
  int64_t g_pitch, g_floats;  // of the gradient's block

  explicit Blocking(const Conv2d& conv) {
    constexpr int64_t kWide = 1 << 16, kBlock = 1 << 15;  // floats: in L2, and a fraction of it
    const auto floats = [&](int64_t r, int64_t c) {
      return Span(conv.h, 0, r).size() * Span(conv.w, 0, c).size() * conv.x.C + r * c * conv.K;
    };
    const int64_t multiple = conv.on_store.argmax ? 2 : 1;  // whole windows of the pool
    cols = conv.w.out;
    while (cols > kDepth ||
           (cols > 2 * kTileRows * conv.w.input_dilation && floats(1, cols) > kWide))
      cols = round_up((cols + 1) / 2, multiple);
    rows = multiple;
    while (rows < conv.h.out && floats(rows + multiple, cols) <= kBlock) rows += multiple;
    const int64_t count_h = ceil_div(conv.h.out, rows);
    rows = round_up(ceil_div(conv.h.out, count_h), multiple);
    count_w = ceil_div(conv.w.out, cols);
    count = count_h * count_w;
    x_floats = round_up(Span(conv.h, 0, rows).size() * Span(conv.w, 0, cols).size() * conv.x.C);
    g_pitch = round_up(conv.K);
    g_floats = rows * cols * g_pitch + kTileCols;
  }
};

// One of them: outputs [h, h_end) x [w, w_end) of image n, and the inputs that they see; those of
// the columns `inside` see none beside the image.
struct Block {
  int64_t n, h, h_end, w, w_end;
  Span rows, cols;
  Range inside;

  Block(const Conv2d& conv, const Blocking& blocking, int64_t index)
      : n(index / blocking.count),
        h(index % blocking.count / blocking.count_w * blocking.rows),
        h_end(min(h + blocking.rows, conv.h.out)),
        w(index % blocking.count % blocking.count_w * blocking.cols),
        w_end(min(w + blocking.cols, conv.w.out)),
        rows(conv.h, h, h_end - h),
        cols(conv.w, w, w_end - w),
        inside(cols.inside(conv.x.W)) {}

  bool has_edges() const { return inside.size() < w_end - w; }

  // f(h, w) for the runs of inputs that begin at row h, column w, as they follow in scratch.
  template <class F>
  void each_run(const F& f) const {
    for (int64_t i = 0; i < rows.runs; ++i)
      for (int64_t r = 0; r < rows.run; ++r)
        for (int64_t j = 0; j < cols.runs; ++j) f(rows.begin(i) + r * rows.step, cols.begin(j));
  }

  // Their inputs, to x[(row * cols.size() + column) * pitch + ...]: channels [c, c + channels).
  void load(const ImageView& images, int64_t c, int64_t channels, float* x) const {
    each_run([&](int64_t h, int64_t w) {
      load_row(images, {n, h, 1, w, cols.run, c, channels}, cols.step, channels, x);
      x += cols.run * channels;
    });
  }
};

// Conv2dAlgorithm::batch of an algorithm that gains nothing from several blocks at once.
static int64_t one_block(const Conv2d&) { return 1; }

// ---- taps outside of the image -----------------------------------------------------------

// Inputs outside of the image are zeros in a block, but must not be multiplied by a weight: 0 times
// NaN or infinity is NaN. Rows of taps outside are always skipped. Columns are not, since the
// pixels of a tile differ in them. Where a weight is not finite, the pixels at the edges are
// therefore computed again, each in a tile of its own without the columns outside: the same numbers
// are added in the same order.

// A panel of packed weights is followed by a word that is 0 if all of them are finite.
constexpr int64_t kWord = Vec::kWidth;  // floats
static void write_word(float* panel, int64_t floats) {
  Vec zeros[kTileVecs] = {};
  for (int64_t i = 0; i < floats; i += kTileCols)
#pragma GCC unroll 2
    for (int64_t v = 0; v < kTileVecs; ++v)
      zeros[v] = fma(Vec::load(panel + i + v * Vec::kWidth), Vec::zero(), zeros[v]);
  panel[floats] = reduce_sum(zeros[0] + zeros[1]);
}
static bool is_finite(const float* panel, int64_t floats) { return panel[floats] == 0; }

// row(pixels) for a row of b and then for its edges, which is exact for one pixel alone.
template <class Row>
static void row_with_edges(const Block& b, bool is_finite, const Row& row) {
  row(Range{b.w, b.w_end});
  for (int64_t w = b.w; w < b.w_end && !is_finite; ++w)
    if (w < b.inside.begin || w >= b.inside.end) row(Range{w, w + 1});
}

// The columns of an output's taps, in a row of its own or of many.
static Taps columns(const Conv2d& conv, const Block& b, int64_t w, bool is_single) {
  return is_single ? b.cols.taps(w).inside(conv.x.W) : b.cols.taps(w);
}

}  // namespace
}  // namespace dlkernels::cpu
