// GEMM: C[m, n] = act(sum_k A[m, k] * B[n, k] + bias).
// Register tiles read an operand in place where its rows or (A) its columns are contiguous.
// Strided, masked and reduced-float operands are packed into panels first (pack.inl.h).
// Deterministic: the order of every sum depends on the shape alone.
// Multiply-adds bound it: 80 to 90 % of the FMA peak on large shapes.
#pragma once
#include "cpu/simd/vec.h"
#include "cpu/gemm/pack.inl.h"
#include "cpu/gemm/tile.inl.h"

namespace dlkernels::cpu {
namespace {

constexpr int64_t kDepth = 512;  // at most: a longer sum makes fewer passes over C
// A block of A stays in L2. Its panels are whole vectors wide, since stores of parts are slow.
constexpr int64_t kBlockTiles = 12, kPanelRows = round_up(kTileRows);
constexpr int64_t kBlockRows = kBlockTiles * kPanelRows;
constexpr int64_t kBlockCols = 512;             // of B: as many meet an element of A that is packed
constexpr int64_t kShortCols = 16 * kTileCols;  // where sums are so short that B stays in L1
constexpr int64_t kSums = 1 << 18;              // floats that are still to be rounded
constexpr int64_t kGemmScratch = (kBlockRows + kBlockCols) * kDepth + kSums;

// Element (i, k) of a tile's operand is p[i * row + k * col]: packed, or in place.
struct View {
  const float* p;
  int64_t row, col;
};

// One tile of C, R rows by V vectors of which `cols` columns exist.
template <int R, int V>
static void gemm_tile(View a, View b, int64_t depth, const GemmOutput& out, int64_t m, int64_t n,
                      int64_t cols, Step step) {
  Tile<R, V> tile;
  if (a.row == 1)
    tile.add_columns(a.p, a.col, b.p, b.col, depth);
  else
    tile.add_rows(a.p, a.row, b.p, b.col, depth);
  tile.store(out, m, n, cols, step);
}

// The tile for the rows that exist; one vector wide where that is enough, and wide for one or two
// rows, which would wait for their own sums otherwise.
constexpr int64_t kWideVecs = 8, kWideCols = kWideVecs * Vec::kWidth;
static void gemm_tile(int64_t rows, View a, View b, int64_t depth, const GemmOutput& out, int64_t m,
                      int64_t n, int64_t cols, Step step) {
  with_rows(rows, [&]<int R>() {
    if (R <= 2 && cols == kWideCols)
      gemm_tile<R, R <= 2 ? kWideVecs : 2>(a, b, depth, out, m, n, cols, step);
    else if (cols > Vec::kWidth)
      gemm_tile<R, 2>(a, b, depth, out, m, n, cols, step);
    else
      gemm_tile<R, 1>(a, b, depth, out, m, n, cols, step);
  });
}

// row_sums[m] from a tile's packed rows: sums of 16 first, for their
// error.
static void sum_columns(View a, int64_t rows, int64_t depth, float* sums, bool add) {
  for (int64_t i = 0; i < rows; i += Vec::kWidth) {
    const int64_t lanes = min(rows - i, Vec::kWidth);
    Vec total = Vec::zero();
    for (int64_t k = 0; k < depth;) {
      Vec short_sum = Vec::zero();
      for (const int64_t end = min(depth, k + 16); k < end; ++k)
        short_sum = short_sum + load(a.p + k * a.col + i, lanes);
      total = total + short_sum;
    }
    if (add) total = total + load(sums + i, lanes);
    store(total, sums + i, lanes);
  }
}

// How much of the depth is packed at a time, all panels of a block: little where the operand's
// columns are contiguous, so that each page is read once.
static int64_t pack_step(const Matrix& x) { return x.row == 1 ? 16 : kDepth; }

// Panels of W for rows [i0, i0 + rows), `step` rows in each.
template <int64_t W>
static void pack_block(const Matrix& x, int64_t i0, int64_t rows, int64_t step, int64_t k0,
                       int64_t depth, float* panels) {
  const int64_t step_k = pack_step(x);
  with_type(x.dtype, [&]<class T>() {
    const MaskedInput<T> s(x.data, x.relu_y);
    for (int64_t k = 0; k < depth; k += step_k) {
      float* p = panels + k * W;
      for (int64_t i = 0; i < rows; i += step, p += depth * W)
        pack_panel<W>(s, (i0 + i) * x.row + (k0 + k) * x.col, x.row, x.col, min(rows - i, step),
                      min(depth - k, step_k), p);
    }
  });
}

// The same elements converted to float32 and masked, in the operand's own order.
static void convert_block(const Matrix& x, int64_t i0, int64_t rows, int64_t k0, int64_t depth,
                          float* to) {
  const bool columns = x.row == 1;
  const int64_t lines = columns ? depth : rows, size = columns ? rows : depth;
  const int64_t from = i0 * x.row + k0 * x.col, pitch = columns ? x.col : x.row;
  with_type(x.dtype, [&]<class T>() {
    const MaskedInput<T> s(x.data, x.relu_y);
    for (int64_t i = 0; i < lines; ++i) pack_run(s, from + i * pitch, size, size, to + i * size);
  });
}

// Whether tiles read an operand in place, given the columns or rows of the other operand. They do
// so for few of those, and where the operand's cache lines are consecutive. AVX-512's tiles read
// two cache lines of each row of B and most of one of A's columns. That is as fast as packing
// (measured on Zen 5), unless the rows are a large power of two apart and share a few sets of the
// cache. For smaller tiles a smaller power is enough.
constexpr int64_t kFew = 4;  // tiles
constexpr bool kWholeLines = kTileCols >= 32;
static bool conflicts(int64_t pitch) { return pitch % (kWholeLines ? 4096 : 512) == 0; }
static bool a_is_in_place(const Matrix& a, const GemmOutput& out, int64_t cols) {
  if (a.dtype != DType::kFloat32 || a.relu_y) return false;
  if (a.row != 1) return a.col == 1 && !out.row_sums;
  return min(cols, a.col) <= kFew * kTileCols || (kWholeLines && !conflicts(a.col));
}
static bool b_is_in_place(const Matrix& b, int64_t rows) {
  if (b.dtype != DType::kFloat32 || b.relu_y || b.row != 1) return false;
  return rows <= kFew * kTileRows || b.col <= kFew * kTileCols ||
         (!conflicts(b.col) && (kWholeLines || rows <= kBlockTiles * kTileRows));
}

// The size of the parts of C for so many threads, a fraction where products share them: a few for
// each, for one that is held up. Along M where B is not packed, and where sums are short, which is
// mostly writing: a thread that writes whole rows took a third of the time. Else along N, as far as
// no part packs an element of A that another would pack anyway, and then along M.
static GemmSize gemm_chunk_size(const Matrix& a, const Matrix& b, int64_t M, int64_t N, int64_t K,
                                const GemmOutput& out, double threads) {
  constexpr int64_t kPartsPerThread = 4, kPartTiles = 4, kShort = 64;
  const int64_t rows = max(ceil_div(M, kTileRows), 1), cols = max(ceil_div(N, kTileCols), 1);
  const bool by_rows = K <= kShort || b_is_in_place(b, M), a_is_read = a_is_in_place(a, out, N);
  const int64_t tiles = by_rows ? rows : max(cols, rows * cols / kPartTiles);
  const int64_t fewest = max(static_cast<int64_t>(threads + 0.5), 1);
  const int64_t parts =
      max(min(static_cast<int64_t>(kPartsPerThread * threads), tiles / kPartTiles), fewest);
  const int64_t free_n = max(a_is_read ? cols / kPartTiles : ceil_div(N, kBlockCols), 1);
  const int64_t enough = a_is_read ? 48 : 8;  // rows of tiles, for which B is packed once more
  const int64_t parts_m =
      min(by_rows ? parts : max(min(parts / free_n, rows / enough), ceil_div(fewest, cols)), rows);
  const int64_t parts_n = min(parts / parts_m, cols);
  return {max(ceil_div(M, parts_m), 1), ceil_div(cols, parts_n) * kTileCols};
}

// Into float32.
static void gemm_float32(const Matrix& a, const Matrix& b, int64_t K, const GemmOutput& out,
                         const GemmChunk& chunk, float* scratch) {
  // Contiguous rows or columns of reduced floats are converted in their own order.
  const bool converts = a.dtype != DType::kFloat32 && (a.row == 1 || (a.col == 1 && !out.row_sums));
  const bool a_is_read = a_is_in_place(a, out, chunk.n1 - chunk.n0);
  const bool b_is_read = b_is_in_place(b, chunk.m1 - chunk.m0);
  const float* const a_data = static_cast<const float*>(a.data);
  const float* const b_data = static_cast<const float*>(b.data);
  float *const a_block = scratch, *const b_block = scratch + kBlockRows * kDepth;
  // Tiles of even height, depth alike: 15 rows are 8 and 7, not 14 and 1.
  const int64_t M = chunk.m1 - chunk.m0;
  const int64_t tile_rows = M > 0 ? ceil_div(M, ceil_div(M, kTileRows)) : 1;
  const int64_t block_rows = kBlockTiles * tile_rows;
  const int64_t block_depth = K > 0 ? ceil_div(ceil_div(K, ceil_div(K, kDepth)), 16) * 16 : 0;
  const bool is_short = block_depth * kShortCols <= kDepth * kTileCols;
  const int64_t block_cols = b_is_read ? chunk.n1 - chunk.n0 : is_short ? kShortCols : kBlockCols;

  int64_t n = chunk.n0;
  do {  // once at least: an empty C may still want row_sums
    const int64_t cols = min(chunk.n1 - n, block_cols);
    // Tiles read whole vectors, so the last columns of B are packed even where the others are read
    // in place.
    const int64_t whole = b_is_read ? cols / kTileCols * kTileCols : 0;
    int64_t k = 0;
    do {  // once at least: an empty sum still has its bias
      const int64_t depth = min(K - k, block_depth);
      const Step step = {k == 0, k + depth >= K};
      pack_block<kTileCols>(b, n + whole, cols - whole, kTileCols, k, depth, b_block);
      for (int64_t m = chunk.m0; m < chunk.m1; m += block_rows) {
        const int64_t rows = min(chunk.m1 - m, block_rows);
        if (converts)
          convert_block(a, m, rows, k, depth, a_block);
        else if (!a_is_read)
          pack_block<kPanelRows>(a, m, rows, tile_rows, k, depth, a_block);
        const auto a_view = [&](int64_t i) -> View {
          if (a_is_read) return {a_data + (m + i) * a.row + k * a.col, a.row, a.col};
          if (!converts) return {a_block + i / tile_rows * kPanelRows * depth, 1, kPanelRows};
          if (a.row == 1) return {a_block + i, 1, rows};
          return {a_block + i * depth, depth, 1};
        };
        if (out.row_sums && n == 0)
          for (int64_t i = 0; i < rows; i += tile_rows)
            sum_columns(a_view(i), min(rows - i, tile_rows), depth, out.row_sums + m + i,
                        !step.first || out.accumulate);
        const auto tile = [&](int64_t i, int64_t j, int64_t max_cols) {
          const View b_view = j < whole ? View{b_data + n + j + k * b.col, 1, b.col}
                                        : View{b_block + (j - whole) * depth, 1, kTileCols};
          gemm_tile(min(rows - i, tile_rows), a_view(i), b_view, depth, out, m + i, n + j,
                    min(cols - j, max_cols), step);
        };
        // A short sum is mostly writing: then along the rows of C. Otherwise B's panel stays in L1.
        if (depth * cols <= kDepth * kTileCols) {
          for (int64_t i = 0; i < rows; i += tile_rows)
            for (int64_t j = 0; j < cols; j += kTileCols) tile(i, j, kTileCols);
        } else {
          int64_t j = 0;
          if (tile_rows <= 2)
            for (; j + kWideCols <= whole; j += kWideCols) tile(0, j, kWideCols);
          for (; j < cols; j += kTileCols)
            for (int64_t i = 0; i < rows; i += tile_rows) tile(i, j, kTileCols);
        }
      }
      k += depth;
    } while (k < K);
    n += cols;
  } while (n < chunk.n1);
}

// Without the first i rows.
static Matrix rows_from(Matrix m, int64_t i) {
  with_type(m.dtype, [&]<class T>() {
    m.data = static_cast<const T*>(m.data) + i * m.row;
    if (m.relu_y) m.relu_y = static_cast<const T*>(m.relu_y) + i * m.row;
  });
  return m;
}

static void gemm(const Matrix& a, const Matrix& b, int64_t K, const GemmOutput& out,
                 const GemmChunk& chunk, float* scratch) {
  if (out.dtype == DType::kFloat32) return gemm_float32(a, b, K, out, chunk, scratch);
  float* const sums = scratch + (kBlockRows + kBlockCols) * kDepth;
  int64_t n = chunk.n0;
  do {  // once at least: an empty C may still want row_sums
    const int64_t cols = min(chunk.n1 - n, kBlockCols);
    for (int64_t m = chunk.m0, rows; m < chunk.m1; m += rows) {
      rows = min(chunk.m1 - m, kSums / kBlockCols);
      const GemmOutput wide = {.c = sums,
                               .row = cols,
                               .row_bias = out.row_bias ? out.row_bias + m : nullptr,
                               .col_bias = out.col_bias ? out.col_bias + n : nullptr,
                               .relu = out.relu,
                               .row_sums = out.row_sums && n == 0 ? out.row_sums + m : nullptr};
      gemm_float32(rows_from(a, m), rows_from(b, n), K, wide, {0, rows, 0, cols}, scratch);
      with_type(out.dtype, [&]<class T>() {
        T* const c = static_cast<T*>(out.c) + m * out.row + n;
        for (int64_t i = 0; i < rows; ++i)
          pack_run(MaskedInput<float>(sums), i * cols, cols, cols, c + i * out.row);
      });
    }
    n += cols;
  } while (n < chunk.n1);
}

static void sum_rows(const float* x, int64_t rows, int64_t n, float* y, int64_t begin,
                     int64_t end) {
  each_vector(begin, end, [&](int64_t i, int64_t lanes) {
    Vec total = Vec::zero();
    for (int64_t r = 0; r < rows; ++r) total = total + load(x + r * n + i, lanes);
    store(total, y + i, lanes);
  });
}

}  // namespace
}  // namespace dlkernels::cpu
