// Blocks: parts of an image in scratch, channels last, with whatever lies outside the image as
// zeros. A convolution on blocks knows neither layouts nor borders.

// to[j * to_pitch + i] = from[i * from_pitch + j] for i < rows, j < cols.
static void transpose_copy(const Source& s, int64_t from, int64_t from_pitch, int64_t rows,
                           int64_t cols, float* to, int64_t to_pitch) {
  constexpr int64_t V = Vec::kWidth;
  for (int64_t i0 = 0; i0 < rows; i0 += V)
    for (int64_t j0 = 0; j0 < cols; j0 += V) {
      const int64_t lanes = least(rows - i0, V), n = least(cols - j0, V);
      Vec r[V];
#pragma GCC unroll 16
      for (int64_t i = 0; i < V; ++i)
        r[i] = i < lanes ? s.at(from + (i0 + i) * from_pitch + j0, n) : Vec::zero();
      transpose(r);
      float* const p = to + j0 * to_pitch + i0;
#pragma GCC unroll 16
      for (int64_t j = 0; j < V; ++j)
        if (j < n) store(r[j], p + j * to_pitch, lanes);
    }
}

// The gradient g of a pooled pixel, as far as it belongs to one element of the window: 0 to 3.
static void unpool_pixel(const float* g, const uint8_t* argmax, int64_t element, int64_t C,
                         int64_t pitch, float* to) {
  for (int64_t c = 0; c < pitch; c += Vec::kWidth) {
    const int64_t n = c < C ? least(C - c, Vec::kWidth) : 0;
    const auto here = Vec::load_bytes(argmax + c, n) == Vec::fill(static_cast<float>(element));
    store(select(here, load(g + c, n), Vec::zero()), to + c, least(pitch - c, Vec::kWidth));
  }
}

// Row h of image n, pixels [w, w + cols), all inside, of a gradient that comes through a pool.
static void unpool_row(const Images& x, int64_t n, int64_t h, int64_t w, int64_t cols,
                       int64_t pitch, float* to) {
  const float* row = x.data + n * x.sn + h / 2 * x.sh;
  const uint8_t* argmax = x.argmax + (n * (x.H / 2) + h / 2) * (x.W / 2) * x.C;
  const auto put = [&](const float* g, int64_t j) {
    unpool_pixel(g, argmax + (w + j) / 2 * x.C, h % 2 * 2 + (w + j) % 2, x.C, pitch,
                 to + j * pitch);
  };
  if (x.sc == 1) {
    for (int64_t j = 0; j < cols; ++j) put(row + (w + j) / 2 * x.sw, j);
    return;
  }
  // Planes: pixels first as they are, each where the left one of its window goes, if both go.
  const int64_t first = w % 2, windows = (cols - first) / 2;
  const auto single = [&](int64_t j) {
    for (int64_t c = 0; c < x.C; ++c) to[j * pitch + c] = row[c * x.sc + (w + j) / 2];
    put(to + j * pitch, j);
  };
  transpose_copy({row, nullptr}, (w + 1) / 2, x.sc, x.C, windows, to + first * pitch, 2 * pitch);
  for (int64_t j = first; j < first + 2 * windows; j += 2) {
    put(to + j * pitch, j + 1);
    put(to + j * pitch, j);
  }
  if (first) single(0);
  if (first + 2 * windows < cols) single(cols - 1);
}

// Row h of image n, `cols` columns from w on, `step` apart, as to[j * pitch + c]: zeros for c >=
// x.C.
static void load_row(const Images& x, int64_t n, int64_t h, int64_t w, int64_t cols, int64_t step,
                     int64_t pitch, float* to) {
  // Columns [begin, end) of these lie inside the image.
  const int64_t before = w < 0 ? (step - 1 - w) / step : 0;
  const int64_t W = x.argmax ? x.W / 2 * 2 : x.W, H = x.argmax ? x.H / 2 * 2 : x.H;
  const int64_t inside = w < W ? (W - 1 - w) / step + 1 : 0;
  const int64_t begin = h < 0 || h >= H ? cols : least(cols, before);
  const int64_t end = most(begin, least(cols, inside));
  store_zeros(to, begin * pitch);
  store_zeros(to + end * pitch, (cols - end) * pitch);
  if (begin == end) return;
  const Source s = {x.data, x.relu_y};
  const int64_t sw = step * x.sw, size = end - begin;
  const int64_t from = n * x.sn + h * x.sh + w * x.sw + begin * sw;
  to += begin * pitch;
  if (x.argmax) return unpool_row(x, n, h, w + begin, size, pitch, to);  // step is 1
  if (x.sc == 1 && sw == pitch) {                                        // one run
    pack_run(s, from, size * pitch, size * pitch, to);
  } else if (x.sc == 1) {
    for (int64_t j = 0; j < size; ++j) pack_run(s, from + j * sw, x.C, pitch, to + j * pitch);
  } else if (step == 1 && pitch >= Vec::kWidth / 2) {
    transpose_copy(s, from, x.sc, x.C, size, to, pitch);
    for (int64_t j = 0; j < size; ++j) store_zeros(to + j * pitch + x.C, pitch - x.C);
  } else {
    for (int64_t c = 0; c < pitch; ++c)
      for (int64_t j = 0; j < size; ++j)
        to[j * pitch + c] = c < x.C ? s.at(from + c * x.sc + j * sw) : 0.0f;
  }
}

// Rows [h, h + rows) and columns [w, w + cols) of image n as to[(i * cols + j) * pitch + c].
static void load_block(const Images& x, int64_t n, int64_t h, int64_t rows, int64_t w, int64_t cols,
                       int64_t pitch, float* to) {
  for (int64_t i = 0; i < rows; ++i)
    load_row(x, n, h + i, w, cols, 1, pitch, to + i * cols * pitch);
}
