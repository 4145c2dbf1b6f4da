// adam against double: tensors of any size in any order, steps on the host and on the device.
#include "cuda_test.h"

#include "cuda/optim/adam.cu"

namespace dlkernels::test {
namespace {

constexpr cuda::AdamOptions kPlain = {.lr = 0.01,
                                      .beta1 = 0.9,
                                      .beta2 = 0.999,
                                      .weight_decay = 0,
                                      .eps = 1e-8,
                                      .maximize = false,
                                      .decoupled_weight_decay = false,
                                      .device_lr = nullptr,
                                      .grad_scale = nullptr,
                                      .found_inf = nullptr};

// One tensor, and what it was before. It starts `skip` elements from where it is aligned.
template <class T>
struct Tensor {
  int64_t n, skip;
  CudaBuffer<T> p, g, m, v, p0, g0, m0, v0;
  Buffer<float> step;

  Tensor(int64_t n, int64_t skip, uint32_t seed)
      : n(n),
        skip(skip),
        p(n + skip, seed),
        g(n + skip, seed + 1),
        m(n + skip, seed + 2),
        v(n + skip, seed + 3),
        p0(n + skip, seed),
        g0(n + skip, seed + 1),
        m0(n + skip, seed + 2),
        v0(n + skip),
        step(1) {
    for (int64_t i = 0; i < n + skip; ++i)
      v[i] = v0[i] = cuda::from_float<T>(std::fabs(cuda::to_float(v[i])));
    step[0] = static_cast<float>(seed % 5);
  }

  cuda::AdamTensor listed(bool on_device) {
    return {p.data() + skip,
            g.data() + skip,
            m.data() + skip,
            v.data() + skip,
            on_device ? step.data() : nullptr,
            step[0] + 1.0,
            n};
  }

  int wrong(const cuda::AdamOptions& o, double lr, double steps) {
    int wrong = 0;
    for (int64_t i = 0; i < n + skip; ++i) {
      double g_new = g0.at(i), pi = p0.at(i), mi = m0.at(i), vi = v0.at(i);
      const bool done = i >= skip && !(o.found_inf && *o.found_inf != 0);
      if (done) {
        if (o.grad_scale) g_new /= *o.grad_scale;
        double step = o.maximize ? -g_new : g_new;
        if (o.decoupled_weight_decay)
          pi *= 1 - lr * o.weight_decay;
        else
          step += o.weight_decay * pi;
        mi += (1 - o.beta1) * (step - mi);
        vi = o.beta2 * vi + (1 - o.beta2) * step * step;
        pi -= lr / (1 - std::pow(o.beta1, steps)) * mi /
              (std::sqrt(vi / (1 - std::pow(o.beta2, steps))) + o.eps);
      }
      const double eps = kEps<T> + 1e-6;
      wrong += !close(p.at(i), pi, eps * (1 + std::fabs(pi)));
      wrong += !close(g.at(i), g_new, o.grad_scale ? eps : 0) || !close(m.at(i), mi, eps);
      wrong += !close(v.at(i), vi, eps);
    }
    return wrong;
  }
};

template <class T>
int step_of(std::initializer_list<std::pair<int64_t, int64_t>> sizes, cuda::AdamOptions o,
            bool on_device) {
  std::vector<std::unique_ptr<Tensor<T>>> tensors;
  std::vector<cuda::AdamTensor> list;
  for (const auto& [n, skip] : sizes) {
    tensors.push_back(std::make_unique<Tensor<T>>(n, skip, 1 + static_cast<uint32_t>(list.size())));
    list.push_back(tensors.back()->listed(on_device));
  }
  const int64_t count = static_cast<int64_t>(list.size());
  Buffer<float> workspace(on_device ? cuda::adam_workspace(count) : 0), device_lr(1);
  const double lr = o.lr;
  device_lr[0] = static_cast<float>(lr);
  if (on_device && o.maximize) o.device_lr = device_lr.data(), o.lr = NAN;
  int wrong = cuda::adam(kDType<T>, list.data(), count, o, workspace.data(), nullptr) != 0;
  for (int64_t i = 0; i < count; ++i) {
    const double before = static_cast<double>((i + 1) % 5), steps = before + 1;
    wrong += tensors[i]->wrong(o, lr, steps);
    const bool counted = on_device && !(o.found_inf && *o.found_inf != 0);
    wrong += tensors[i]->step[0] != (counted ? steps : before);
  }
  return wrong;
}

const CudaTest adam_test("adam", [] {
  Buffer<float> scale(1), found(1), none(1);
  scale[0] = 3, found[0] = 2, none[0] = 0;
  cuda::AdamOptions decayed = kPlain, decoupled = kPlain, scaled = kPlain, skipped;
  decayed.weight_decay = decoupled.weight_decay = 0.1;
  decayed.maximize = decoupled.decoupled_weight_decay = true;
  scaled.beta1 = scaled.beta2 = 0, scaled.grad_scale = scale.data(), scaled.found_inf = none.data();
  skipped = scaled, skipped.found_inf = found.data();
  return each_type([&](auto zero) {
    using T = decltype(zero);
    int wrong = 0;
    for (const bool on_device : {false, true})
      for (const auto& o : {kPlain, decayed, decoupled, scaled, skipped}) {
        wrong += step_of<T>({}, o, on_device) + step_of<T>({{0, 0}}, o, on_device);
        wrong += step_of<T>({{0, 0}, {1, 0}, {0, 0}, {5, 3}, {2048, 0}, {4100, 0}, {0, 0}, {0, 0}},
                            o, on_device);
        wrong += step_of<T>({{2048, 1}, {4096, 0}, {64, 0}}, o, on_device);
      }
    return wrong;
  });
});

// More tensors than one launch takes, some empty.
const CudaTest adam_many_test("adam on many tensors", [] {
  std::vector<std::unique_ptr<Tensor<float>>> tensors;
  std::vector<cuda::AdamTensor> list;
  int wrong = 0;
  for (int i = 0; i < 300; ++i) {
    tensors.push_back(std::make_unique<Tensor<float>>(i % 3 ? i % 7 : 0, 0, i + 1));
    list.push_back(tensors.back()->listed(true));
  }
  Buffer<float> workspace(cuda::adam_workspace(300));
  wrong += cuda::adam(cuda::DType::kFloat32, list.data(), 300, kPlain, workspace.data(), nullptr);
  for (int i = 0; i < 300; ++i) {
    wrong += tensors[i]->wrong(kPlain, kPlain.lr, (i + 1) % 5 + 1);
    wrong += tensors[i]->step[0] != (i + 1) % 5 + 1;
  }
  // Sizes that no test can run: a table holds as many chunks as an int counts.
  cuda::TensorTable<cuda::AdamStep> table;
  const int64_t half = int64_t{cuda::kChunk} << 30;
  wrong += !table.add({{}, half, {}}) || !table.add({{}, half - cuda::kChunk, {}});
  wrong += table.add({{}, 1, {}}) || !table.add({{}, 0, {}}) || table.chunk_end[2] != INT32_MAX;
  return wrong;
});

// A square that has overflowed freezes its element; an infinite parameter stays what it is.
const CudaTest adam_extremes_test("adam's extremes", [] {
  CudaBuffer<float> p(17), g(17), m(17), v(17);
  p.fill(1), g.fill(1e30f), m.fill(0), v.fill(INFINITY);
  cuda::AdamOptions o = kPlain;
  o.beta1 = 0, o.beta2 = 0.5;
  const cuda::AdamTensor t = {p.data(), g.data(), m.data(), v.data(), nullptr, 1, 17};
  int wrong = cuda::adam(cuda::DType::kFloat32, &t, 1, o, nullptr, nullptr) != 0;
  for (int i = 0; i < 17; ++i) wrong += p[i] != 1 || m[i] != 1e30f || v[i] != INFINITY;
  p.fill(INFINITY), g.fill(0), m.fill(0), v.fill(1);
  wrong += cuda::adam(cuda::DType::kFloat32, &t, 1, o, nullptr, nullptr) != 0;
  for (int i = 0; i < 17; ++i) wrong += p[i] != INFINITY || m[i] != 0 || v[i] != 0.5f;
  return wrong;
});

}  // namespace
}  // namespace dlkernels::test
