// max_pool2d both ways against the definition, bit for bit, in every type and both layouts.
#include "cuda_test.h"

#include "cuda/pool2d/max_pool2d.cu"

namespace dlkernels::test {
namespace {

using cuda::Pool;

// Input element k of window (oh, ow) as h * W + w, or -1.
int64_t place(const Pool& p, int64_t oh, int64_t ow, int64_t k) {
  if (k >= p.h.kernel * p.w.kernel) return -1;
  const int64_t h = oh * p.h.stride - p.h.pad + k / p.w.kernel * p.h.dilation;
  const int64_t w = ow * p.w.stride - p.w.pad + k % p.w.kernel * p.w.dilation;
  return h >= 0 && h < p.h.in && w >= 0 && w < p.w.in ? h * p.w.in + w : -1;
}

// Forward, indices and backward; then a gradient through bytes that lie. `skip`: how many elements
// from alignment the tensors start.
template <class T>
int pool(const Pool& p, int64_t skip) {
  const int64_t plane = p.h.in * p.w.in, windows = p.h.out * p.w.out;
  const int64_t n_x = p.images * plane * p.C, n_y = p.images * windows * p.C;
  CudaBuffer<T> x(n_x + skip, 1), y(n_y + skip), y_only(n_y), grad_y(n_y + skip, 2);
  CudaBuffer<T> grad_x(n_x + skip);
  Buffer<uint8_t> argmax(n_y);
  Buffer<int64_t> indices(n_y);
  std::vector<float> expected(n_x);
  T *const from = x.data() + skip, *const to = y.data() + skip, *const gx = grad_x.data() + skip;
  for (int64_t i = 0; i < n_x; ++i) {
    from[i] = cuda::from_float<T>(std::floor(x.at(i + skip) * 3));  // ties
    if (i % 11 == 3) from[i] = cuda::from_float<T>(NAN);
    if (i % 7 == 5) from[i] = cuda::from_float<T>(-INFINITY);
  }
  int wrong = cuda::max_pool2d(kDType<T>, from, to, argmax.data(), p, nullptr) != 0;
  wrong += cuda::max_pool2d(kDType<T>, from, y_only.data(), nullptr, p, nullptr) != 0;
  wrong += cuda::max_pool2d_indices(argmax.data(), indices.data(), p, nullptr) != 0;
  for (const bool lie : {false, true}) {
    for (int64_t o = 0; lie && o < n_y; ++o) argmax[o] = static_cast<uint8_t>(o * 89);
    std::fill(expected.begin(), expected.end(), 0);
    wrong += cuda::max_pool2d_backward(kDType<T>, grad_y.data() + skip, argmax.data(), gx, p,
                                       nullptr) != 0;
    for (int64_t o = 0; o < n_y; ++o) {
      const int64_t c = o % p.C, ow = o / p.C % p.w.out, oh = o / p.C / p.w.out % p.h.out;
      const int64_t image = o / p.C / windows * plane;
      const int64_t chosen = place(p, oh, ow, argmax[o]);
      if (chosen >= 0) expected[(image + chosen) * p.C + c] += grad_y.at(o + skip);
      if (lie) continue;
      float best = -INFINITY;
      int64_t index = -1;
      for (int64_t k = 0; k < p.h.kernel * p.w.kernel; ++k) {
        const int64_t i = place(p, oh, ow, k);
        if (i < 0) continue;
        const float v = cuda::to_float(from[(image + i) * p.C + c]);
        if (index < 0 || v > best || std::isnan(v)) best = v, index = i;
      }
      wrong += !close(y.at(o + skip), best, 0) || !close(y_only.at(o), best, 0);
      wrong += std::signbit(y.at(o + skip)) != std::signbit(best) && !std::isnan(best);
      wrong += indices[o] != index || chosen != index || (index < 0) != (argmax[o] == 255);
    }
    for (int64_t i = 0; i < n_x; ++i)
      wrong += grad_x.at(i + skip) != cuda::to_float(cuda::from_float<T>(expected[i]));
  }
  return wrong;
}

struct Window {
  int64_t kernel, stride, pad, dilation;
};
// As many windows as ceil_mode has, one more than fits.
PoolAxis axis(const Window& v, int64_t in) {
  return {in, (in + v.pad - 1) / v.stride + 1, v.kernel, v.stride, v.pad, v.dilation};
}

const CudaTest max_pool2d_test("max_pool2d", [] {
  const int64_t far = (int64_t{1} << 31) - 1;
  int wrong = 0;
  for (const Window& v : {Window{1, 1, 0, 1},
                          {2, 2, 0, 1},
                          {2, 2, 1, 1},
                          {3, 2, 1, 1},
                          {3, 1, 1, 1},
                          {2, 3, 0, 1},
                          {1, 2, 0, 1},
                          {3, 1, 1, 2},
                          {2, 2, 0, 3},
                          {15, 1, 7, 1},
                          {2, 1, 1, 3},
                          {3, far, 1, 1},
                          {2, far, 1, far},
                          {15, 1, 7, far}})
    for (const int64_t W : {1, 2, 7, 16, 35})
      for (const int64_t C : {1, 3, 8}) {
        const Pool p = {2, C, axis(v, std::min<int64_t>(W, 5)), axis(v, W)};
        const int64_t skip = W == 16 ? 3 : 0;
        const int bad = pool<float>(p, skip) + (W > 2 ? pool<cuda::bf16>(p, skip) : 0) +
                        (W == 35 || C == 8 ? pool<cuda::half>(p, skip) : 0);
        if (bad)
          std::printf("kernel %ld stride %ld pad %ld dilation %ld W %ld C %ld: %d\n",
                      long(v.kernel), long(v.stride), long(v.pad), long(v.dilation), long(W),
                      long(C), bad);
        wrong += bad;
      }
  // Windows that are not square, more than a block of them; aligned and not.
  const PoolAxis tall = axis({3, 2, 1, 1}, 40), wide = axis({2, 1, 0, 2}, 48);
  for (const int64_t skip : {0, 1}) wrong += pool<float>({3, 1, tall, wide}, skip);
  wrong += pool<cuda::bf16>({2, 16, wide, tall}, 0);
  wrong += pool<float>({0, 3, tall, wide}, 0) + pool<float>({3, 0, tall, wide}, 0);
  return wrong;
});

// Where the pieces of sizes lie that no test can run.
const CudaTest places_test("places of huge pools", [] {
  int wrong = 0;
  for (const int64_t d : {1, 2, 3, 7, 641, 65537, 1 << 29, (1 << 29) + 127, 1 << 30, INT32_MAX})
    for (const int64_t n : {0, 1, 2, 640, 641, 65536, (1 << 30) - 1, 1 << 30, INT32_MAX})
      for (const int64_t m : {n, n / d * d, n / d * d - 1})
        if (m >= 0) wrong += cuda::Divider(d).divide(static_cast<int>(m)) != m / d;
  const int64_t rows = 70'000, columns = 65'000, packs = 3;
  const cuda::Places places(rows, columns, packs);
  for (const int64_t i : {int64_t{0}, int64_t{1} << 32, (int64_t{1} << 45) + 12345})
    for (const int n : {0, 1, 255, 1023}) {
      const cuda::Place p = places.after(places.first(i), n);
      wrong += ((p.image * rows + p.row) * columns + p.column) * packs + p.pack != i + n;
      wrong += p.row >= rows || p.column >= columns || p.pack >= packs;
    }
  // The last windows of the widest axis: reach and stride are beyond its end.
  const dlkernels::PoolAxis widest = {cuda::kPoolSide, cuda::kPoolSide, 255, 1, 127, INT32_MAX};
  const cuda::Axis a(widest);
  const int last = static_cast<int>(cuda::kPoolSide) - 1;
  wrong += a.last(last) != last || a.first(last) != 0;
  wrong += a.element(last, last) != -1 || a.element(0, -127) != 0;
  return wrong;
});

}  // namespace
}  // namespace dlkernels::test
