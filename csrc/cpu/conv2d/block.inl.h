// A block is a part of an image in scratch memory: channels last, its padding stored as zeros.
// load_block fills one from a tensor of either layout; store_row writes a row of outputs back.
// So only this file knows layouts, and blocking.inl.h knows borders.
#pragma once
#include "cpu/simd/vec.h"
#include "cpu/gemm/pack.inl.h"

namespace dlkernels::cpu {
namespace {

// Channels [c, c + channels) of the pixels in rows [h, h + rows), columns [w, w + cols) of image n.
struct Region {
  int64_t n, h, rows, w, cols, c, channels;
};

// The gradient g of a pooled pixel as the pixels of one row of its window get it; either may be
// null.
template <class T>
static void unpool_pixel(const T* g, const uint8_t* argmax, int64_t row, int64_t C, int64_t pitch,
                         float* left, float* right) {
  const Vec first = Vec::fill(static_cast<float>(2 * row)), second = first + Vec::fill(1);
  for (int64_t c = 0; c < pitch; c += Vec::kWidth) {
    const int64_t n = c < C ? min(C - c, Vec::kWidth) : 0, lanes = min(pitch - c, Vec::kWidth);
    const Vec v = load(g + c, n), element = Vec::load_bytes(argmax + c, n);
    if (left) store(select(element == first, v, Vec::zero()), left + c, lanes);
    if (right) store(select(element == second, v, Vec::zero()), right + c, lanes);
  }
}

// A region of one row, all inside the image, of a gradient that comes through a max-pool.
template <class T>
static void unpool_row(const ImageView& x, const Region& region, int64_t pitch, float* to) {
  const auto [n, h, rows, w, cols, c, channels] = region;
  const T* row = static_cast<const T*>(x.data) + n * x.sn + h / 2 * x.sh + c * x.sc;
  const uint8_t* argmax = x.on_load.argmax + (n * (x.H / 2) + h / 2) * (x.W / 2) * x.C + c;
  // Planes: gradients first as they are, each where the left pixel of its window goes, if both go.
  const int64_t whole = w + w % 2, windows = (w + cols - whole) / 2;
  if (x.sc != 1)
    transpose_copy(MaskedInput<T>(row), whole / 2, x.sc, channels, windows,
                   to + (whole - w) * pitch, 2 * pitch);
  for (int64_t i = (w - w % 2) / 2; 2 * i < w + cols; ++i) {
    float* const left = 2 * i >= w ? to + (2 * i - w) * pitch : nullptr;
    float* const right = 2 * i + 1 < w + cols ? to + (2 * i + 1 - w) * pitch : nullptr;
    const T* g = row + i * x.sw;
    const uint8_t* const elements = argmax + i * x.C;
    if (x.sc == 1) {
      unpool_pixel(g, elements, h % 2, channels, pitch, left, right);
    } else {
      float* const here = left ? left : right;
      if (!left || !right)
        for (int64_t k = 0; k < channels; ++k) here[k] = static_cast<float>(g[k * x.sc]);
      unpool_pixel(here, elements, h % 2, channels, pitch, left, right);
    }
  }
}

constexpr int64_t kAhead = 64;  // elements

// A region of one row whose columns are `step` apart, as to[j * pitch + i]: channel c + i of column
// j for i < channels, zeros for i from there to pitch.
template <class T>
static void load_row_of(const ImageView& x, const Region& region, int64_t step, int64_t pitch,
                        float* to) {
  const auto [n, h, rows, w, cols, c, channels] = region;
  // Columns [begin, end) of these lie inside the image.
  const int64_t before = w < 0 ? (step - 1 - w) / step : 0;
  const int64_t W = x.on_load.argmax ? x.W / 2 * 2 : x.W, H = x.on_load.argmax ? x.H / 2 * 2 : x.H;
  const int64_t inside = w < W ? (W - 1 - w) / step + 1 : 0;
  const int64_t begin = h < 0 || h >= H ? cols : min(cols, before);
  const int64_t end = max(begin, min(cols, inside));
  store_zeros(to, begin * pitch);
  store_zeros(to + end * pitch, (cols - end) * pitch);
  if (begin == end) return;
  const MaskedInput<T> s(x.data, x.on_load.relu_y);
  const int64_t sw = step * x.sw, size = end - begin;
  const int64_t from = n * x.sn + h * x.sh + w * x.sw + begin * sw + c * x.sc;
  to += begin * pitch;
  if (x.on_load.argmax)
    return unpool_row<T>(x, {n, h, 1, w + begin, size, c, channels}, pitch, to);  // step is 1
  if ((x.sc == 1 || channels == 1) && sw == pitch && channels == pitch) {         // one run
    pack_run(s, from, size * pitch, size * pitch, to);
  } else if (x.sc == 1) {
    for (int64_t j = 0; j < size; ++j) pack_run(s, from + j * sw, channels, pitch, to + j * pitch);
  } else if (step == 1 && pitch >= Vec::kWidth / 2) {
    // The hardware does not follow so many planes at once: ask for the next rows of each.
    for (int64_t i = 0; i < channels; ++i) {
      const int64_t ahead = from + i * x.sc + kAhead;
      __builtin_prefetch(s.x + ahead);
      if (s.relu_y) __builtin_prefetch(s.relu_y + ahead);
    }
    transpose_copy(s, from, x.sc, channels, size, to, pitch);
    for (int64_t j = 0; j < size; ++j) store_zeros(to + j * pitch + channels, pitch - channels);
  } else {
    for (int64_t i = 0; i < pitch; ++i)
      for (int64_t j = 0; j < size; ++j)
        to[j * pitch + i] = i < channels ? s.at(from + i * x.sc + j * sw) : 0.0f;
  }
}
static void load_row(const ImageView& x, const Region& region, int64_t step, int64_t pitch,
                     float* to) {
  with_type(x.dtype, [&]<class T>() { load_row_of<T>(x, region, step, pitch, to); });
}

// A region as to[(i * cols + j) * pitch + ...].
static void load_block(const ImageView& x, const Region& region, int64_t pitch, float* to) {
  Region row = region;
  for (int64_t i = 0; i < region.rows; ++i, ++row.h, to += region.cols * pitch)
    load_row(x, row, 1, pitch, to);
}

// Pools two rows of `windows` windows, a pixel every `pitch` floats: the values to y, a pixel every
// y_step, and to argmax, one every K. As max_pool2d after ReLU: the first maximum, NaN above all,
// and no gradient where ReLU lets none pass. Sums are compared before they are rounded, so that
// what rounding would make a tie is none.
template <class To>
static void pool_rows(const float* row, const float* next, int64_t pitch, int64_t windows,
                      int64_t lanes, To* y, int64_t y_step, uint8_t* argmax, int64_t K) {
  for (int64_t i = 0; i < windows; ++i)
    for (int64_t c = 0; c < lanes; c += Vec::kWidth) {
      const int64_t n = min(lanes - c, Vec::kWidth), at = 2 * i * pitch + c;
      const float* const window[] = {row + at, row + at + pitch, next + at, next + at + pitch};
      Vec best = Vec::load(window[0]), element = Vec::zero();
#pragma GCC unroll 3
      for (int e = 1; e < 4; ++e) {
        const Vec z = Vec::load(window[e]);
        const auto better = (z > best) | is_nan(z);
        best = select(better, z, best);
        element = select(better, Vec::fill(static_cast<float>(e)), element);
      }
      element = select(best <= Vec::zero(), Vec::fill(kNoElement), element);
      store(best, y + i * y_step + c, n);
      element.store_bytes(argmax + i * K + c, n);
    }
}

// Prefetches the cache lines of y that store_row writes for a region. Inline, because GCC removes
// calls of a function that only prefetches.
__attribute__((always_inline)) static inline void prefetch_rows(const Conv2d& conv,
                                                                const Region& region) {
  const auto [n, h, rows, w, cols, k, channels] = region;
  const int64_t pool = conv.on_store.argmax ? 2 : 1;
  with_type(conv.x.dtype, [&]<class T>() __attribute__((always_inline)) {
    const T* const y = static_cast<const T*>(conv.y) + n * conv.yn + h / pool * conv.yh +
                       w / pool * conv.yw + k * conv.yc;
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < rows / pool; ++i)
        for (int64_t j = 0; j < cols / pool; j += 64 / sizeof(T))
          __builtin_prefetch(y + c * conv.yc + i * conv.yh + j, 1);
  });
}

// A row of a region of y, from a row that is channels last, a pixel every `pitch` floats. With
// argmax the region has two rows, the other at `next`, and they are pooled.
template <class T>
static void store_row_of(const Conv2d& conv, const Region& region, const float* row,
                         const float* next, int64_t pitch, float* scratch) {
  const bool last = conv.yc == 1;
  auto [n, h, rows, w, cols, k, lanes] = region;
  if (conv.on_store.argmax) {
    h /= 2, w /= 2, cols /= 2;
  }
  T* const y = static_cast<T*>(conv.y) + n * conv.yn + h * conv.yh + w * conv.yw + k * conv.yc;
  if (conv.on_store.argmax) {
    uint8_t* const argmax =
        conv.on_store.argmax + ((n * (conv.h.out / 2) + h) * (conv.w.out / 2) + w) * conv.K + k;
    if (last) return pool_rows(row, next, pitch, cols, lanes, y, conv.yw, argmax, conv.K);
    pool_rows(row, next, pitch, cols, lanes, scratch, pitch, argmax, conv.K);
    row = scratch;
  } else if (last) {
    for (int64_t j = 0; j < cols; ++j)
      each_vector(0, lanes, [&](int64_t c, int64_t count) {
        store(Vec::load(row + j * pitch + c), y + j * conv.yw + c, count);
      });
  }
  if (!last) transpose_copy(MaskedInput<float>(row), 0, pitch, cols, lanes, y, conv.yc);
}
static void store_row(const Conv2d& conv, const Region& region, const float* row, const float* next,
                      int64_t pitch, float* scratch) {
  with_type(conv.x.dtype,
            [&]<class T>() { store_row_of<T>(conv, region, row, next, pitch, scratch); });
}

// Where tiles may write y as it is: channels last, nothing to be pooled or rounded.
static bool is_direct(const Conv2d& conv) {
  return conv.yc == 1 && !conv.on_store.argmax && conv.x.dtype == DType::kFloat32;
}

}  // namespace
}  // namespace dlkernels::cpu
