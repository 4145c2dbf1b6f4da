// The one GEMM: C[m, n] = act(sum_k A[m, k] * B[n, k] + bias), for any two operands that can pack
// themselves into panels (pack.inl.h), from packed panels in cache to a tile in registers. The
// sum over k runs in blocks of kDepth, each in order, whatever the part: same bits always.

constexpr int64_t kTileCols = kTileVecs * Vec::kWidth;
constexpr int64_t kDepth = 256;                 // a panel of B (kTileCols wide) stays in L1
constexpr int64_t kBlockRows = 12 * kTileRows;  // a block of A and a block of B share L2
constexpr int64_t kBlockCols = 16 * kTileCols;
constexpr int64_t kGemmScratch = (kBlockRows + kBlockCols) * kDepth;

// Which part of a tile's sum this is.
struct Step {
  bool first, last;
};

// One tile of C, R rows by V vectors of which `cols` columns exist: A's panel broadcast against
// B's, then the epilogue.
template <int R, int V>
static void gemm_tile(const float* a, const float* b, int64_t depth, const GemmOutput& out,
                      int64_t m, int64_t n, int64_t cols, Step step) {
  Vec acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[r][v] = Vec::zero();

  for (int64_t k = 0; k < depth; ++k, a += kTileRows, b += kTileCols) {
    Vec bk[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) bk[v] = Vec::load(b + v * Vec::kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec ak = Vec::fill(a[r]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[r][v] = fma(ak, bk[v], acc[r][v]);
    }
  }

#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    const int64_t n0 = n + v * Vec::kWidth, lanes = least(cols - v * Vec::kWidth, Vec::kWidth);
    Vec col_bias = Vec::zero();
    if (step.last && out.col_bias) col_bias = Vec::load(out.col_bias + n0, lanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      float* c = out.c + (m + r) * out.row + n0;
      Vec z = acc[r][v];
      if (!step.first || out.accumulate) z = z + load(c, lanes);
      if (step.last) {
        if (out.row_bias) z = z + Vec::fill(out.row_bias[m + r]);
        z = z + col_bias;
        if (out.relu) z = max(Vec::zero(), z);  // this order keeps NaN and -0.0
      }
      store(z, c, lanes);
    }
  }
}

// The tile for the rows that exist; a tile one vector wide where one is enough.
template <int R = kTileRows>
static void gemm_tile(int64_t rows, const float* a, const float* b, int64_t depth,
                      const GemmOutput& out, int64_t m, int64_t n, int64_t cols, Step step) {
  if constexpr (R > 1)
    if (rows < R) return gemm_tile<R - 1>(rows, a, b, depth, out, m, n, cols, step);
  if (cols > Vec::kWidth)
    gemm_tile<R, 2>(a, b, depth, out, m, n, cols, step);
  else
    gemm_tile<R, 1>(a, b, depth, out, m, n, cols, step);
}
static_assert(kTileVecs == 2);

// row_sums[m] from A's packed panel, which is still in cache: sums of 16 first, for their error.
static void sum_panel(const float* panel, int64_t rows, int64_t depth, float* sums, bool add) {
  for (int64_t i = 0; i < rows; i += Vec::kWidth) {
    const int64_t lanes = least(rows - i, Vec::kWidth);
    Vec total = Vec::zero();
    for (int64_t k = 0; k < depth;) {
      Vec part = Vec::zero();
      for (const int64_t end = least(depth, k + 16); k < end; ++k)
        part = part + Vec::load(panel + k * kTileRows + i, lanes);
      total = total + part;
    }
    if (add) total = total + Vec::load(sums + i, lanes);
    total.store(sums + i, lanes);
  }
}

template <class A, class B>
static void gemm_part(const A& a, const B& b, int64_t K, const GemmOutput& out,
                      const GemmPart& part, float* scratch) {
  float* const a_block = scratch;
  float* const b_block = scratch + kBlockRows * kDepth;
  int64_t n = part.n0;
  do {  // once at least: an empty C may still want row_sums
    const int64_t cols = least(part.n1 - n, kBlockCols);
    int64_t k = 0;
    do {  // once at least: an empty sum still has its bias
      const int64_t depth = least(K - k, kDepth);
      const Step step = {k == 0, k + depth >= K};
      for (int64_t j = 0; j < cols; j += kTileCols)
        b.template pack<kTileCols>(n + j, least(cols - j, kTileCols), k, depth,
                                   b_block + j * depth);
      for (int64_t m = part.m0; m < part.m1; m += kBlockRows) {
        const int64_t rows = least(part.m1 - m, kBlockRows);
        for (int64_t i = 0; i < rows; i += kTileRows) {
          float* panel = a_block + i * depth;
          const int64_t have = least(rows - i, kTileRows);
          a.template pack<kTileRows>(m + i, have, k, depth, panel);
          if (out.row_sums && n == 0)
            sum_panel(panel, have, depth, out.row_sums + m + i, !step.first || out.accumulate);
        }
        for (int64_t j = 0; j < cols; j += kTileCols)
          for (int64_t i = 0; i < rows; i += kTileRows)
            gemm_tile(least(rows - i, kTileRows), a_block + i * depth, b_block + j * depth, depth,
                      out, m + i, n + j, least(cols - j, kTileCols), step);
      }
      k += depth;
    } while (k < K);
    n += kBlockCols;
  } while (n < part.n1);
}

static void gemm(const Matrix& a, const Matrix& b, int64_t K, const GemmOutput& out,
                 const GemmPart& part, float* scratch) {
  gemm_part(MatrixRows{a}, MatrixRows{b}, K, out, part, scratch);
}

static void sum_rows(const float* x, int64_t rows, int64_t n, float* y, int64_t begin,
                     int64_t end) {
  each_vector(begin, end, [&](int64_t i, int64_t lanes) {
    Vec total = Vec::zero();
    for (int64_t r = 0; r < rows; ++r) total = total + load(x + r * n + i, lanes);
    store(total, y + i, lanes);
  });
}
