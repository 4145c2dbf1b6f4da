// grad_x[n, h, w, c] = sum of grad_y[n, oh, ow, c] over the windows whose argmax is (h, w).
// Windows that do not overlap write every element once. Windows of 2 or 3 with stride 2 gather from
// the windows that hold an element. All others scatter.
// A byte that names no element of its window counts for nothing.
#pragma once
#include "cpu/simd/vec.h"
#include "cpu/pool2d/max_pool2d.inl.h"

namespace dlkernels::cpu {
namespace {

// The offset of element k of a window from its element 0. Bytes that are no element get one that no
// bound holds them.
struct Places {
  int64_t h[kNoElement + 1], w[kNoElement + 1], count;
  explicit Places(const Pool& p) : count(p.h.kernel * p.w.kernel) {
    for (int64_t k = 0; k <= kNoElement; ++k) {
      h[k] = k < count ? k / p.w.kernel * p.h.dilation : INT64_MIN / 2;
      w[k] = k < count ? k % p.w.kernel * p.w.dilation : INT64_MIN / 2;
    }
  }
};

// Rows [h0, h1) of an image where windows overlap or have holes: zeros, then windows add up in
// PyTorch's order. An address comes from a byte only after it is checked.
static void scatter_rows(const float* grad_y, const uint8_t* argmax, float* grad_x, const Pool& p,
                         const Places& places, int64_t h0, int64_t h1) {
  const int64_t W = p.w.in, C = p.C, span = (p.h.kernel - 1) * p.h.dilation;
  const Inside whole = whole_windows(p.w);
  int64_t offset[kNoElement + 1];  // of an element, where the whole window is inside
  const int64_t count = places.count;
  for (int64_t k = 0; k < count; ++k)
    offset[k] = span < h1 - h0 && whole.begin < whole.end ? (places.h[k] * W + places.w[k]) * C : 0;
  store_zeros(grad_x + h0 * W * C, (h1 - h0) * W * C);
  const int64_t first = h0 + p.h.pad - span;  // a window that starts before ends before h0
  int64_t oh = first <= 0 ? 0 : (first + p.h.stride - 1) / p.h.stride;
  for (; oh < p.h.out && oh * p.h.stride - p.h.pad < h1; ++oh) {
    const int64_t h_start = oh * p.h.stride - p.h.pad;
    const bool whole_h = h_start >= h0 && h_start + span < h1;
    for (int64_t ow = 0, windows; ow < p.w.out; ow += windows) {
      const int64_t w_start = ow * p.w.stride - p.w.pad;
      const float* grad = grad_y + (oh * p.w.out + ow) * C;
      const uint8_t* arg = argmax + (oh * p.w.out + ow) * C;
      windows = 1;
      if (whole_h && within(ow, whole)) {
        if (C == 1) windows = whole.end - ow;
        const int64_t step = C == 1 ? p.w.stride : 1;
        float* const to = grad_x + (h_start * W + w_start) * C;
        for (int64_t i = 0, n = windows * C; i < n; ++i)
          if (const uint8_t k = arg[i]; k < count) to[offset[k] + i * step] += grad[i];
        continue;
      }
      for (int64_t c = 0; c < C; ++c) {
        const int64_t h = h_start + places.h[arg[c]], w = w_start + places.w[arg[c]];
        if (within(h, {h0, h1}) && within(w, {0, W})) grad_x[(h * W + w) * C + c] += grad[c];
      }
    }
  }
}

// Lanes of grad_y whose argmax is k, others 0.
static inline Vec chosen(const float* grad_y, const uint8_t* argmax, int64_t k, int64_t n) {
  return select(Vec::load_bytes(argmax, n) == Vec::fill(k), load(grad_y, n), Vec::zero());
}

// Rows of windows from oh on, bytes as floats, with zeros for windows that are missing: one on the
// left, and a vector of them or more on the right.
static void stage_windows(const float* grad_y, const uint8_t* argmax, const Pool& p, int64_t oh,
                          int64_t rows, int64_t width, float* g, float* arg) {
  const int64_t V = Vec::kWidth;
  for (int64_t end = oh + rows; oh < end; ++oh, g += width, arg += width) {
    const int64_t o = oh * p.w.out, OW = within(oh, {0, p.h.out}) ? p.w.out : 0;
    g[0] = arg[0] = 0;
    for (int64_t ow = 0; ow < width - V; ow += V) {
      const int64_t n = min(max(OW - ow, 0), V);
      load(grad_y + o + ow, n).store(g + 1 + ow);
      Vec::load_bytes(argmax + o + ow, n).store(arg + 1 + ow);
    }
  }
}

// Rows [begin, end) of grad_x in planes with pairs: every position gathers from the windows that
// hold it, in PyTorch's order. Of two columns one is only element 1 of a window, its own; the other
// lies between two, as element 2 of one and 0 of the next. The same holds for rows. Not staged: for
// windows of 2 that cover the plane.
template <int64_t K, bool kStaged>
static void gather_planes(const float* grad_y, const uint8_t* argmax, float* grad_x, const Pool& p,
                          int64_t begin, int64_t end) {
  const int64_t V = Vec::kWidth, H = p.h.in, W = p.w.in, pairs = (W + 1) / 2, pad = p.w.pad;
  const int64_t width = round_up(pairs + 2) + V;
  float g[kStage], arg[kStage];
  for (int64_t row = begin, rows; row < end; row += rows) {
    const int64_t h0 = row % H, o = row / H * p.h.out * p.w.out;
    rows = min(min(H - h0, end - row), 2 * (kStage / width) - 3);
    const int64_t oh = (h0 + p.h.pad) / 2 - kStaged, last = (h0 + rows - 1 + p.h.pad) / 2;
    if (kStaged) stage_windows(grad_y + o, argmax + o, p, oh, last - oh + 1, width, g, arg);
    each_strip(pairs, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
      const int64_t m = min(2 * n, W - 2 * j);
      const auto put = [&](int64_t h, Vec between, Vec own) __attribute__((always_inline)) {
        if (!within(h, {h0, h0 + rows})) return;
        float* to = grad_x + (row - h0 + h) * W + 2 * j;
        const auto put_pair = [&](Vec a, Vec b) __attribute__((always_inline)) {
          interleave(a, b);
          store(a, to, min(m, V));
          if (m > V) store(b, to + V, m - V);
        };
        pad ? put_pair(own, between) : put_pair(between, own);
      };
      Vec between = Vec::zero(), own = Vec::zero();  // from the windows of the row before
      int64_t at = 1 + j, h = 2 * oh - p.h.pad;
      for (int64_t i = oh; i <= last; ++i, at += width, h += 2) {
        const auto from = [&](int64_t ow, int64_t k) __attribute__((always_inline)) {
          const int64_t here = o + i * p.w.out + j;
          if (!kStaged) return chosen(grad_y + here, argmax + here, k, n);
          return select(Vec::load(arg + at + ow) == Vec::fill(k), Vec::load(g + at + ow),
                        Vec::zero());
        };
        const auto add = [](Vec sum, Vec v) { return K == 3 ? sum + v : v; };
        put(h, add(add(between, from(pad - 1, 2)), from(pad, 0)), add(own, from(0, 1)));
        put(h + 1, add(from(pad - 1, K + 2), from(pad, K)), from(0, K + 1));
        between = add(from(pad - 1, 8), from(pad, 6)), own = from(0, 7);
      }
    });
  }
}

// The same for windows of 3 and lanes that are channels.
template <int64_t kPad>
static void gather_channels(const float* grad_y, const uint8_t* argmax, float* grad_x,
                            const Pool& p, int64_t begin, int64_t end) {
  const int64_t H = p.h.in, W = p.w.in, C = p.C, OH = p.h.out, OW = p.w.out;
  for (int64_t row = begin, rows; row < end; row += rows) {
    const int64_t h0 = row % H, o = row / H * OH * OW;
    rows = min(H - h0, end - row);
    for (int64_t oh = (h0 + p.h.pad) / 2, h; h = 2 * oh - p.h.pad, h < h0 + rows; ++oh)
      for (int64_t w = 0; w < W; w += 2) {
        const int64_t left = w / 2 + kPad - 1, first = o + (oh - 1) * OW + left;
        each_strip(C, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
          Vec g[2][2], arg[2][2];
#pragma GCC unroll 2
          for (int64_t i = 0; i < 2; ++i)
#pragma GCC unroll 2
            for (int64_t j = 0; j < 2; ++j) {
              const bool exists = within(oh - 1 + i, {0, OH}) && within(left + j, {0, OW});
              const int64_t at = (first + i * OW + j) * C + c, lanes = exists ? n : 0;
              g[i][j] = load(grad_y + at, lanes), arg[i][j] = Vec::load_bytes(argmax + at, lanes);
            }
          const auto from = [&](int64_t i, int64_t j, int64_t k) __attribute__((always_inline)) {
            return select(arg[i][j] == Vec::fill(k), g[i][j], Vec::zero());
          };
          constexpr int64_t kOwn = 1 - kPad;
          const Vec between = from(0, 0, 8) + from(0, 1, 6) + from(1, 0, 2) + from(1, 1, 0);
          const Vec own = from(0, kOwn, 7) + from(1, kOwn, 1);
          const Vec below = from(1, 0, 5) + from(1, 1, 3), own_below = from(1, kOwn, 4);
          const auto put = [&](int64_t h, Vec between, Vec own) __attribute__((always_inline)) {
            if (!within(h, {h0, h0 + rows})) return;
            float* to = grad_x + ((row - h0 + h) * W + w) * C + c;
            if (!kPad || w + 1 < W) store(between, to + kPad * C, n);
            if (kPad || w + 1 < W) store(own, to + kOwn * C, n);
          };
          put(h, between, own), put(h + 1, below, own_below);
        });
      }
  }
}

// A row of grad_x where windows do not overlap, from the one row of windows that covers it, of
// which it is the row of elements k = kh * KW: every position is written once.
static void expand_row(const float* grad_y, const uint8_t* argmax, float* grad_x, const Pool& p,
                       int64_t k) {
  const int64_t C = p.C;
  for (int64_t w = 0, ow = p.w.pad / p.w.stride, kw = p.w.pad % p.w.stride; w < p.w.in; ++w) {
    if (kw < p.w.kernel && ow < p.w.out)
      for (int64_t c = 0; c < C; c += Vec::kWidth) {
        const int64_t o = ow * C + c, n = min(C - c, Vec::kWidth);
        store(chosen(grad_y + o, argmax + o, k + kw, n), grad_x + w * C + c, n);
      }
    else
      store_zeros(grad_x + w * C, C);
    if (++kw == p.w.stride) kw = 0, ++ow;
  }
}

static bool are_disjoint(const PoolAxis& a) { return a.dilation == 1 && a.kernel <= a.stride; }

static void max_pool2d_backward(const float* grad_y, const uint8_t* argmax, float* grad_x,
                                const Pool& p, int64_t begin, int64_t end) {
  if (has_pairs(p) && (p.C == 1 ? p.w.in <= kStage / 4 : p.w.kernel == 3 && p.C >= Vec::kWidth)) {
    const bool covered =
        p.w.kernel == 2 && all_whole(p) && p.h.in == 2 * p.h.out && p.w.in == 2 * p.w.out;
    const auto gather = p.C > 1           ? p.w.pad ? gather_channels<1> : gather_channels<0>
                        : covered         ? gather_planes<2, false>
                        : p.w.kernel == 2 ? gather_planes<2, true>
                                          : gather_planes<3, true>;
    return gather(grad_y, argmax, grad_x, p, begin, end);
  }
  const int64_t x_row = p.w.in * p.C, y_row = p.w.out * p.C, H = p.h.in;
  if (!are_disjoint(p.h) || !are_disjoint(p.w) || p.C == 1) {
    const Places places(p);
    for (int64_t row = begin, rows; row < end; row += rows) {
      const int64_t image = row / H, h = row % H, o = image * p.h.out * y_row;
      rows = min(H - h, end - row);
      scatter_rows(grad_y + o, argmax + o, grad_x + image * H * x_row, p, places, h, h + rows);
    }
    return;
  }
  for (int64_t row = begin; row < end; ++row) {
    const int64_t h = row % H + p.h.pad, oh = h / p.h.stride, kh = h % p.h.stride;
    const int64_t o = (row / H * p.h.out + oh) * y_row;
    if (oh < p.h.out && kh < p.h.kernel)
      expand_row(grad_y + o, argmax + o, grad_x + row * x_row, p, kh * p.w.kernel);
    else
      store_zeros(grad_x + row * x_row, x_row);
  }
}

static void max_pool2d_indices(const uint8_t* argmax, int64_t* indices, const Pool& p,
                               int64_t begin, int64_t end) {
  const Places places(p);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t h_start = row % p.h.out * p.h.stride - p.h.pad;
    for (int64_t ow = 0, o = row * p.w.out * p.C; ow < p.w.out; ++ow)
      for (int64_t c = 0; c < p.C; ++c, ++o) {
        const int64_t h = h_start + places.h[argmax[o]];
        const int64_t w = ow * p.w.stride - p.w.pad + places.w[argmax[o]];
        indices[o] = within(h, {0, p.h.in}) && within(w, {0, p.w.in}) ? h * p.w.in + w : -1;
      }
  }
}

}  // namespace
}  // namespace dlkernels::cpu
