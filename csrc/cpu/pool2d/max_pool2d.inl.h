// y[n, oh, ow, c] = max over (kh, kw) of x[n, oh * stride - pad + kh * dilation, ow * .. kw .., c],
// and a byte for each output that says which (kh, kw) it was.
// Lanes are channels in channels_last, and neighbouring windows of a row in a plane.
// Memory bounds it: 73 % of the copy bandwidth in channels_last.
#pragma once
#include "cpu/simd/vec.h"

namespace dlkernels::cpu {
namespace {

// The elements [begin, end) of a window along one axis that lie inside the input, given the
// position of element 0.
struct Inside {
  int64_t begin, end;
};
static bool within(int64_t i, Inside range) { return i >= range.begin && i < range.end; }

static Inside inside(const PoolAxis& a, int64_t start) {
  const auto count_before = [&](int64_t position) {
    if (position <= start) return int64_t{0};
    return min((position - start + a.dilation - 1) / a.dilation, a.kernel);
  };
  const bool whole = start >= 0 && start + (a.kernel - 1) * a.dilation < a.in;
  return whole ? Inside{0, a.kernel} : Inside{count_before(0), count_before(a.in)};
}

// The windows that lie inside the input with all their elements.
static Inside whole_windows(const PoolAxis& a) {
  const int64_t last = a.in - 1 - (a.kernel - 1) * a.dilation + a.pad;  // start - pad of the last
  const int64_t end = last < 0 ? 0 : min(last / a.stride + 1, a.out);
  return {min((a.pad + a.stride - 1) / a.stride, end), end};
}

static bool all_whole(const PoolAxis& a) {
  const Inside whole = whole_windows(a);
  return whole.begin == 0 && whole.end == a.out;
}

// One window, or neighbours that have the same elements inside.
struct Window {
  int64_t h, w;  // of element (0, 0)
  Inside kh, kw;
};

// y and argmax of n lanes. PyTorch's rule: a later element wins if it is greater or NaN.
template <bool kArgmax, class Load>
static void pool_lanes(const float* x, const Pool& p, const Window& at, Load load, int64_t n,
                       float* y, uint8_t* argmax) {
  const bool empty = at.kh.begin >= at.kh.end || at.kw.begin >= at.kw.end;
  const int64_t first = empty ? kNoElement : at.kh.begin * p.w.kernel + at.kw.begin;
  Vec best = Vec::fill(-__builtin_inff()), arg = Vec::fill(first);
  for (int64_t kh = at.kh.begin; kh < at.kh.end; ++kh) {
    const float* row = x + (at.h + kh * p.h.dilation) * p.w.in * p.C;
    for (int64_t kw = at.kw.begin; kw < at.kw.end; ++kw) {
      const Vec v = load(row + (at.w + kw * p.w.dilation) * p.C, n);
      const Vec::Mask wins = (v > best) | is_nan(v);
      best = select(wins, v, best);
      if (kArgmax) arg = select(wins, Vec::fill(kh * p.w.kernel + kw), arg);
    }
  }
  store(best, y, n);
  if (kArgmax) arg.store_bytes(argmax, n);
}

// The elements of a whole window, from its element 0.
struct WindowOffsets {
  int64_t count = 0, at[kNoElement];
  explicit WindowOffsets(const Pool& p) {
    for (int64_t kh = 0; kh < p.h.kernel; ++kh)
      for (int64_t kw = 0; kw < p.w.kernel; ++kw)
        at[count++] = (kh * p.h.dilation * p.w.in + kw * p.w.dilation) * p.C;
  }
};

// pool_lanes for whole windows: no bounds, and unrolled where kCount says how many elements.
// `first` is element 0, unless that only stands for one that is missing.
template <int64_t kCount, bool kArgmax, class Load>
static inline void pool_whole(const float* x, const WindowOffsets& offsets, Load load, Vec first,
                              int64_t n, float* y, uint8_t* argmax) {
  const int64_t count = kCount ? kCount : offsets.count;
  Vec best = load(x, n), arg = first;
#pragma GCC unroll 9
  for (int64_t k = 1; k < count; ++k) {
    const Vec v = load(x + offsets.at[k], n);
    const Vec::Mask wins = (v > best) | is_nan(v);
    best = select(wins, v, best);
    if (kArgmax) arg = select(wins, Vec::fill(k), arg);
  }
  store(best, y, n);
  if (kArgmax) arg.store_bytes(argmax, n);
}

// Rows of windows; Load takes n lanes, which in a plane are the first elements of n windows.
template <int64_t kCount, bool kArgmax, class Load>
static void pool_rows(const float* x, float* y, uint8_t* argmax, const Pool& p, Load load,
                      int64_t begin, int64_t end) {
  const int64_t C = p.C, stride = p.w.stride, OW = p.w.out;
  const WindowOffsets offsets(p);
  const Inside whole_h = whole_windows(p.h), whole_w = whole_windows(p.w);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t oh = row % p.h.out, h = oh * p.h.stride - p.h.pad;
    const float* image = x + row / p.h.out * p.h.in * p.w.in * C;
    const bool whole_row = within(oh, whole_h);
    Window at = {h, 0, inside(p.h, h), {0, 0}};
    for (int64_t ow = 0, windows; ow < OW; ow += windows) {
      at.w = ow * stride - p.w.pad;
      float* to = y + (row * OW + ow) * C;
      uint8_t* arg = kArgmax ? argmax + (row * OW + ow) * C : nullptr;
      const bool whole = within(ow, whole_w);
      windows = C == 1 && whole ? min(whole_w.end - ow, Vec::kWidth) : 1;
      const int64_t lanes = windows * C;
      if (whole && whole_row) {
        const float* from = image + (at.h * p.w.in + at.w) * C;
        for (int64_t c = 0; c < lanes; c += Vec::kWidth)
          pool_whole<kCount, kArgmax>(from + c, offsets, load, Vec::zero(),
                                      min(lanes - c, Vec::kWidth), to + c,
                                      kArgmax ? arg + c : nullptr);
        continue;
      }
      at.kw = inside(p.w, at.w);
      for (int64_t c = 0; c < lanes; c += Vec::kWidth)
        pool_lanes<kArgmax>(image + c, p, at, load, min(lanes - c, Vec::kWidth), to + c,
                            kArgmax ? arg + c : nullptr);
    }
  }
}

// Square windows of 2 or 3 with a stride of 2, which have paths of their own.
static bool has_pairs(const Pool& p) {
  const auto fits = [&](const PoolAxis& a) {
    return a.kernel == p.w.kernel && a.stride == 2 && a.dilation == 1;
  };
  return (p.w.kernel == 2 || p.w.kernel == 3) && fits(p.h) && fits(p.w);
}

// f(at, n) for vectors of a row of `size` elements. Where there are enough, all are whole: the last
// one moves back over what is done, which is cheaper than a mask.
template <class F>
__attribute__((always_inline)) static inline void each_strip(int64_t size, const F& f) {
  const int64_t V = Vec::kWidth;
  if (size < V) return f(0, size);
  for (int64_t at = 0; at < size; at += V) f(min(at, size - V), V);
}

constexpr int64_t kStage = 4096;  // floats: half of a small L1

// How many rows of windows of a plane fit a stage, if their elements are `width` columns.
static int64_t staged_rows(const Pool& p, int64_t width) {
  return p.h.kernel * width > kStage ? 0 : (kStage / width - p.h.kernel) / p.h.stride + 1;
}

// The columns that windows of a plane look at, those that are missing too.
static int64_t seen_columns(const Pool& p) { return (p.w.out - 1) * p.w.stride + p.w.kernel; }

static bool all_whole(const Pool& p) { return all_whole(p.h) && all_whole(p.w); }

static bool pools_planes(const Pool& p) {
  const bool dense = p.h.dilation == 1 && p.w.dilation == 1;
  return p.C == 1 && (all_whole(p) || (dense && staged_rows(p, seen_columns(p)) > 0));
}

// The elements of rows of windows from h on in a plane, -inf in rows outside of it. What is outside
// beside it the stage has from the start.
static void stage_rows(const float* plane, const Pool& p, int64_t h, int64_t rows, int64_t width,
                       float* to) {
  const int64_t inside = min(p.w.in, width - p.w.pad);
  const Vec none = Vec::fill(-__builtin_inff());
  to += p.w.pad;
  for (int64_t end = h + rows; h < end; ++h, to += width) {
    const float* row = plane + h * p.w.in;
    if (within(h, {0, p.h.in}))
      each_strip(inside, [&](int64_t w, int64_t n) { store(load(row + w, n), to + w, n); });
    else
      each_strip(inside, [&](int64_t w, int64_t n) { store(none, to + w, n); });
  }
}

// Rows of n neighbouring windows, whole ones from x on. Staged ones may lack elements: `first` is
// the first one of a row that is there, missing_h rows of the first windows are not.
template <int64_t kCount, bool kArgmax, class Load>
static inline void pool_strip(Load load, const float* x, const Pool& p,
                              const WindowOffsets& offsets, Vec first, int64_t missing_h,
                              int64_t rows, int64_t n, float* y, uint8_t* argmax) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t k = max(missing_h - i * p.h.stride, 0) * p.w.kernel;
    pool_whole<kCount, kArgmax>(x, offsets, load, first + Vec::fill(k), n, y, argmax);
    x += p.h.stride * p.w.in, y += p.w.out;
    if (kArgmax) argmax += p.w.out;
  }
}

// The same for planes with pairs. The best of each row comes first, in PyTorch's order too, because
// the last row of a window of 3 is the first row of the next.
template <int64_t K, bool kArgmax>
static inline void pool_pairs(const float* x, const Pool& p, const WindowOffsets&, Vec first,
                              int64_t missing_h, int64_t rows, int64_t n, float* y,
                              uint8_t* argmax) {
  struct Best {
    Vec v, arg;
    void meet(Vec other, Vec other_arg) {
      const Vec::Mask wins = (other > v) | is_nan(other);
      v = select(wins, other, v);
      if (kArgmax) arg = select(wins, other_arg, arg);
    }
  };
  first = in_order(first);
  const auto best_of_row = [&](const float* row) __attribute__((always_inline)) {
    Best best = {load_even(row, n), first};
    for (int64_t kw = 1; kw < K; ++kw) best.meet(load_even(row + kw, n), Vec::fill(kw));
    return best;
  };
  Best last = best_of_row(x);
  for (int64_t i = 0; i < rows; ++i) {
    Best best = K == 3 || i == 0 ? last : best_of_row(x);
    if (i == 0) best.arg = best.arg + Vec::fill(missing_h * K);
#pragma GCC unroll 2
    for (int64_t kh = 1; kh < K; ++kh) {
      last = best_of_row(x + kh * p.w.in);
      best.meet(last.v, last.arg + Vec::fill(kh * K));
    }
    store(in_order(best.v), y, n);
    if (kArgmax) in_order(best.arg).store_bytes(argmax, n), argmax += p.w.out;
    x += 2 * p.w.in, y += p.w.out;
  }
}

// Rows of windows in planes, down strips of neighbours, so that a row costs no more than its
// vectors. Where windows are not all whole, they are made so in a stage.
template <bool kArgmax, class Strip>
static void pool_planes(const float* x, float* y, uint8_t* argmax, const Pool& p,
                        const Strip& strip, int64_t begin, int64_t end) {
  const int64_t OH = p.h.out, OW = p.w.out, V = Vec::kWidth;
  const bool whole = all_whole(p);
  Pool staged = p;
  if (!whole) staged.w.in = seen_columns(p);
  const int64_t width = staged.w.in;
  const WindowOffsets offsets(staged);
  float stage[kStage];
  if (!whole)
    for (float& v : stage) v = -__builtin_inff();
  for (int64_t row = begin, rows; row < end; row += rows) {
    const int64_t oh = row % OH, h = oh * p.h.stride - p.h.pad;
    rows = min(min(OH - oh, end - row), max(staged_rows(p, width), 1));
    const float* plane = x + row / OH * p.h.in * p.w.in;
    if (!whole) stage_rows(plane, p, h, (rows - 1) * p.h.stride + p.h.kernel, width, stage);
    const float* const top = whole ? plane + h * width : stage;
    each_strip(OW, [&](int64_t ow, int64_t n) __attribute__((always_inline)) {
      float missing[Vec::kWidth];  // elements of a row before the first that is there
      for (int64_t i = 0; i < V; ++i) missing[i] = max(p.w.pad - (ow + i) * p.w.stride, 0);
      const int64_t o = row * OW + ow;
      strip(top + ow * p.w.stride, staged, offsets, Vec::load(missing), max(-h, 0), rows, n, y + o,
            kArgmax ? argmax + o : nullptr);
    });
  }
}

template <int64_t kCount, bool kArgmax>
static void pool_rows(const float* x, float* y, uint8_t* argmax, const Pool& p, int64_t begin,
                      int64_t end) {
  const int64_t stride = p.w.stride;
  const auto load_lanes = [](const float* from, int64_t n) { return load(from, n); };
  const auto load_every = [=](const float* from, int64_t n) {
    float lanes[Vec::kWidth];
    for (int64_t i = 0; i < n; ++i) lanes[i] = from[i * stride];
    return Vec::load(lanes, n);
  };
  const auto load_second = [](const float* from, int64_t n) {
    return in_order(load_even(from, n));
  };
  const bool planes = pools_planes(p);
  if (!planes && (p.C > 1 || stride == 1))
    return pool_rows<kCount, kArgmax>(x, y, argmax, p, load_lanes, begin, end);
  if (!planes) return pool_rows<0, kArgmax>(x, y, argmax, p, load_every, begin, end);
  const auto pool = [&](const auto& strip) {
    pool_planes<kArgmax>(x, y, argmax, p, strip, begin, end);
  };
  if (kCount && has_pairs(p))
    pool([](auto... a)
             __attribute__((always_inline)) { pool_pairs<kCount == 4 ? 2 : 3, kArgmax>(a...); });
  else if (stride == 1)
    pool([&](auto... a)
             __attribute__((always_inline)) { pool_strip<kCount, kArgmax>(load_lanes, a...); });
  else if (stride == 2)
    pool([&](auto... a)
             __attribute__((always_inline)) { pool_strip<0, kArgmax>(load_second, a...); });
  else
    pool([&](auto... a)
             __attribute__((always_inline)) { pool_strip<0, kArgmax>(load_every, a...); });
}

template <bool kArgmax>
static void pool_rows(const float* x, float* y, uint8_t* argmax, const Pool& p, int64_t begin,
                      int64_t end) {
  const int64_t count = p.h.kernel * p.w.kernel;
  const auto f = count == 4   ? pool_rows<4, kArgmax>
                 : count == 9 ? pool_rows<9, kArgmax>
                              : pool_rows<0, kArgmax>;
  f(x, y, argmax, p, begin, end);
}

static void max_pool2d(const float* x, float* y, uint8_t* argmax, const Pool& p, int64_t begin,
                       int64_t end) {
  (argmax ? pool_rows<true> : pool_rows<false>)(x, y, argmax, p, begin, end);
}

}  // namespace
}  // namespace dlkernels::cpu
