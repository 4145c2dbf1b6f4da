// Convolutions as matrix products on the tiles of gemm.cuh (implicit GEMM): the pixels under the
// windows are gathered while they are copied to shared memory. Channels are contiguous, those of a
// group padded to whole 16-byte accesses.
#pragma once
#include "cuda/conv2d/finish.cuh"
#include "cuda/gemm/gemm.cuh"

namespace dlkernels::cuda::conv {

// The matrix of windows: a line is a row of a pass, its numbers are (tap, channel), by which they
// are found. As A of a pass a row's numbers are summed over (kKInner), as B of grad_weight rows
// are.
template <class Type, bool kKInner_>
struct Windows {
  using T = Type;
  static constexpr bool kKInner = kKInner_;
  static constexpr int alignment = 16;

  const T* x;  // of the group, from the image of the first row on
  uint32_t image, sh, sw;
  const Pass& pass;
  const Piece& piece;
  Rows rows;
  int size;  // rows
  int numbers;
  Divider by_channels;

  // Offsets wrap where a window begins outside of its image; their sum is right where it is inside.
  struct Run {
    uint32_t offset;
    int h, w;
  };
  struct At {
    uint32_t offset;
    int h, w;
  };
  static constexpr int kOutside = -(1 << 30);  // plus the place of any tap: still negative

  __device__ Windows(const Pass& pass, const Piece& piece, const View& view, int64_t first_row,
                     int size, int channels, const Divider& by_channels)
      : image(static_cast<uint32_t>(view.sn)),
        sh(static_cast<uint32_t>(view.sh)),
        sw(static_cast<uint32_t>(view.sw)),
        pass(pass),
        piece(piece),
        rows(pass, first_row),
        size(size),
        numbers(piece.h.taps * piece.w.taps * channels),
        by_channels(by_channels) {
    x = static_cast<const T*>(view.data) + rows.first_image * view.sn + piece.group * view.sg;
  }

  __device__ bool is_row(const Place& p) const {
    return p.n < rows.images && p.a < piece.h.count && p.b < piece.w.count;
  }
  __device__ Run run(int64_t i) const {
    const Place p = rows.place(pass, static_cast<int>(i));
    const int h = piece.h.input(p.a), w = piece.w.input(p.b);
    return {p.n * image + h * sh + w * sw, (kKInner ? is_row(p) : i < size) ? h : kOutside, w};
  }
  __device__ At at(int64_t j) const {
    const int tap = by_channels.divide(static_cast<int>(j));
    const int c = by_channels.remainder(static_cast<int>(j), tap);
    const int th = piece.w.by_taps.divide(tap), tw = piece.w.by_taps.remainder(tap, th);
    const int h = th * piece.h.step, w = tw * piece.w.step;
    return {h * sh + w * sw + c, j < numbers ? h : kOutside, w};
  }
  __device__ Access<T> access(const Run& run, const At& at) const {
    // kOutside twice is -2^31, which no int is below.
    const int h = run.h + at.h, w = run.w + at.w;
    if (!piece.h.inside(h) || !piece.w.inside(w)) return {x, 0};
    return {x + (run.offset + at.offset), Pack<T>::kSize};
  }
};

// Weights (K, KH, KW, padded channels) as B of a gradient: a line is (tap, o) of those taps that
// the gather meets, its numbers are the channels of x.
template <class Type>
struct GradientWeights {
  using T = Type;
  static constexpr bool kKInner = false;
  static constexpr int alignment = 16;

  const T* weight;  // of the group
  const Piece& piece;
  int taps_w, summed, padded, of_output, size;  // of_output: weights an o; size: lines
  Divider by_summed;                            // padded

  using Run = int;  // where it begins, -1 where there is none
  using At = int;

  __device__ Run run(int64_t i) const {
    const int tap = by_summed.divide(static_cast<int>(i));
    const int o = by_summed.remainder(static_cast<int>(i), tap);
    if (i >= size || o >= summed) return -1;
    const int th = piece.w.by_taps.divide(tap), tw = piece.w.by_taps.remainder(tap, th);
    const int h = piece.h.tap + th * piece.h.tap_step, w = piece.w.tap + tw * piece.w.tap_step;
    return o * of_output + (h * taps_w + w) * padded;
  }
  __device__ At at(int64_t j) const { return static_cast<int>(j); }
  __device__ Access<T> access(Run run, At at) const {
    if (run < 0 || at >= padded) return {weight, 0};
    return {weight + (run + at), Pack<T>::kSize};
  }
};

// f(staged row m, first channel n, sums) for each run of channels of each row of a staged tile, or
// of each window of four rows. Neighbouring threads take neighbouring runs, or rows.
template <class Tile, int kRows, int kRun, class F>
__device__ void each_run(const float* staged, bool runs_first, const F& f) {
  constexpr int kRuns = Tile::kN / kRun, kUnits = Tile::kM / kRows;
  for (int i = threadIdx.x; i < kRuns * kUnits; i += Tile::kThreads) {
    const int m = (runs_first ? i / kRuns : i % kUnits) * kRows;
    const int n = (runs_first ? i % kRuns : i / kUnits) * kRun;
    float sums[kRows][kRun];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int p = 0; p < kRun; p += 4) {
        const auto four =
            *reinterpret_cast<const Pack<float>*>(staged + (m + r) * Tile::kStagedRow + n + p);
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[r][p + j] = four.values[j];
      }
    f(m, n, sums);
  }
}

struct GemmPass {
  Pass pass;
  View x;
  const void* weight;
  int64_t padded_summed, padded_C;  // channels a group; C are those of the convolution's input
  Finish finish;
  Divider by_summed;
  int channel_tiles;

  GemmPass(const Pass& pass, const View& x, const void* weight, int64_t padded_summed,
           int64_t padded_C, const Finish& finish)
      : pass(pass),
        x(x),
        weight(weight),
        padded_summed(padded_summed),
        padded_C(padded_C),
        finish(finish),
        by_summed(padded_summed),
        channel_tiles(0) {}
};

template <class Tile, Math kMath, bool kGradient, class T>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    gemm_pass_kernel(const __grid_constant__ GemmPass g) {
  const Piece piece(g.pass, g.channel_tiles, blockIdx.x, kGradient);
  const int64_t m0 = piece.row_tile * Tile::kM;
  const int n0 = piece.channel_tile * Tile::kN;
  const Windows<T, true> a(g.pass, piece, g.x, m0, Tile::kM, static_cast<int>(g.padded_summed),
                           g.by_summed);
  const int steps = (a.numbers + 128 / int{sizeof(T)} - 1) / (128 / int{sizeof(T)});
  const T* const weight = static_cast<const T*>(g.weight);
  const int64_t taps = int64_t{g.pass.h.taps} * g.pass.w.taps, of_output = taps * g.padded_C;
  Accumulators<Tile, false> acc;
  if constexpr (kGradient) {
    const GradientWeights<T> b = {weight + piece.group * g.pass.summed * of_output,
                                  piece,
                                  g.pass.w.taps,
                                  g.pass.summed,
                                  static_cast<int>(g.padded_C),
                                  static_cast<int>(of_output),
                                  a.numbers,
                                  g.by_summed};
    multiply_tile<Tile, kMath>(acc, a, b, 0, n0, 0, steps, false);
  } else {
    const MatrixSource<T, true> b = {weight + piece.group * g.pass.written * of_output, of_output,
                                     g.pass.written, of_output, 16};
    multiply_tile<Tile, kMath>(acc, a, b, 0, n0, 0, steps, false);
  }

  const float* const staged = stage_tile<Tile>(acc);
  const auto place_of = [&](int m, Place& p) { return a.is_row(p = a.rows.place(g.pass, m)); };
  const bool runs_first = g.finish.y.sc == 1;
  constexpr int kRun = Pack<T>::kSize;
  Place p;
  if (g.pass.pool == 2) {
    each_run<Tile, 4, kRun>(staged, runs_first, [&](int m, int n, float (&sums)[4][kRun]) {
      const int left = min(g.pass.written - n0 - n, kRun);
      if (left > 0 && place_of(m, p))
        g.finish.template put_window<T>(g.pass, piece, a.rows.first_image + p.n, p, n0 + n, left,
                                        sums);
    });
  } else {
    each_run<Tile, 1, kRun>(staged, runs_first, [&](int m, int n, float (&sums)[1][kRun]) {
      const int left = min(g.pass.written - n0 - n, kRun);
      if (left > 0 && place_of(m, p))
        g.finish.template put<T>(piece, a.rows.first_image + p.n, p, n0 + n, left, sums[0]);
    });
  }
}

// partials[split][o][tap][channel], K x KH KW padded_C: the sums over a part of the rows.
struct GemmWeight {
  Pass pass;  // forward
  View x, grad_y;
  int64_t padded_C, padded_K;
  float* partials;
  int64_t splits, rows_a_split;
  Divider by_channels;
  int row_tiles = 0, column_tiles = 0;

  GemmWeight(const Pass& pass, const View& x, const View& grad_y, int64_t padded_C,
             int64_t padded_K, float* partials, int64_t splits, int64_t rows_a_split)
      : pass(pass),
        x(x),
        grad_y(grad_y),
        padded_C(padded_C),
        padded_K(padded_K),
        partials(partials),
        splits(splits),
        rows_a_split(rows_a_split),
        by_channels(padded_C) {}
};

template <class Tile, Math kMath, class T>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    gemm_weight_kernel(const __grid_constant__ GemmWeight g) {
  const Piece piece(g.pass, g.column_tiles * g.row_tiles, blockIdx.x, false);
  const int64_t split = piece.row_tile, begin = split * g.rows_a_split;
  const int64_t left = g.pass.rows() - begin;
  const auto size = static_cast<int>(left < 0 ? 0 : min(g.rows_a_split, left));
  const int m0 = piece.channel_tile % g.row_tiles * Tile::kM;
  const int n0 = piece.channel_tile / g.row_tiles * Tile::kN;
  const int64_t pixel = g.grad_y.sw;
  const MatrixSource<T, false> a = {
      static_cast<const T*>(g.grad_y.data) + begin * pixel + piece.group * g.grad_y.sg, pixel, size,
      g.padded_K, 16};
  const Windows<T, false> b(g.pass, piece, g.x, begin, size, static_cast<int>(g.padded_C),
                            g.by_channels);
  Accumulators<Tile, false> acc;
  multiply_tile<Tile, kMath>(acc, a, b, m0, n0, 0,
                             static_cast<int>(ceil_div(size, 128 / int{sizeof(T)})), false);
  float* const to = g.partials + (split * g.pass.groups + piece.group) * g.pass.written * b.numbers;
  each_run<Tile, 1, 4>(stage_tile<Tile>(acc), true, [&](int m, int n, float (&sums)[1][4]) {
    if (m0 + m < g.pass.written && n0 + n < b.numbers)
      store_channels<float>(to + int64_t{m0 + m} * b.numbers + n0 + n, 1, sums[0], 4, true);
  });
}

// ---- launches ---------------------------------------------------------------------------------

// Most layers write 64 channels, or a multiple. Exact float32 takes more registers than a product
// of matrices does, for the places of windows, and so much time that small tiles do.
template <class T, Math kMath>
constexpr bool kSlow = sizeof(T) == 4 && kMath == Math::kExact;
template <class T, Math kMath>
using SmallTile =
    std::conditional_t<sizeof(T) == 4, Tile<128, 64, 32, 32, 4, kSlow<T, kMath> ? 1 : 2>,
                       Tile<128, 64, 64, 32, 4, 2>>;
template <class T, bool kGradient>
using WideTile = std::conditional_t<sizeof(T) == 4 || kGradient, Tile<128, 128, 64, 32, 3, 1>,
                                    Tile<128, 128, 64, 64, 3, 2>>;
using WeightTile = Tile<64, 64, 32, 32, 4, 2>;

// f(the math that a float32 product may take): for reduced floats there is one.
template <class T, class F>
Error with_math(bool allow_tf32, const F& f) {
  if constexpr (sizeof(T) == 4)
    if (allow_tf32) return f(std::integral_constant<Math, Math::kTF32>());
  return f(std::integral_constant<Math, Math::kExact>());
}

template <class T, bool kGradient>
Error gemm_pass_of(GemmPass& g, bool allow_tf32, Stream stream) {
  return with_math<T>(allow_tf32, [&](auto math) {
    const auto launch_tile = [&]<class Tile>(Tile) {
      g.channel_tiles = static_cast<int>(ceil_div(g.pass.written, Tile::kN));
      const int64_t tiles =
          ceil_div(g.pass.rows(), Tile::kM) * g.pass.gathers() * g.pass.groups * g.channel_tiles;
      return launch(gemm_pass_kernel<Tile, math(), kGradient, T>, static_cast<unsigned>(tiles),
                    Tile::kThreads, Tile::kShared, stream, g);
    };
    if constexpr (!kSlow<T, math()>)
      if (g.pass.written > 64) return launch_tile(WideTile<T, kGradient>());
    return launch_tile(SmallTile<T, math()>());
  });
}
template <class T>
Error gemm_pass(GemmPass g, bool allow_tf32, Stream stream) {
  return g.pass.gradient ? gemm_pass_of<T, true>(g, allow_tf32, stream)
                         : gemm_pass_of<T, false>(g, allow_tf32, stream);
}

// How many blocks a sum over the rows takes, if they are not cut.
template <class T>
int64_t gemm_weight_blocks(int64_t groups, int64_t K, int64_t columns, bool allow_tf32) {
  const int64_t side = K <= 64 || (sizeof(T) == 4 && !allow_tf32) ? 64 : 128;
  return groups * ceil_div(K, side) * ceil_div(columns, side);
}

template <class T>
Error gemm_weight(GemmWeight g, bool allow_tf32, Stream stream) {
  const int64_t columns = int64_t{g.pass.h.taps} * g.pass.w.taps * g.padded_C;
  return with_math<T>(allow_tf32, [&](auto math) {
    const auto launch_tile = [&]<class Tile>(Tile) {
      g.row_tiles = static_cast<int>(ceil_div(g.pass.written, Tile::kM));
      g.column_tiles = static_cast<int>(ceil_div(columns, Tile::kN));
      const int64_t blocks = int64_t{g.row_tiles} * g.column_tiles * g.pass.groups * g.splits;
      return launch(gemm_weight_kernel<Tile, math(), T>, static_cast<unsigned>(blocks),
                    Tile::kThreads, Tile::kShared, stream, g);
    };
    if constexpr (!kSlow<T, math()>)
      if (g.pass.written > 64) return launch_tile(WideTile<T, false>());
    return launch_tile(WeightTile());
  });
}

}  // namespace dlkernels::cuda::conv
