// The register tile that every product here is made of: C[r, v] += sum_k A[r, k] * B[k, v], R
// elements of A broadcast against V vectors of B. R * V accumulators stay in registers.

template <int R, int V>
struct Tile {
  Vec c[R][V];

  Tile() {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) c[r][v] = Vec::zero();
  }

  // A's rows side by side, a step apart for each k: a packed panel, or columns of a matrix.
  __attribute__((always_inline)) void add_columns(const float* a, int64_t a_step, const float* b,
                                                  int64_t b_step, int64_t depth) {
    for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_step)
      add(b, [&](int r) { return a[r]; });
  }

  // A's rows `pitch` apart, each along memory. Three rows share a pointer: x86 adds one or two
  // times the pitch for free.
  __attribute__((always_inline)) void add_rows(const float* a, int64_t pitch, const float* b,
                                               int64_t b_step, int64_t depth) {
    const float* p[(R + 2) / 3];
#pragma GCC unroll 5
    for (int g = 0; g < (R + 2) / 3; ++g) p[g] = a + 3 * g * pitch;
    for (int64_t k = 0; k < depth; ++k, b += b_step) {
      add(b, [&](int r) { return p[r / 3][r % 3 * pitch]; });
#pragma GCC unroll 5
      for (int g = 0; g < (R + 2) / 3; ++g) ++p[g];
    }
  }

 private:
  template <class A>
  __attribute__((always_inline)) void add(const float* b, const A& a) {
    Vec bk[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) bk[v] = Vec::load(b + v * Vec::kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec ak = Vec::fill(a(r));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) c[r][v] = fma(ak, bk[v], c[r][v]);
    }
  }
};
