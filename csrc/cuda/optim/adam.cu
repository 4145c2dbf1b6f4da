// Adam on many tensors in one launch (formulas: kernels.h). The step and the learning rate may be
// on the host or on the device. Memory bounds it: 85 to 90 % of the bandwidth with 100 M
// parameters.
#include "cuda/optim/multi_tensor.cuh"

namespace dlkernels::cuda {

namespace {

// What of the formula depends on the step: kept in float32, worked out in double.
struct AdamScalars {
  float rsqrt_bias, step_size, shrink;  // 1 / sqrt(1 - beta2^step), lr / (1 - beta1^step)
};

__host__ __device__ inline AdamScalars adam_scalars(const AdamOptions& o, double lr, double step) {
  return {static_cast<float>(1 / sqrt(1 - pow(o.beta2, step))),
          static_cast<float>(lr / (1 - pow(o.beta1, step))),
          static_cast<float>(o.decoupled_weight_decay ? 1 - lr * o.weight_decay : 1)};
}

struct AdamStep {
  static constexpr int kArrays = 4;  // parameter, gradient, exp_avg, exp_avg_sq
  using Tensor = AdamScalars;

  float sign, weight_decay, one_minus_beta1, beta2, one_minus_beta2, eps;
  const float *grad_scale, *found_inf;
  const AdamScalars* on_device;  // of every tensor, or null: those in the table

  struct Scalars {
    AdamScalars of_step;
    float grad_scale;
  };
  __device__ bool skip() const { return found_inf && *found_inf != 0; }
  __device__ Scalars scalars(const AdamScalars& tensor, int i) const {
    return {on_device ? on_device[i] : tensor, grad_scale ? *grad_scale : 1};
  }
  __device__ bool writes(int array) const { return array != 1 || grad_scale; }

  __device__ void operator()(float (&x)[kArrays], const Scalars& s) const {
    if (grad_scale) x[1] = x[1] / s.grad_scale;
    float g = sign * x[1];
    // Not without weight decay: an infinite parameter would make 0 * inf.
    if (weight_decay != 0) g = fmaf(weight_decay, x[0], g);
    // m - w * m + w * g is exact for w = 1, where m + w * (g - m) loses a g far below m.
    const float w = one_minus_beta1, m = fmaf(w, g, fmaf(-w, x[2], x[2]));
    // Not in that form: it would turn a square that has overflowed to infinity into NaN.
    const float v = fmaf(one_minus_beta2 * g, g, beta2 * x[3]);
    const float update = m / fmaf(sqrtf(v), s.of_step.rsqrt_bias, eps);
    x[0] = fmaf(-s.of_step.step_size, update, s.of_step.shrink * x[0]);
    x[2] = m;
    x[3] = v;
  }
};

// Steps on the device, as many as a launch takes.
constexpr int kSteps = 256;
struct Steps {
  float* steps[kSteps];
  int count = 0;
};

// Counts them up, and writes what follows from them.
__global__ void __launch_bounds__(kSteps)
    adam_steps_kernel(const __grid_constant__ Steps steps, const AdamOptions o,
                      AdamScalars* scalars) {
  const int i = threadIdx.x;
  if (i >= steps.count || (o.found_inf && *o.found_inf != 0)) return;
  const float step = *steps.steps[i] + 1;
  *steps.steps[i] = step;
  scalars[i] = adam_scalars(o, o.device_lr ? *o.device_lr : o.lr, step);
}

Error count_steps(const AdamTensor* tensors, int64_t count, const AdamOptions& options,
                  AdamScalars* scalars, Stream stream) {
  for (int64_t begin = 0; begin < count; begin += kSteps) {
    Steps steps;
    while (steps.count < kSteps && begin + steps.count < count) {
      steps.steps[steps.count] = tensors[begin + steps.count].step;
      ++steps.count;
    }
    const Error error =
        launch(adam_steps_kernel, 1, kSteps, 0, stream, steps, options, scalars + begin);
    if (error) return error;
  }
  return 0;
}

}  // namespace

int64_t adam_workspace(int64_t count) { return count * (sizeof(AdamScalars) / sizeof(float)); }

Error adam(DType dtype, const AdamTensor* tensors, int64_t count, const AdamOptions& o,
           float* workspace, Stream stream) {
  const bool on_device = count > 0 && tensors[0].step;
  AdamScalars* scalars = on_device ? reinterpret_cast<AdamScalars*>(workspace) : nullptr;
  if (on_device)
    if (const Error error = count_steps(tensors, count, o, scalars, stream)) return error;
  const AdamStep step = {
      .sign = o.maximize ? -1.0f : 1.0f,
      .weight_decay = o.decoupled_weight_decay ? 0 : static_cast<float>(o.weight_decay),
      .one_minus_beta1 = static_cast<float>(1 - o.beta1),
      .beta2 = static_cast<float>(o.beta2),
      .one_minus_beta2 = static_cast<float>(1 - o.beta2),
      .eps = static_cast<float>(o.eps),
      .grad_scale = o.grad_scale,
      .found_inf = o.found_inf,
      .on_device = scalars};
  const auto listed = [&](int64_t i) -> Listed<AdamStep> {
    const AdamTensor& t = tensors[i];
    return {{t.param, t.grad, t.exp_avg, t.exp_avg_sq},
            t.n,
            on_device ? AdamScalars{} : adam_scalars(o, o.lr, t.steps)};
  };
  return each_tensor(dtype, count, listed, step, stream);
}

}  // namespace dlkernels::cuda
