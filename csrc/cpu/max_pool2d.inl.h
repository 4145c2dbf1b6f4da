// y[n, oh, ow, c] = max over (kh, kw) of x[n, oh * stride - pad + kh * dilation, ow * .. kw .., c],
// where that max is (a byte an output), and the gradient. Lanes are channels, or in a plane
// neighbouring windows: the same body, with another load.

// The elements [begin, end) of a window along one axis that lie inside the input, given the
// position of element 0.
struct Inside {
  int64_t begin, end;
};
static bool within(int64_t i, Inside range) { return i >= range.begin && i < range.end; }

static Inside inside(const PoolAxis& a, int64_t start) {
  const auto count_before = [&](int64_t position) {
    if (position <= start) return int64_t{0};
    return least((position - start + a.dilation - 1) / a.dilation, a.kernel);
  };
  const bool whole = start >= 0 && start + (a.kernel - 1) * a.dilation < a.in;
  return whole ? Inside{0, a.kernel} : Inside{count_before(0), count_before(a.in)};
}

// The windows that lie inside the input with all their elements.
static Inside whole_windows(const PoolAxis& a) {
  const int64_t last = a.in - 1 - (a.kernel - 1) * a.dilation + a.pad;  // start - pad of the last
  const int64_t end = last < 0 ? 0 : least(last / a.stride + 1, a.out);
  return {least((a.pad + a.stride - 1) / a.stride, end), end};
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
      const Vec::Mask wins = either(v > best, is_nan(v));
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
template <int64_t kCount, bool kArgmax, class Load>
static inline void pool_whole(const float* x, const WindowOffsets& offsets, Load load, int64_t n,
                              float* y, uint8_t* argmax) {
  const int64_t count = kCount ? kCount : offsets.count;
  Vec best = load(x, n), arg = Vec::zero();
#pragma GCC unroll 9
  for (int64_t k = 1; k < count; ++k) {
    const Vec v = load(x + offsets.at[k], n);
    const Vec::Mask wins = either(v > best, is_nan(v));
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
      windows = C == 1 && whole ? least(whole_w.end - ow, Vec::kWidth) : 1;
      const int64_t lanes = windows * C;
      if (whole && whole_row) {
        const float* from = image + (at.h * p.w.in + at.w) * C;
        for (int64_t c = 0; c < lanes; c += Vec::kWidth)
          pool_whole<kCount, kArgmax>(from + c, offsets, load, least(lanes - c, Vec::kWidth),
                                      to + c, kArgmax ? arg + c : nullptr);
        continue;
      }
      at.kw = inside(p.w, at.w);
      for (int64_t c = 0; c < lanes; c += Vec::kWidth)
        pool_lanes<kArgmax>(image + c, p, at, load, least(lanes - c, Vec::kWidth), to + c,
                            kArgmax ? arg + c : nullptr);
    }
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
  if (p.C > 1 || stride == 1)
    pool_rows<kCount, kArgmax>(x, y, argmax, p, load_lanes, begin, end);
  else if (stride == 2)
    pool_rows<kCount, kArgmax>(x, y, argmax, p, load_even, begin, end);
  else
    pool_rows<0, kArgmax>(x, y, argmax, p, load_every, begin, end);
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

// Where element k of a window lies, from its element 0. Bytes that are no element lie nowhere: no
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
static Vec chosen(const float* grad_y, const uint8_t* argmax, int64_t k, int64_t n) {
  return select(Vec::load_bytes(argmax, n) == Vec::fill(k), load(grad_y, n), Vec::zero());
}

// A row of grad_x where windows do not overlap, from the one row of windows that covers it, of
// which it is the row of elements k = kh * KW: every position is written once.
static void expand_row(const float* grad_y, const uint8_t* argmax, float* grad_x, const Pool& p,
                       int64_t k) {
  const int64_t V = Vec::kWidth, W = p.w.in, C = p.C;
  if (C > 1) {
    for (int64_t w = 0, ow = p.w.pad / p.w.stride, kw = p.w.pad % p.w.stride; w < W; ++w) {
      if (kw < p.w.kernel && ow < p.w.out)
        for (int64_t c = 0; c < C; c += V) {
          const int64_t o = ow * C + c, n = least(C - c, V);
          store(chosen(grad_y + o, argmax + o, k + kw, n), grad_x + w * C + c, n);
        }
      else
        store_zeros(grad_x + w * C, C);
      if (++kw == p.w.stride) kw = 0, ++ow;
    }
    return;
  }
  for (int64_t ow = 0; ow < p.w.out; ow += V) {  // planes: stride 2 without padding
    const int64_t n = least(p.w.out - ow, V), m = least(2 * n, W - 2 * ow);
    Vec even = chosen(grad_y + ow, argmax + ow, k, n), odd = Vec::zero();
    if (p.w.kernel == 2) odd = chosen(grad_y + ow, argmax + ow, k + 1, n);
    interleave(even, odd);
    store(even, grad_x + 2 * ow, least(m, V));
    if (m > V) store(odd, grad_x + 2 * ow + V, m - V);
  }
  if (2 * p.w.out < W) store_zeros(grad_x + 2 * p.w.out, W - 2 * p.w.out);
}

static bool apart(const PoolAxis& a) { return a.dilation == 1 && a.kernel <= a.stride; }

static void max_pool2d_backward(const float* grad_y, const uint8_t* argmax, float* grad_x,
                                const Pool& p, int64_t begin, int64_t end) {
  const int64_t x_row = p.w.in * p.C, y_row = p.w.out * p.C, H = p.h.in;
  if (!apart(p.h) || !apart(p.w) || (p.C == 1 && (p.w.stride != 2 || p.w.pad != 0))) {
    const Places places(p);
    for (int64_t row = begin, rows; row < end; row += rows) {
      const int64_t image = row / H, h = row % H, o = image * p.h.out * y_row;
      rows = least(H - h, end - row);
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
