#include "kernels_test.h"

using namespace dlkernels;
using namespace dlkernels::test;

// Input element (kh, kw) of window (oh, ow) as h * W + w, or -1.
static int64_t place(const cpu::Pool& p, int64_t oh, int64_t ow, int64_t k) {
  if (k >= p.h.kernel * p.w.kernel) return -1;
  const int64_t h = oh * p.h.stride - p.h.pad + k / p.w.kernel * p.h.dilation;
  const int64_t w = ow * p.w.stride - p.w.pad + k % p.w.kernel * p.w.dilation;
  return h >= 0 && h < p.h.in && w >= 0 && w < p.w.in ? h * p.w.in + w : -1;
}

// Both ways in two parts each, against the definition; then a gradient through bytes that lie.
static int pool(const cpu::Kernels& t, int64_t images, const cpu::Pool& p) {
  const int64_t plane = p.h.in * p.w.in, windows = p.h.out * p.w.out;
  const int64_t n_x = images * plane * p.C, n_y = images * windows * p.C;
  Buffer<float> x(n_x, 1), y(n_y), y_only(n_y), grad_y(n_y, 2), grad_x(n_x), expected(n_x);
  Buffer<uint8_t> argmax(n_y);
  Buffer<int64_t> indices(n_y);
  for (int64_t i = 0; i < n_x; ++i) {
    x[i] = std::floor(x[i] * 3);  // ties
    if (i % 11 == 3) x[i] = NAN;
    if (i % 7 == 5) x[i] = -INFINITY;
  }
  const int64_t rows = images * p.h.out, rows_x = images * p.h.in;
  together([&] { t.max_pool2d(x.data(), y.data(), argmax.data(), p, 0, rows / 2); },
           [&] { t.max_pool2d(x.data(), y.data(), argmax.data(), p, rows / 2, rows); });
  t.max_pool2d(x.data(), y_only.data(), nullptr, p, 0, rows);
  together([&] { t.max_pool2d_indices(argmax.data(), indices.data(), p, 0, rows / 2); },
           [&] { t.max_pool2d_indices(argmax.data(), indices.data(), p, rows / 2, rows); });
  int wrong = 0;
  for (const bool lie : {false, true}) {
    for (int64_t o = 0; lie && o < n_y; ++o) argmax[o] = static_cast<uint8_t>(o * 89);
    expected.fill(0), grad_x.fill(NAN);
    const auto backward = [&](int64_t begin, int64_t end) {
      t.max_pool2d_backward(grad_y.data(), argmax.data(), grad_x.data(), p, begin, end);
    };
    together([&] { backward(0, rows_x / 2); }, [&] { backward(rows_x / 2, rows_x); });
    for (int64_t o = 0; o < n_y; ++o) {
      const int64_t c = o % p.C, ow = o / p.C % p.w.out, oh = o / p.C / p.w.out % p.h.out;
      const int64_t image = o / p.C / windows * plane;
      const int64_t chosen = place(p, oh, ow, argmax[o]);
      if (chosen >= 0) expected[(image + chosen) * p.C + c] += grad_y[o];
      if (lie) continue;
      float best = -INFINITY;
      int64_t index = -1;
      for (int64_t k = 0; k < p.h.kernel * p.w.kernel; ++k) {
        const int64_t i = place(p, oh, ow, k);
        if (i < 0) continue;
        const float v = x[(image + i) * p.C + c];
        if (index < 0 || v > best || std::isnan(v)) best = v, index = i;
      }
      wrong += std::memcmp(&y[o], &best, sizeof best) != 0;
      wrong += std::memcmp(&y_only[o], &best, sizeof best) != 0;
      wrong += indices[o] != index || chosen != index || (index < 0) != (argmax[o] == 255);
    }
    for (int64_t i = 0; i < n_x; ++i) wrong += grad_x[i] != expected[i];
  }
  return wrong;
}

static int max_pool2d(const cpu::Kernels& t) {
  struct Window {
    int64_t kernel, stride, pad, dilation;
  };
  const int64_t far = int64_t{1} << 30;
  int wrong = 0;
  for (const Window& v : {Window{1, 1, 0, 1},
                          {2, 2, 0, 1},
                          {2, 2, 1, 1},
                          {2, 1, 0, 1},
                          {3, 2, 0, 1},
                          {3, 2, 1, 1},
                          {3, 1, 1, 1},
                          {3, 3, 0, 1},
                          {2, 3, 0, 1},
                          {1, 2, 0, 1},
                          {3, 1, 1, 2},
                          {2, 2, 0, 3},
                          {15, 1, 7, 1},
                          {2, 1, 1, 3},
                          {3, far, 1, 1},
                          {2, far, 1, far}})
    for (int64_t W : {1, 2, 3, 7, 16, 17, 31, 33, 34, 67, 151, 1500})
      for (int64_t C : {1, 3, 17}) {
        if (W > 67 && C > 1) continue;  // for planes that take several parts
        const int64_t H = W == 151 ? 121 : W > 8 ? 5 : W;
        const auto axis = [&](int64_t in) {  // one window more than fits, as ceil_mode has it
          const int64_t room = in + v.pad - 1, out = room / v.stride + 1;
          return PoolAxis{in, out, v.kernel, v.stride, v.pad, v.dilation};
        };
        const int bad = pool(t, 2, {C, axis(H), axis(W)});
        if (bad)
          std::printf("kernel %ld stride %ld pad %ld dilation %ld W %ld C %ld: %d\n",
                      long(v.kernel), long(v.stride), long(v.pad), long(v.dilation), long(W),
                      long(C), bad);
        wrong += bad;
      }
  return wrong;
}
static const Test max_pool2d_test("max_pool2d", max_pool2d);

// Windows of any kind that a byte can count; wide ones may hold no element.
static int max_pool2d_random(const cpu::Kernels& t) {
  Random random;
  int wrong = 0;
  for (int i = 0; i < random_cases; ++i) {
    const auto axis = [&](int64_t most_taps) {
      PoolAxis a = {random(1, 40), 1, random(1, most_taps), 1, 0, 1};
      a.stride = random(0, 4) ? random(1, 5) : int64_t{1} << random(5, 30);
      a.pad = random(0, a.kernel / 2);
      a.dilation = random(0, 2) ? 1 : random(0, 3) ? random(2, 9) : int64_t{1} << random(5, 30);
      const int64_t room = a.in + a.pad - 1;  // where the last window may begin
      a.out = random(1, room / a.stride + 1);
      return a;
    };
    const cpu::Pool p = {random(0, 2) ? random(1, 40) : 1, axis(15), axis(17)};
    const int bad = pool(t, random(1, 3), p);
    if (bad)
      std::printf("case %d: C=%ld H=%ld W=%ld: %d\n", i, long(p.C), long(p.h.in), long(p.w.in),
                  bad);
    wrong += bad;
  }
  return wrong;
}
static const Test max_pool2d_random_test("max_pool2d_random", max_pool2d_random);
