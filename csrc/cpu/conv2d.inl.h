// conv2d as the shared GEMM: the im2col matrix is an operand that packs itself from x, so it never
// lies in memory. Columns are ordered (kh, kw, c) in both layouts, so that what depends on the
// window (bounds, offsets) is worked out once for all channels.

// Rows are output pixels: the operand of the forward pass and of grad_input.
struct PixelRows {
  const Patches& p;

  template <int64_t W>
  void pack(int64_t i0, int64_t rows, int64_t k0, int64_t depth, float* panel) const {
    int64_t image[W];
    const int64_t *h[W], *w[W];
    int64_t ow = i0 % p.OW, oh = i0 / p.OW % p.OH, n = i0 / p.OW / p.OH;
    for (int64_t i = 0; i < rows; ++i) {
      image[i] = n * p.sn;
      h[i] = p.h + oh * p.KH;
      w[i] = p.w + ow * p.KW;
      if (++ow == p.OW) ow = 0, ++oh;
      if (oh == p.OH) oh = 0, ++n;
    }
    const Source s = {p.x, p.relu_y};
    int64_t tap = k0 / p.C, c = k0 % p.C;
    for (int64_t k = 0; k < depth; ++tap, c = 0) {
      const int64_t run = least(p.C - c, depth - k), kh = tap / p.KW, kw = tap % p.KW;
      int64_t offset[W];
      for (int64_t i = 0; i < rows; ++i) {
        const bool inside = h[i][kh] >= 0 && w[i][kw] >= 0;
        offset[i] = inside ? image[i] + h[i][kh] * p.sh + w[i][kw] * p.sw + c * p.sc : -1;
      }
      if (p.sc == 1)
        pack_rows<W>(s, offset, rows, run, panel + k * W);
      else
        pack_planes<W>(s, offset, rows, run, panel + k * W);
      k += run;
    }
  }

  // Channels are planes, and neighbouring pixels mostly neighbours in memory: copy such stretches.
  template <int64_t W>
  void pack_planes(const Source& s, const int64_t* offset, int64_t rows, int64_t run,
                   float* panel) const {
    int64_t length = 1;
    for (int64_t i = 0; i < W; i += length) {
      const int64_t first = i < rows ? offset[i] : -1;
      length = 1;
      if (first < 0) {
        while (i + length < W && (i + length >= rows || offset[i + length] < 0)) ++length;
      } else {
        while (i + length < rows && offset[i + length] == first + length) ++length;
      }
      for (int64_t k = 0; k < run; ++k) {
        if (first >= 0 && length == 1)
          panel[k * W + i] = s.at(first + k * p.sc);
        else
          pack_run(s, first + k * p.sc, first < 0 ? 0 : length, length, panel + k * W + i);
      }
    }
  }
};

// Rows are taps (kh, kw, c) and the depth runs over pixels: the operand of grad_weight.
struct TapRows {
  const Patches& p;

  struct Tap {
    int64_t kh, kw, c;
  };

  int64_t offset(const Tap& t, int64_t n, int64_t oh, int64_t ow) const {
    const int64_t h = p.h[oh * p.KH + t.kh], w = p.w[ow * p.KW + t.kw];
    return h < 0 || w < 0 ? -1 : n * p.sn + h * p.sh + w * p.sw + t.c * p.sc;
  }

  template <int64_t W>
  void pack(int64_t j0, int64_t rows, int64_t k0, int64_t depth, float* panel) const {
    Tap taps[W];
    for (int64_t j = 0; j < rows; ++j) {
      const int64_t tap = (j0 + j) / p.C;
      taps[j] = {tap / p.KW, tap % p.KW, (j0 + j) % p.C};
    }
    int64_t ow = k0 % p.OW, oh = k0 / p.OW % p.OH, n = k0 / p.OW / p.OH;
    for (int64_t k = 0, step; k < depth; k += step) {
      // Columns of one output row that all taps read inside x go through one transposition.
      const bool along = p.sw == 1 && p.sc != 1 && ow >= p.w_begin && ow < p.w_end;
      step = along ? least(p.w_end - ow, depth - k) : 1;
      float* out = panel + k * W;
      if (along) {
        int64_t offsets[W];
        for (int64_t j = 0; j < rows; ++j) offsets[j] = offset(taps[j], n, oh, ow);
        pack_rows<W>({p.x, p.relu_y}, offsets, rows, step, out);
      } else {
        pack_pixel<W>(taps, rows, n, oh, ow, out);
      }
      ow += step;
      if (ow == p.OW) ow = 0, ++oh;
      if (oh == p.OH) oh = 0, ++n;
    }
  }

  // One pixel: a stretch of channels for each (kh, kw) of the panel.
  template <int64_t W>
  void pack_pixel(const Tap* taps, int64_t rows, int64_t n, int64_t oh, int64_t ow,
                  float* out) const {
    const Source s = {p.x, p.relu_y};
    for (int64_t j = 0; j < rows;) {
      const int64_t from = offset(taps[j], n, oh, ow);
      const int64_t run = p.sc == 1 ? least(p.C - taps[j].c, rows - j) : 1;
      if (run == 1)
        out[j] = from < 0 ? 0.0f : s.at(from);
      else
        pack_run(s, from, from < 0 ? 0 : run, run, out + j);
      j += run;
    }
    for (int64_t j = rows; j < W; ++j) out[j] = 0.0f;
  }
};

static void conv2d(const Patches& patches, const float* weight, bool channels_last,
                   const GemmOutput& out, const GemmPart& part, float* scratch) {
  const int64_t K = patches.KH * patches.KW * patches.C;
  const Matrix w = {weight, K, 1, nullptr};
  if (channels_last)
    gemm_part(PixelRows{patches}, MatrixRows{w}, K, out, part, scratch);
  else
    gemm_part(MatrixRows{w}, PixelRows{patches}, K, out, part, scratch);
}

static void conv2d_grad_weight(const Matrix& grad_y, const Patches& patches, int64_t pixels,
                               const GemmOutput& out, const GemmPart& part, float* scratch) {
  gemm_part(MatrixRows{grad_y}, TapRows{patches}, pixels, out, part, scratch);
}
