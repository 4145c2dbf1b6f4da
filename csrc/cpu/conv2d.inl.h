// conv2d directly, and its gradients: register tiles of pixels by output channels, the pixels'
// windows broadcast from a block (block.inl.h) against panels of weights. The taps of a row of the
// window lie along memory in a block, so there is no im2col matrix, not even in cache.

// ---- one axis of a block -------------------------------------------------------------------

static int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// The taps that output o has: tap first + i * step lies at index at + i * at_step, i < count.
struct Taps {
  int64_t first, step, count, at, at_step;
};

// The inputs of outputs [o, o + size) in scratch: all from the first to the last of them, or, where
// fewer, those of each tap as a run of their own (a wide stride or dilation).
struct Span {
  const ConvAxis& axis;
  int64_t o, runs, run, step;  // `runs` runs of `run` inputs, `step` apart
  bool apart;

  Span(const ConvAxis& a, int64_t o, int64_t size) : axis(a), o(o) {
    const int64_t all = ((size - 1) * a.stride + (a.taps - 1) * a.dilation) / a.up + 1 + (a.up > 1);
    const int64_t each = a.up > 1 ? (size - 1) / a.up + 2 : size;
    apart = each * a.taps < all;
    runs = apart ? a.taps : 1, run = apart ? each : all, step = apart ? a.stride : 1;
  }
  int64_t size() const { return runs * run; }
  int64_t begin(int64_t i) const {  // the first input of run i
    return floor_div(o * axis.stride - axis.pad + i * axis.dilation, axis.up);
  }
  // From an output to the next that has the same taps.
  int64_t output_step() const { return apart ? 1 : axis.stride; }

  Taps taps(int64_t output) const {
    int64_t gcd = axis.up;
    for (int64_t rest = axis.dilation; rest;) {
      const int64_t next = gcd % rest;
      gcd = rest, rest = next;
    }
    Taps t = {0, axis.up / gcd, 0, 0, axis.dilation / gcd};
    const int64_t start = output * axis.stride - axis.pad, phases = least(t.step, axis.taps);
    while (t.first < phases && (start + t.first * axis.dilation) % axis.up != 0) ++t.first;
    if (t.first == phases) return t;
    t.count = ceil_div(axis.taps - t.first, t.step);
    if (apart) {
      t.at = t.first * run + ceil_div(output - o, axis.up);
      t.at_step = t.step * run;
    } else {
      t.at = (start + t.first * axis.dilation) / axis.up - begin(0);
    }
    return t;
  }
};

// ---- blocks --------------------------------------------------------------------------------

// How an image's outputs are cut into blocks, from the sizes alone.
struct Cut {
  int64_t rows, cols;      // outputs of a block
  int64_t count_w, count;  // blocks an image
  int64_t x_floats;
  int64_t g_pitch, g_floats;  // of the gradient's block

  explicit Cut(const Conv2d& v) {
    constexpr int64_t kWide = 1 << 16, kBlock = 1 << 15;  // floats: in L2, and a fraction of it
    const auto floats = [&](int64_t r, int64_t c) {
      return Span(v.h, 0, r).size() * Span(v.w, 0, c).size() * v.x.C + r * c * v.K;
    };
    const int64_t even = v.argmax ? 2 : 1;  // whole windows of the pool
    cols = v.w.out;
    while (cols > kDepth || (cols > 2 * kTileRows * v.w.up && floats(1, cols) > kWide))
      cols = round_up((cols + 1) / 2, even);
    rows = even;
    while (rows < v.h.out && floats(rows + even, cols) <= kBlock) rows += even;
    const int64_t count_h = ceil_div(v.h.out, rows);
    rows = round_up(ceil_div(v.h.out, count_h), even);
    count_w = ceil_div(v.w.out, cols);
    count = count_h * count_w;
    x_floats = round_up(Span(v.h, 0, rows).size() * Span(v.w, 0, cols).size() * v.x.C);
    g_pitch = round_up(v.K);
    g_floats = rows * cols * g_pitch + kTileCols;
  }
};

// One of them: outputs [h, h_end) x [w, w_end) of image n, and the inputs that they see.
struct Block {
  int64_t n, h, h_end, w, w_end;
  Span rows, cols;

  Block(const Conv2d& v, const Cut& cut, int64_t index)
      : n(index / cut.count),
        h(index % cut.count / cut.count_w * cut.rows),
        h_end(least(h + cut.rows, v.h.out)),
        w(index % cut.count % cut.count_w * cut.cols),
        w_end(least(w + cut.cols, v.w.out)),
        rows(v.h, h, h_end - h),
        cols(v.w, w, w_end - w) {}

  // f(h, w) for the runs of inputs that begin at row h, column w, as they follow in scratch.
  template <class F>
  void each_run(const F& f) const {
    for (int64_t i = 0; i < rows.runs; ++i)
      for (int64_t r = 0; r < rows.run; ++r)
        for (int64_t j = 0; j < cols.runs; ++j) f(rows.begin(i) + r * rows.step, cols.begin(j));
  }

  // Their inputs, to x[(row * cols.size() + column) * pitch + ...]: channels [c, c + channels).
  void load(const Images& images, int64_t c, int64_t channels, float* x) const {
    each_run([&](int64_t h, int64_t w) {
      load_row(images, n, h, w, cols.run, cols.step, c, channels, channels, x);
      x += cols.run * channels;
    });
  }
};

// With few output channels, these are few lanes; then the lanes are pixels, in planes, and the
// channels are the tile's rows. An output's columns go on into the margin of its row of inputs, so
// that a block is one long row.
constexpr int64_t kFewChannels = 8, kPixel = most(kFewChannels, Vec::kWidth);

static bool are_planes(const Conv2d& v, const Cut& cut) {
  // The last block is the smallest: where its inputs are one run, so are those of all.
  const auto plain = [](const ConvAxis& a, int64_t size) {
    return a.stride == 1 && a.up == 1 && !Span(a, 0, (a.out - 1) % size + 1).apart;
  };
  return v.groups == 1 && v.K <= kFewChannels && plain(v.h, cut.rows) && plain(v.w, cut.cols) &&
         2 * cut.cols >= Span(v.w, 0, cut.cols).size();
}

// Where they are in scratch: a plane of inputs each for C channels, of outputs for K, then rows.
struct Planes {
  int64_t in_pitch, out_pitch, out, rows, floats;

  Planes(const Conv2d& v, const Cut& cut) {
    constexpr int64_t kBeyond = 4 * Vec::kWidth;  // the last tile's
    const int64_t cols = Span(v.w, 0, cut.cols).size();
    in_pitch = round_up(Span(v.h, 0, cut.rows).size() * cols);
    out_pitch = round_up(cut.rows * cols) + kBeyond;
    const int64_t in = v.x.C * in_pitch;  // and the same again, channels last
    out = 2 * in + kBeyond;
    rows = out + v.K * out_pitch;
    floats = rows + 3 * cut.cols * kPixel;
  }
};

static int64_t conv2d_blocks(const Conv2d& v) { return Cut(v).count; }
static int64_t conv2d_batch(const Conv2d&) { return 1; }
static int64_t conv2d_scratch(const Conv2d& v) {
  const Cut cut(v);
  const int64_t rows = most((v.argmax ? 3 : 1) * cut.cols * kTileCols, cut.g_floats);
  return most(cut.x_floats + rows, are_planes(v, cut) ? Planes(v, cut).floats : 0);
}

// ---- weights -------------------------------------------------------------------------------

// Panels: (groups, ceil(k / kTileCols), KH, KW, c, kTileCols), zeros beyond k.
static int64_t conv2d_panels(const Conv2d& v) {
  return v.groups * ceil_div(v.K / v.groups, kTileCols);
}
static int64_t conv2d_panel_floats(const Conv2d& v) {
  return v.h.taps * v.w.taps * (v.x.C / v.groups) * kTileCols;
}

// What panel `index` is of: channels [k, k + lanes) of group `group`, counted in the group.
struct Panel {
  int64_t group, k, lanes;
  Panel(const Conv2d& v, int64_t index) {
    const int64_t channels = v.K / v.groups, panels = conv2d_panels(v) / v.groups;
    group = index / panels;
    k = index % panels * kTileCols;
    lanes = least(channels - k, kTileCols);
  }
};

static void conv2d_pack(const Conv2d& v, const Filter& f, float* to, int64_t begin, int64_t end) {
  const int64_t c = v.x.C / v.groups;
  with_type(v.x.dtype, [&]<class T>() {
    const Source<T> s(f.data);
    for (int64_t i = begin; i < end; ++i) {
      const Panel p(v, i);
      float* panel = to + i * conv2d_panel_floats(v);
      const int64_t from = p.group * f.sg + p.k * f.so;
      for (int64_t kh = 0; kh < v.h.taps; ++kh)
        for (int64_t kw = 0; kw < v.w.taps; ++kw, panel += c * kTileCols)
          pack_panel<kTileCols>(s, from + kh * f.sh + kw * f.sw, f.so, f.si, p.lanes, c, panel);
    }
  });
}

// ---- forward, and grad_input, which is one with up = stride ----------------------------------

// Row h of a block, one panel, all columns [w, w_end), to y: a pixel every y_step floats.
static void conv2d_row(const Conv2d& v, const Block& b, const float* x, const Panel& p,
                       const float* weight, int64_t h, float* y, int64_t y_step) {
  const int64_t C = v.x.C, c = C / v.groups, lanes = p.lanes;
  const Taps th = b.rows.taps(h);
  const int64_t x_row = b.cols.size() * C, x_step = b.cols.output_step() * C;
  for (int64_t w = b.w; w < least(b.w + v.w.up, b.w_end); ++w) {
    const Taps tw = b.cols.taps(w);
    const bool joined = c == C && tw.step == 1 && tw.at_step == 1;  // taps along memory
    const int64_t taps_h = tw.count ? th.count : 0, taps_w = joined ? 1 : tw.count;
    const int64_t depth = joined ? tw.count * c : c;
    const float* const first = x + th.at * x_row + tw.at * C + p.group * c;
    const int64_t first_row = th.at_step * x_row, first_col = tw.at_step * C;
    const float* const panel = weight + (th.first * v.w.taps + tw.first) * c * kTileCols;
    const int64_t panel_row = th.step * v.w.taps * c * kTileCols;
    const int64_t panel_col = tw.step * c * kTileCols;
    const GemmOutput out = {
        .c = y + (w - b.w) * y_step,
        .row = v.w.up * y_step,
        .col_bias = v.bias ? v.bias + p.group * (v.K / v.groups) + p.k : nullptr,
        .relu = v.relu};
    // Inline: a short sum is over before as many references are followed (10 % for one channel).
    each_tile(ceil_div(b.w_end - w, v.w.up), lanes,
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

// Outputs [o, o + V * kWidth) of R planes, the inputs of o's first tap at x.
// Not inline: the loops around it would take its registers (10 % for one channel).
template <int R, int V>
__attribute__((noinline)) static void planes_tile(const Conv2d& v, const float* weight,
                                                  const float* x, int64_t x_pitch, int64_t row,
                                                  const GemmOutput& y, int64_t o) {
  const int64_t C = v.x.C, tap = C * kTileCols;
  Tile<R, V> tile;
  for (int64_t c = 0; c < C; ++c)
    for (int64_t kh = 0; kh < v.h.taps; ++kh)
      tile.add_columns(weight + kh * v.w.taps * tap + c * kTileCols, tap,
                       x + o + c * x_pitch + kh * v.h.dilation * row, v.w.dilation, v.w.taps);
  tile.store(y, 0, o);
}

static void conv2d_planes(const Conv2d& v, const Cut& cut, const Block& b, const float* weight,
                          float* scratch) {
  const Planes p(v, cut);
  const int64_t C = v.x.C, row = b.cols.size(), pixels = b.rows.size() * row;
  if (v.x.sw == 1 && !v.x.argmax) {
    for (int64_t c = 0; c < C; ++c) b.load(v.x, c, 1, scratch + c * p.in_pitch);
  } else {
    float* const last = scratch + C * p.in_pitch;
    b.load(v.x, 0, C, last);
    transpose_copy(Source<float>(last), 0, C, pixels, C, scratch, p.in_pitch);
  }
  const int64_t rows = b.h_end - b.h, cols = b.w_end - b.w, pool = v.argmax ? 2 : 1;
  float* const out = scratch + p.out;
  const GemmOutput y = {.c = out, .row = p.out_pitch, .row_bias = v.bias, .relu = v.relu};
  const int64_t size = (rows - 1) * row + cols;
  with_rows<kFewChannels>(v.K, [&]<int R>() {
    constexpr int V = least(4, most(1, kTileRows * kTileVecs / R)), kStep = V * Vec::kWidth;
    int64_t o = 0;
    for (; o + kStep <= size; o += kStep)
      planes_tile<R, V>(v, weight, scratch, p.in_pitch, row, y, o);
    for (; o < size; o += Vec::kWidth) planes_tile<R, 1>(v, weight, scratch, p.in_pitch, row, y, o);
  });
  for (int64_t h = 0; h < rows; h += pool) {
    if (v.yc != 1 && !v.argmax) {
      with_type(v.x.dtype, [&]<class T>() {
        T* const to = static_cast<T*>(v.y) + b.n * v.yn + (b.h + h) * v.yh + b.w;
        for (int64_t k = 0; k < v.K; ++k)
          pack_run(Source<float>(out), k * p.out_pitch + h * row, cols, cols, to + k * v.yc);
      });
      continue;
    }
    float* const last = scratch + p.rows;
    for (int64_t r = 0; r < pool; ++r)
      transpose_copy(Source<float>(out), (h + r) * row, p.out_pitch, v.K, cols,
                     last + r * cols * kPixel, kPixel);
    store_row(v, b.n, b.h + h, b.w, cols, 0, v.K, last, last + cols * kPixel, kPixel,
              last + 2 * cols * kPixel);
  }
}

static void conv2d(const Conv2d& v, const float* weight, int64_t begin, int64_t end,
                   int64_t panel_begin, int64_t panel_end, float* scratch) {
  if (panel_begin == panel_end) return;  // planes are always all of the channels
  const Cut cut(v);
  const int64_t pool = v.argmax ? 2 : 1;
  const bool narrow = are_planes(v, cut);
  const bool deep = v.h.taps * v.w.taps * v.x.C >= 4 * v.groups * Vec::kWidth;  // time to prefetch
  float* const rows = scratch + cut.x_floats;  // channels last, for what is still to be done
  for (int64_t i = begin; i < end; ++i) {
    const Block b(v, cut, i);
    const int64_t cols = b.w_end - b.w;
    if (narrow) {
      conv2d_planes(v, cut, b, weight, scratch);
      continue;
    }
    b.load(v.x, 0, v.x.C, scratch);
    float* const pooled = rows + 2 * cols * kTileCols;
    for (int64_t j = panel_begin; j < panel_end; ++j) {
      const Panel p(v, j);
      const int64_t k = p.group * (v.K / v.groups) + p.k;
      const float* panel = weight + j * conv2d_panel_floats(v);
      for (int64_t h = b.h; h < b.h_end; h += pool) {
        if (is_direct(v)) {
          float* y = static_cast<float*>(v.y) + b.n * v.yn + h * v.yh + b.w * v.yw + k;
          conv2d_row(v, b, scratch, p, panel, h, y, v.yw);
          continue;
        }
        if (v.yc != 1 && deep) expect_rows(v, b.n, h, pool, b.w, cols, k, p.lanes);
        for (int64_t r = 0; r < pool; ++r)
          conv2d_row(v, b, scratch, p, panel, h + r, rows + r * cols * kTileCols, kTileCols);
        store_row(v, b.n, h, b.w, cols, k, p.lanes, rows, rows + cols * kTileCols, kTileCols,
                  pooled);
      }
    }
  }
}

// ---- grad_weight and grad_bias ---------------------------------------------------------------

// sums (groups, KH, KW, c, k): of x's windows times the gradient g, over blocks [begin, end).
static void conv2d_grad_weight(const Conv2d& v, const Images& grad_y, int64_t begin, int64_t end,
                               int64_t panel_begin, int64_t panel_end, float* sums,
                               float* bias_sums, float* scratch) {
  const Cut cut(v);
  const int64_t C = v.x.C, c = C / v.groups, k = v.K / v.groups, taps = v.h.taps * v.w.taps;
  float* const g_block = scratch + cut.x_floats;
  for (int64_t i = begin; i < end; ++i) {
    const Block b(v, cut, i);
    b.load(v.x, 0, C, scratch);
    const int64_t rows = b.h_end - b.h, cols = b.w_end - b.w, x_row = b.cols.size() * C;
    const int64_t x_step = b.cols.output_step() * C, out_row = b.rows.output_step() * x_row;
    const Taps th = b.rows.taps(b.h), tw = b.cols.taps(b.w);
    const bool joined = v.groups == 1 && tw.at_step == 1;  // taps along memory
    load_block(grad_y, b.n, b.h, rows, b.w, cols, 0, v.K, cut.g_pitch, g_block);
    for (int64_t q = panel_begin; q < panel_end; ++q) {
      const Panel p(v, q);
      const int64_t lanes = p.lanes, g_pitch = cut.g_pitch;
      const float* const g = g_block + p.group * k + p.k;
      if (bias_sums) {
        each_vector(0, lanes, [&](int64_t lane, int64_t n) {
          float* to = bias_sums + p.group * k + p.k + lane;
          Vec total = i > begin ? load(to, n) : Vec::zero();
          for (int64_t w = 0; w < rows * cols;) {  // sums of 16 first, for their error
            Vec sum = Vec::zero();
            for (const int64_t some = least(rows * cols, w + 16); w < some; ++w)
              sum = sum + Vec::load(g + w * g_pitch + lane);
            total = total + sum;
          }
          store(total, to, n);
        });
      }
      if (!sums) continue;
      for (int64_t kh = 0; kh < v.h.taps; ++kh)
        for (int64_t kw = 0; kw < (joined ? 1 : v.w.taps); ++kw) {
          const float* const first =
              scratch + kh * th.at_step * x_row + kw * tw.at_step * C + p.group * c;
          const GemmOutput out = {.c = sums + (p.group * taps + kh * v.w.taps + kw) * c * k + p.k,
                                  .row = k};
          const int64_t step = most(kDepth / cols, 1);  // sums of sums, for their error
          each_tile(joined ? v.w.taps * c : c, lanes, [=]<int R, int V>(int64_t j) {
            for (int64_t h = 0; h < rows; h += step) {
              Tile<R, V> tile;
              for (int64_t r = h; r < least(rows, h + step); ++r)
                tile.add_columns(first + r * out_row + j, x_step, g + r * cols * g_pitch, g_pitch,
                                 cols);
              tile.store(out, j, 0, lanes, {.first = i == begin && h == 0});
            }
          });
        }
    }
  }
}

static int64_t conv2d_sum_floats(const Conv2d& v) {
  return v.h.taps * v.w.taps * (v.x.C / v.groups) * v.K;
}

// to[k, c, kh, kw] = sums as above, summed already, of panels [begin, end).
static void conv2d_unpack(const Conv2d& v, const float* sums, const Filter& f, void* to,
                          int64_t begin, int64_t end) {
  const int64_t c = v.x.C / v.groups, k = v.K / v.groups, taps = v.h.taps * v.w.taps;
  with_type(v.x.dtype, [&]<class T>() {
    for (int64_t q = begin; q < end; ++q) {
      const Panel p(v, q);
      T* const weight = static_cast<T*>(to) + p.group * f.sg + p.k * f.so;
      for (int64_t kh = 0; kh < v.h.taps; ++kh)
        for (int64_t kw = 0; kw < v.w.taps; ++kw) {
          const float* from = sums + (p.group * taps + kh * v.w.taps + kw) * c * k + p.k;
          unpack_panel(from, k, p.lanes, c, weight + kh * f.sh + kw * f.sw, f.so, f.si);
        }
    }
  });
}

constexpr Conv2dKernels kConv2d = {.blocks = conv2d_blocks,
                                   .batch = conv2d_batch,
                                   .scratch = conv2d_scratch,
                                   .panels = conv2d_panels,
                                   .panel_floats = conv2d_panel_floats,
                                   .sum_floats = conv2d_sum_floats,
                                   .pack = conv2d_pack,
                                   .forward = conv2d,
                                   .grad_weight = conv2d_grad_weight,
                                   .unpack = conv2d_unpack};
