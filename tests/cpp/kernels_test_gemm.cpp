#include <utility>

#include "reduced_float.h"

using namespace dlkernels;
using namespace dlkernels::test;

// Chunks are not empty, and not too many.
static int chunks(const cpu::Kernels& t, const cpu::Matrix& a, const cpu::Matrix& b, int64_t M,
                  int64_t N, int64_t K, const cpu::GemmOutput& out) {
  int wrong = 0;
  for (const double threads : {0.4, 2.0, 64.0}) {
    const auto [m, n] = t.gemm_chunk_size(a, b, M, N, K, out, threads);
    const bool some = m > 0 && n > 0;
    wrong += !some || ((M + m - 1) / m) * ((N + n - 1) / n) > std::fmax(1, 4 * threads);
  }
  return wrong;
}

// One product in three chunks against a double-precision loop. Bits of `options`: A is
// transposed, B is transposed, A is masked, biases and ReLU, accumulate (into float), row sums.
template <class T>
static int product(const cpu::Kernels& t, int64_t M, int64_t N, int64_t K, int options) {
  const bool a_t = options & 1, b_t = options & 2, masked = options & 4, act = options & 8;
  const bool accumulate = options & 16 && kDType<T> == DType::kFloat32, sums_wanted = options & 32;
  Buffer<T> a(M * K, 1), mask(masked ? M * K : 0, 2), b(N * K, 3), c(M * N, 4);
  Buffer<float> row_bias(M, 5), col_bias(N, 6), sums(M, 7);
  std::vector<T> before(c.data(), c.data() + M * N);
  std::vector<float> sums_before(sums.data(), sums.data() + M);
  const cpu::Matrix A = {a.data(), a_t ? 1 : K, a_t ? M : 1, masked ? mask.data() : nullptr,
                         kDType<T>};
  const cpu::Matrix B = {b.data(), b_t ? 1 : K, b_t ? N : 1, nullptr, kDType<T>};
  cpu::GemmOutput out = {.c = c.data(), .row = N, .relu = act, .accumulate = accumulate};
  out.dtype = kDType<T>;
  if (act) out.row_bias = row_bias.data(), out.col_bias = col_bias.data();
  if (sums_wanted) out.row_sums = sums.data();

  int wrong = 0;
  const auto check = [&](const char* name) {
    const double tolerance = 1.2e-7 * (K + 4);
    for (int64_t i = 0; i < M; ++i) {
      const auto at = [&](int64_t k) {
        const int64_t j = i * A.row + k * A.col;
        return masked && mask[j] <= 0 ? 0.0 : static_cast<double>(a[j]);
      };
      double row = accumulate ? sums_before[i] : 0;
      for (int64_t k = 0; k < K; ++k) row += at(k);
      if (!sums_wanted) row = sums_before[i];
      wrong += !close(sums[i], row, tolerance);
      for (int64_t j = 0; j < N; ++j) {
        double z = accumulate ? static_cast<double>(before[i * N + j]) : 0;
        for (int64_t k = 0; k < K; ++k) z += at(k) * b[j * B.row + k * B.col];
        if (act) z = std::fmax(0, z + row_bias[i] + col_bias[j]);
        wrong += !close(c[i * N + j], z, tolerance + rounding<T>(z));
      }
    }
    if (wrong)
      std::printf("%s dtype %d M=%ld N=%ld K=%ld %d: %d\n", name, int(kDType<T>), long(M), long(N),
                  long(K), options, wrong);
  };

  wrong += chunks(t, A, B, M, N, K, out);
  const auto in_parts = [&](const auto& run) {
    const int64_t m = M / 2, n = (N + 2) / 3;  // parts may begin anywhere
    together([&] { run({0, m, 0, N}); }, [&] { run({m, M, 0, n}); },
             [&] {
               if (n < N) run({m, M, n, N});
             });
  };
  in_parts([&](const cpu::GemmChunk& chunk) {
    Buffer<float> scratch(t.gemm_scratch);
    t.gemm(A, B, K, out, chunk, scratch.data());
  });
  check("gemm");
  if (a_t || b_t || masked || sums_wanted) return wrong;
  for (int64_t i = 0; i < M * N; ++i) c[i] = before[i];
  in_parts([&](const cpu::GemmChunk& chunk) { t.gemm_dot(A, B, K, out, chunk); });
  check("gemm_dot");
  return wrong;
}

static int gemm(const cpu::Kernels& t) {
  int wrong = 0, options = 0, tested = 0;
  const auto test = [&](int64_t M, int64_t N, int64_t K, int options) {
    wrong += product<float>(t, M, N, K, options) != 0;
    if (++tested % 4 == 0) wrong += product<BFloat16>(t, M, N, K, options) != 0;
    if (tested % 4 == 1) wrong += product<Float16>(t, M, N, K, options) != 0;
  };
  // Every M and N with some K, every K with some M and N, all of them nothing once. The steps visit
  // all options.
  for (int64_t M = 0; M <= 67; ++M)
    for (int64_t N = 0; N <= 67; ++N) test(M, N, 1 + (M + N) % 19, (options += 37) % 64);
  for (const auto& [M, N] : {std::pair(1, 9), {9, 1}, {14, 32}, {15, 33}, {13, 10}, {29, 67}})
    for (int64_t K = 0; K <= 67; ++K)
      for (int i = 0; i < 8; ++i) test(M, N, K, (options += 37) % 64);
  // Blocks: deep, high, wide; rows of B that fall into the same sets of a cache.
  for (int i = 0; i < 8; ++i) {
    test(30, 40, 1100, i + 8 * (i % 4)), test(370, 40, 18, i + 8 * (i % 4));
    test(80, 1100, 18, i + 8 * (i % 4)), test(60, 4096, 2, i + 8 * (i % 4));
    test(2100, 20, 18, i + 8 * (i % 4));
  }
  Random random;
  for (int i = 0; i < random_cases; ++i) {
    const int64_t M = random(0, 200), N = random(0, 200), most = 2000000 / (M * N + 1000);
    test(M, N, random(0, most), static_cast<int>(random(0, 63)));
  }
  return wrong;
}
static const Test gemm_test("gemm", gemm);

// NaN and infinity reach the rows they stand in and no others.
static int gemm_special(const cpu::Kernels& t) {
  constexpr int64_t M = 20, N = 37, K = 24;
  Buffer<float> a(M * K), b(N * K), c(M * N), scratch(t.gemm_scratch);
  int wrong = 0;
  for (const bool dot : {false, true})
    for (const float special : {NAN, INFINITY, -0.0f}) {
      a.fill(special == 0 ? -0.0f : 1), b.fill(special == 0 ? 1 : 2), c.fill(5);
      if (special != 0) a[3 * K + 7] = special;
      const cpu::GemmOutput out = {.c = c.data(), .row = N, .relu = true};
      if (dot)
        t.gemm_dot({a.data(), K, 1}, {b.data(), K, 1}, K, out, {0, M, 0, N});
      else
        t.gemm({a.data(), K, 1}, {b.data(), K, 1}, K, out, {0, M, 0, N}, scratch.data());
      for (int64_t i = 0; i < M * N; ++i) {
        const float expected = special == 0 ? 0 : i / N == 3 ? special : 2 * K;
        wrong += !close(c[i], expected, 0);
      }
    }
  return wrong;
}
static const Test gemm_special_test("gemm special values", gemm_special);

// The positive number with these bits, if `fraction` of them are the fraction's and `exponent` the
// exponent's; infinity is the power of two that comes after the largest number.
static double decode(int64_t bits, int fraction, int exponent) {
  const int64_t e = bits >> fraction, m = bits & ((1 << fraction) - 1);
  const int bias = (1 << (exponent - 1)) - 1;
  return e ? std::ldexp((1 << fraction) + m, static_cast<int>(e) - bias - fraction)
           : std::ldexp(m, 1 - bias - fraction);
}

// y = x * 1 from one dtype to another, in vectors (x as B) and in parts of them (x as A).
template <class From, class To>
static void convert(const cpu::Kernels& t, Buffer<From>& x, Buffer<To>& y, Buffer<To>& z) {
  Buffer<float> one(1), scratch(t.gemm_scratch);
  one.fill(1);
  const int64_t n = x.size();
  const cpu::Matrix X = {x.data(), 1, n, nullptr, kDType<From>}, One = {one.data(), 1, 1};
  cpu::GemmOutput out = {.c = y.data(), .row = n};
  out.dtype = kDType<To>;
  t.gemm(One, X, 1, out, {0, 1, 0, n}, scratch.data());
  out.c = z.data(), out.row = 1;
  t.gemm(X, One, 1, out, {0, n, 0, 1}, scratch.data());
}

// Every number is read right and comes back, NaN as NaN; what lies between two is rounded to the
// nearer, or to the even one.
template <class T>
static int narrow(const cpu::Kernels& t) {
  const int fraction = kDType<T> == DType::kBFloat16 ? 7 : 10, exponent = 15 - fraction;
  const int64_t infinity = ((int64_t{1} << exponent) - 1) << fraction;
  int wrong = 0;
  Buffer<T> x(65536), y(65536), z(65536);
  Buffer<float> wide(65536), same(65536);
  for (int64_t i = 0; i < 65536; ++i) x[i].bits = static_cast<uint16_t>(i);
  convert(t, x, wide, same), convert(t, x, y, z);
  for (int64_t i = 0; i < 65536; ++i) {
    const int64_t bits = i & 0x7fff;
    const double size = bits < infinity ? decode(bits, fraction, exponent) : INFINITY;
    const double expected = bits > infinity ? NAN : i > 0x7fff ? -size : size;
    for (const double got : {double(wide[i]), double(same[i]), double(y[i]), double(z[i])})
      wrong += !close(got, expected, 0);
  }
  Buffer<float> between(6 * infinity);
  Buffer<T> rounded(between.size()), too(between.size());
  for (int64_t i = 0; i < infinity; ++i) {
    const auto middle =
        static_cast<float>((decode(i, fraction, exponent) + decode(i + 1, fraction, exponent)) / 2);
    for (int64_t j = 0; j < 3; ++j) {
      const float value = j ? std::nextafter(middle, j == 1 ? 0.0f : INFINITY) : middle;
      between[6 * i + 2 * j] = value, between[6 * i + 2 * j + 1] = -value;
    }
  }
  convert(t, between, rounded, too);
  for (int64_t i = 0; i < between.size(); ++i) {
    const int64_t below = i / 6, which = i % 6 / 2;
    const int64_t bits = below + (which == 0 ? below % 2 : which == 2);
    for (const T got : {rounded[i], too[i]})
      wrong += (got.bits & 0x7fff) != bits || (bits > 0 && got.bits >> 15 != i % 2);
  }
  return wrong;
}
static const Test bfloat16_test("bfloat16", narrow<BFloat16>);
static const Test float16_test("float16", narrow<Float16>);
