// conv2d with few channels a group, and its gradients:
//   y[pixel, g, j] = sum_{i, tap} x[pixel at tap, g, i] * w[g, j, i, tap],  i < c, j < k
// Lanes are groups, so that nothing is broadcast: a panel is kTileCols groups, and in its block
// (block.inl.h) the first channels of all groups lie side by side, then the second, ...

// One panel as a convolution of its own, which is what blocks are cut for.
static Conv2d depthwise_panel(const Conv2d& v) {
  Conv2d panel = v;
  panel.x.C = v.x.C / v.groups * kTileCols, panel.K = v.K / v.groups * kTileCols;
  return panel;
}

struct DepthwiseCut : Cut {
  int64_t c, k;      // channels a group
  int64_t g_floats;  // of a panel's gradient
  int64_t chunk;     // panels that are loaded together: those of a pixel, where it lies in a row
  int64_t temp;      // floats of a row, in the order of the tensors

  explicit DepthwiseCut(const Conv2d& v)
      : Cut(depthwise_panel(v)), c(v.x.C / v.groups), k(v.K / v.groups) {
    constexpr int64_t kFloats = 1 << 16;  // in L2
    g_floats = rows * cols * k * kTileCols;
    chunk = v.x.sc == 1 ? most(1, kFloats / (x_floats + g_floats)) : 1;
    temp = most(c * Span(v.w, 0, cols).run, k * cols) * kTileCols;
  }
};

static int64_t depthwise_blocks(const Conv2d& v) { return DepthwiseCut(v).count; }
static int64_t depthwise_panels(const Conv2d& v) { return ceil_div(v.groups, kTileCols); }
static int64_t depthwise_panel_floats(const Conv2d& v) {
  return v.h.taps * v.w.taps * (v.x.C / v.groups) * (v.K / v.groups) * kTileCols;
}
static int64_t depthwise_sum_floats(const Conv2d& v) {
  return depthwise_panels(v) * depthwise_panel_floats(v);
}
static int64_t depthwise_scratch(const Conv2d& v) {
  const DepthwiseCut cut(v);
  const int64_t rows = 3 * cut.cols * cut.k * kTileCols + cut.k * kTileCols;
  return cut.chunk * (cut.x_floats + cut.g_floats) + cut.temp + rows;
}

// f(j, i, kh, at): the taps of row kh of a filter are at[tap * kTileCols + lane] of a panel.
template <class F>
static void each_tap_row(const Conv2d& v, const F& f) {
  const int64_t c = v.x.C / v.groups, k = v.K / v.groups;
  int64_t at = 0;
  for (int64_t j = 0; j < k; ++j)
    for (int64_t i = 0; i < c; ++i)
      for (int64_t kh = 0; kh < v.h.taps; ++kh, at += v.w.taps * kTileCols) f(j, i, kh, at);
}

static void depthwise_pack(const Conv2d& v, const Filter& f, float* to, int64_t begin,
                           int64_t end) {
  for (int64_t p = begin; p < end; ++p) {
    const int64_t g = p * kTileCols, lanes = least(v.groups - g, kTileCols);
    each_tap_row(v, [&](int64_t j, int64_t i, int64_t kh, int64_t at) {
      const Matrix row = {f.data + g * f.sg + j * f.so + i * f.si + kh * f.sh, f.sg, f.sw};
      pack_panel<kTileCols>(row, 0, lanes, 0, v.w.taps, to + p * depthwise_panel_floats(v) + at);
    });
  }
}

static void depthwise_unpack(const Conv2d& v, const float* sums, const Filter& f, float* to,
                             int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; ++p) {
    const int64_t g = p * kTileCols, lanes = least(v.groups - g, kTileCols);
    each_tap_row(v, [&](int64_t j, int64_t i, int64_t kh, int64_t at) {
      unpack_panel(sums + p * depthwise_panel_floats(v) + at, kTileCols, lanes, v.w.taps,
                   to + g * f.sg + j * f.so + i * f.si + kh * f.sh, f.sg, f.sw);
    });
  }
}

// Panels [p, end) of a block, `each` channels a group: panel q's run of columns as
// to[(q - p) * floats + (column * each + i) * kTileCols + lane].
struct GroupLoader {
  const Images& x;
  int64_t groups, each, p, end, floats;
  float *to, *temp;

  void row(int64_t n, int64_t h, int64_t w, int64_t cols, int64_t step) {
    for (int64_t q = p; q < end; ++q) {
      const int64_t g = q * kTileCols, lanes = least(groups - g, kTileCols);
      float* const panel = to + (q - p) * floats;
      if (each == 1) {
        load_row(x, n, h, w, cols, step, g, lanes, kTileCols, panel);
        continue;
      }
      load_row(x, n, h, w, cols, step, g * each, lanes * each, lanes * each, temp);
      for (int64_t j = 0; j < cols; ++j)
        transpose_copy({temp}, j * lanes * each, each, lanes, each, panel + j * each * kTileCols,
                       kTileCols);
    }
    to += cols * each * kTileCols;
  }
};

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

// Row h of a panel's block, output j of every group, to y: a pixel every y_step floats.
static void depthwise_row(const Conv2d& v, const Block& b, const float* x, const float* weight,
                          int64_t h, int64_t lanes, const float* bias, float* y, int64_t y_step) {
  const int64_t c = v.x.C / v.groups, pixel = c * kTileCols;
  const Taps th = b.rows.taps(h);
  const int64_t x_row = b.cols.size() * pixel, x_step = b.cols.output_step() * pixel;
  for (int64_t w = b.w; w < least(b.w + v.w.up, b.w_end); ++w) {
    const Taps tw = b.cols.taps(w);
    const float* const first = x + th.at * x_row + tw.at * pixel;
    const float* const taps = weight + (th.first * v.w.taps + tw.first) * kTileCols;
    const int64_t taps_h = tw.count ? th.count : 0;
    const GemmOutput out = {.c = y + (w - b.w) * y_step,
                            .row = v.w.up * y_step,
                            .col_bias = bias,
                            .relu = v.relu};
    each_tile(ceil_div(b.w_end - w, v.w.up), lanes,
              [&]<int R, int V>(int64_t o) __attribute__((always_inline)) {
                Tile<R, V> tile;
                for (int64_t i = 0; i < c; ++i)
                  for (int64_t t = 0; t < taps_h; ++t)
                    add_lanes(tile, first + o * x_step + i * kTileCols + t * th.at_step * x_row,
                              x_step, tw.at_step * pixel,
                              taps + ((i * v.h.taps + t * th.step) * v.w.taps) * kTileCols,
                              tw.step * kTileCols, tw.count);
                tile.store(out, o, 0, lanes);
              });
  }
}

static void depthwise(const Conv2d& v, const float* weight, int64_t begin, int64_t end,
                      int64_t panel_begin, int64_t panel_end, float* scratch) {
  const DepthwiseCut cut(v);
  const int64_t k = cut.k, pool = v.argmax ? 2 : 1, pitch = k * kTileCols;
  const int64_t output_floats = depthwise_panel_floats(v) / k;
  float* const temp = scratch + cut.chunk * cut.x_floats;
  float* const rows = temp + cut.temp;
  float* const biases = rows + 3 * cut.cols * pitch;
  for (int64_t i = begin; i < end; ++i) {
    const Block b(v, cut, i);
    const int64_t cols = b.w_end - b.w;
    for (int64_t p = panel_begin; p < panel_end; p += cut.chunk) {
      const int64_t stop = least(p + cut.chunk, panel_end);
      GroupLoader load = {v.x, v.groups, cut.c, p, stop, cut.x_floats, scratch, temp};
      b.each_run([&](int64_t h, int64_t w) { load.row(b.n, h, w, b.cols.run, b.cols.step); });
      for (int64_t h = b.h; h < b.h_end; h += pool)
        for (int64_t q = p; q < stop; ++q) {
          const int64_t g = q * kTileCols, lanes = least(v.groups - g, kTileCols);
          const float* const x = scratch + (q - p) * cut.x_floats;
          const float* const panel = weight + q * depthwise_panel_floats(v);
          if (k == 1 && v.yc == 1 && !v.argmax) {
            depthwise_row(v, b, x, panel, h, lanes, v.bias ? v.bias + g : nullptr,
                          v.y + b.n * v.yn + h * v.yh + b.w * v.yw + g, v.yw);
            continue;
          }
          if (v.bias) transpose_copy({v.bias}, g * k, k, lanes, k, biases, kTileCols);
          for (int64_t r = 0; r < pool; ++r) {
            float* const row = k > 1 ? temp : rows + r * cols * pitch;
            for (int64_t j = 0; j < k; ++j)
              depthwise_row(v, b, x, panel + j * output_floats, h + r, lanes,
                            v.bias ? biases + j * kTileCols : nullptr, row + j * kTileCols, pitch);
            for (int64_t w = 0; w < cols && k > 1; ++w)
              transpose_copy({temp}, w * pitch, kTileCols, k, lanes,
                             rows + (r * cols + w) * pitch, k);
          }
          store_row(v, b.n, h, b.w, cols, g * k, lanes * k, rows, rows + cols * pitch, pitch,
                    rows + 2 * cols * pitch);
        }
    }
  }
}

// sums (panels, k, c, KH, KW, kTileCols)
static void depthwise_grad_weight(const Conv2d& v, const Images& grad_y, int64_t begin, int64_t end,
                                  int64_t panel_begin, int64_t panel_end, float* sums,
                                  float* bias_sums, float* scratch) {
  const DepthwiseCut cut(v);
  const int64_t c = cut.c, k = cut.k, pixel = c * kTileCols, g_pitch = k * kTileCols;
  float* const gs = scratch + cut.chunk * cut.x_floats;
  float* const temp = gs + cut.chunk * cut.g_floats;
  for (int64_t n = begin; n < end; ++n) {
    const Block b(v, cut, n);
    const int64_t rows = b.h_end - b.h, cols = b.w_end - b.w, x_row = b.cols.size() * pixel;
    const int64_t x_step = b.cols.output_step() * pixel, out_row = b.rows.output_step() * x_row;
    const Taps th = b.rows.taps(b.h), tw = b.cols.taps(b.w);
    const int64_t step = most(kDepth / cols, 1);  // sums of sums, for their error
    for (int64_t p = panel_begin; p < panel_end; p += cut.chunk) {
      const int64_t stop = least(p + cut.chunk, panel_end);
      GroupLoader load = {v.x, v.groups, c, p, stop, cut.x_floats, scratch, temp};
      b.each_run([&](int64_t h, int64_t w) { load.row(b.n, h, w, b.cols.run, b.cols.step); });
      GroupLoader load_g = {grad_y, v.groups, k, p, stop, cut.g_floats, gs, temp};
      for (int64_t h = b.h; h < b.h_end; ++h) load_g.row(b.n, h, b.w, cols, 1);
      for (int64_t q = p; q < stop; ++q) {
        const int64_t lanes = least(v.groups - q * kTileCols, kTileCols);
        const float* const x = scratch + (q - p) * cut.x_floats;
        const float* const g = gs + (q - p) * cut.g_floats;
        for (int64_t j = 0; j < k && bias_sums; ++j) {
          float* const bias = temp + j * kTileCols;
          float* const to = bias_sums + q * kTileCols * k;
          sum_columns({g + j * kTileCols, 1, g_pitch}, lanes, rows * cols, bias, false);
          for (int64_t lane = 0; lane < lanes; ++lane)
            to[lane * k + j] = bias[lane] + (n > begin ? to[lane * k + j] : 0.0f);
        }
        if (!sums) continue;
        each_tap_row(v, [&](int64_t j, int64_t i, int64_t kh, int64_t at) {
          const float* const first = x + kh * th.at_step * x_row + i * kTileCols;
          const GemmOutput out = {.c = sums + q * depthwise_panel_floats(v) + at, .row = kTileCols};
          each_tile(v.w.taps, lanes, [=]<int R, int V>(int64_t kw) {
            for (int64_t h = 0; h < rows; h += step) {
              Tile<R, V> tile;
              for (int64_t r = h; r < least(rows, h + step); ++r)
                add_lanes(tile, first + r * out_row + kw * tw.at_step * pixel, tw.at_step * pixel,
                          x_step, g + r * cols * g_pitch + j * kTileCols, g_pitch, cols);
              tile.store(out, kw, 0, kTileCols, {.first = n == begin && h == 0});
            }
          });
        });
      }
    }
  }
}

constexpr Conv2dKernels kDepthwise = {.blocks = depthwise_blocks,
                                      .batch = conv2d_batch,
                                      .scratch = depthwise_scratch,
                                      .panels = depthwise_panels,
                                      .panel_floats = depthwise_panel_floats,
                                      .sum_floats = depthwise_sum_floats,
                                      .pack = depthwise_pack,
                                      .forward = depthwise,
                                      .grad_weight = depthwise_grad_weight,
                                      .unpack = depthwise_unpack};
