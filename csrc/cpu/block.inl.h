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

// Row h of image n, `cols` columns from w on, `step` apart, as to[j * pitch + c]: zeros for c >=
// x.C.
static void load_row(const Images& x, int64_t n, int64_t h, int64_t w, int64_t cols, int64_t step,
                     int64_t pitch, float* to) {
  // Columns [begin, end) of these lie inside the image.
  const int64_t before = w < 0 ? (step - 1 - w) / step : 0;
  const int64_t inside = w < x.W ? (x.W - 1 - w) / step + 1 : 0;
  const int64_t begin = h < 0 || h >= x.H ? cols : least(cols, before);
  const int64_t end = most(begin, least(cols, inside));
  store_zeros(to, begin * pitch);
  store_zeros(to + end * pitch, (cols - end) * pitch);
  if (begin == end) return;
  const Source s = {x.data, x.relu_y};
  const int64_t sw = step * x.sw, size = end - begin;
  const int64_t from = n * x.sn + h * x.sh + w * x.sw + begin * sw;
  to += begin * pitch;
  if (x.sc == 1 && sw == pitch) {  // one run
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
