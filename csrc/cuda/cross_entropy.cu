// cross_entropy with its gradient, and the scaling of that (formulas: cpu/cross_entropy.inl.h).
// A row is read once from global memory: what the second pass over it needs stays in shared memory,
// as far as it fits. Memory bounds it.
#include <cfloat>

#include "cuda/cross_entropy.cuh"

namespace dlkernels::cuda {

namespace {

// What of g all classes of a row have, from class c on: the probabilities' part and the smoothing.
template <int P, class S, class T>
__device__ void spread(const Rows<T>& a, const S& s, int i, float (&g)[P]) {
  const int c = s.class_of(i);
  Pack<T, P> t = {};
  if (a.probabilities) t = s.load(a.probabilities, i);
#pragma unroll
  for (int j = 0; j < P; ++j) {
    g[j] = 0;
    if (!s.has(c + j)) continue;
    g[j] = a.probabilities
               ? fmaf(a.one_minus_smoothing, to_float(t.values[j]), a.smoothing_per_class)
               : a.smoothing_per_class;
    if (a.weight) g[j] *= to_float(a.weight[c + j]);
  }
}

// The sum of the counts, of which each lane has read those at its distance of 32.
template <class T>
__device__ float own_counts(const Rows<T>& a) {
  float sum = 0;
  for (int i = threadIdx.x % kWarp; i < a.count_parts; i += kWarp) sum += a.counts[i];
  return sum;
}
template <class T>
__device__ float divisor(const Rows<T>& a, float own) {
  return a.counts ? over_warp(own, Sum()) : a.divisor;
}

template <Team kTeam, bool kSpread, class T>
__global__ void __launch_bounds__(kTeam == Team::kBlock ? kLongThreads : kThreads,
                                  kTeam == Team::kBlock ? 2 : 4)
    cross_entropy_kernel(const Rows<T> a) {
  using S = Share<kTeam, T>;
  constexpr int P = S::P;
  S s(a);
  const float counts = own_counts(a);
  const bool real = s.C > 0;
  const int64_t target = real && a.target ? a.target[s.row] : -1;
  const bool ignored = real && a.ignores(s.row), known = target >= 0 && target < a.C;
  const bool none = real && a.target && !ignored && !known;
  const int t = known && !ignored ? static_cast<int>(target) : -1;
  const float g_t = t < 0      ? 0
                    : a.weight ? a.one_minus_smoothing * to_float(a.weight[t])
                               : a.one_minus_smoothing;
  if (none && a.no_class) raise_flag(a.no_class);
  const int packs = s.packs;
  if (ignored) s.packs = s.end = 0;  // not even read

  float top = -FLT_MAX, sum = 0, g_sum = 0;
  s.template each<P == 1    ? 8
                  : kSpread ? 2
                            : 4>(a.x, [&](int i, const Pack<T, P>& v) {
    if (i < a.cached) s.cache(i, a.cached) = v;
    float higher = top;
#pragma unroll
    for (int j = 0; j < P; ++j) higher = fmaxf(higher, to_float(v.values[j]));
    sum *= exp_of<T>(top - higher);
    top = higher;
#pragma unroll
    for (int j = 0; j < P; ++j) sum += exp_of<T>(to_float(v.values[j]) - top);
    if constexpr (kSpread) {
      float g[P];
      spread<P>(a, s, i, g);
#pragma unroll
      for (int j = 0; j < P; ++j) g_sum += g[j];
    }
  });
  const float own_top = top;
  top = s.all(top, Max());
  sum = s.all(sum * exp_of<T>(own_top - top), Sum());
  if constexpr (kSpread) g_sum = s.all(g_sum, Sum());

  const float by = divisor(a, counts), scale = none ? NAN : 1 / by;
  const float to_p = scale * ((g_sum + g_t) / sum);
  float other_loss = 0;  // sum_c g[c] * (top - x[c]), but for the target's own
#pragma unroll 1
  for (int i = s.index; (kSpread || a.grad) && i < s.packs; i += s.size) {
    Pack<T, P> v = i < a.cached ? s.cache(i, a.cached) : s.load(a.x, i);
    const int to_target = t - s.class_of(i);
    float g[P] = {};
    if constexpr (kSpread) spread<P>(a, s, i, g);
#pragma unroll
    for (int j = 0; j < P; ++j) {
      const float below = to_float(v.values[j]) - top;
      if (kSpread && s.has(s.class_of(i) + j)) other_loss -= g[j] * below;
      if (j == to_target) g[j] += g_t;
      v.values[j] = from_float<T>(to_p * exp_of<T>(below) - scale * g[j]);
    }
    if (a.grad) s.store(v, a.grad, i);
  }
  if constexpr (kSpread) other_loss = s.all(other_loss, Sum());
  if (ignored && a.grad)
    for (int i = s.index; i < packs; i += s.size) s.store(Pack<T, P>{}, a.grad, i);

  float loss = 0;
  if (real && !ignored && s.index == 0) {
    const float log_sum = logf(sum);
    loss = g_sum * log_sum + other_loss;
    if (a.target)
      loss = none ? NAN : loss + g_t * (log_sum + (top - to_float(a.x[s.first + t * s.step])));
  }
  if (!a.partials) {
    if (real && s.index == 0) a.loss[s.row] = from_float<T>(loss);
    return;
  }
  if constexpr (kTeam != Team::kBlock) {
    __syncthreads();
    loss = over_block(loss, reinterpret_cast<float*>(shared_memory()), Sum());
  }
  if (threadIdx.x == 0) a.partials[blockIdx.x] = loss;
}

// counts[block] = the sum of the targets' weights that are the block's.
template <class T>
__global__ void __launch_bounds__(kLongThreads) count_kernel(const Rows<T> a, float* counts) {
  float sum = 0;
#pragma unroll 4
  for (int64_t row = global_thread(); row < a.rows; row += global_threads()) {
    const int64_t t = a.target[row];
    if (t != a.ignore_index && t >= 0 && t < a.C) sum += a.weight ? to_float(a.weight[t]) : 1;
  }
  sum = over_block(sum, reinterpret_cast<float*>(shared_memory()), Sum());
  if (threadIdx.x == 0) counts[blockIdx.x] = sum;
}

template <class T>
__global__ void __launch_bounds__(1024) finish_kernel(const Rows<T> a, int64_t parts) {
  float sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < parts; i += 1024) sum += a.partials[i];
  sum = over_block(sum, reinterpret_cast<float*>(shared_memory()), Sum());
  const float by = divisor(a, own_counts(a));
  if (threadIdx.x == 0) *a.loss = from_float<T>(sum / by);
}

template <Team kTeam, class T>
__global__ void __launch_bounds__(kTeam == Team::kBlock ? kLongThreads : kThreads,
                                  kTeam == Team::kBlock ? 2 : 4)
    cross_entropy_backward_kernel(const Rows<T> a, const T* grad_y, int64_t step) {
  if (step == 0 && a.x == a.grad && to_float(*grad_y) == 1) return;
  const Share<kTeam, T> s(a);
  if (s.C == 0) return;
  const bool ignored = a.ignores(s.row);
  const float factor = ignored ? 0 : to_float(grad_y[s.row * step]);
  s.template each<4>(a.x, [&](int i, auto v) {
#pragma unroll
    for (int j = 0; j < s.P; ++j)
      v.values[j] = from_float<T>(ignored ? 0 : factor * to_float(v.values[j]));
    s.store(v, a.grad, i);
  });
}

template <class T>
Rows<T> rows_of(const CrossEntropy& a, const Plan& plan) {
  const auto from16 = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16; };
  const auto as_x = [&](const void* p) { return !p || from16(p) == from16(a.x); };
  const bool mean = a.reduction == Reduction::kMean;
  return {.x = static_cast<const T*>(a.x),
          .probabilities = a.target ? nullptr : static_cast<const T*>(a.probabilities),
          .weight = static_cast<const T*>(a.weight),
          .target = a.target,
          .rows = a.rows,
          .C = a.C,
          .inner = a.inner,
          .ignore_index = a.ignore_index,
          .loss = static_cast<T*>(a.loss),
          .grad = static_cast<T*>(a.grad),
          .no_class = a.no_class,
          .one_minus_smoothing = 1 - a.smoothing,
          .smoothing_per_class = a.smoothing / static_cast<float>(a.C),
          .divisor = mean ? static_cast<float>(a.rows) : 1,
          .counts = nullptr,
          .count_parts = 0,
          .partials = nullptr,
          .members = plan.members,
          .cached = plan.cached,
          .packed = a.inner == 1 && as_x(a.grad) && (a.target || as_x(a.probabilities))};
}

int64_t blocks_of(const Plan& plan, int64_t rows) { return ceil_div(rows, plan.rows_a_block); }

template <bool kSpread, class T>
Error main_pass(const Rows<T>& a, const Plan& plan, Stream stream) {
  const auto kernel = plan.team == Team::kLanes ? cross_entropy_kernel<Team::kLanes, kSpread, T>
                      : plan.team == Team::kBlock
                          ? cross_entropy_kernel<Team::kBlock, kSpread, T>
                          : cross_entropy_kernel<Team::kColumns, kSpread, T>;
  return launch(kernel, static_cast<unsigned>(blocks_of(plan, a.rows)), plan.threads, plan.shared,
                stream, a);
}

}  // namespace

int64_t cross_entropy_workspace(int64_t rows, int64_t C, int64_t inner) {
  int64_t max_floats = 0;  // of any type
  for (const int bytes : {2, 4}) {
    const int64_t blocks = blocks_of(plan_of(C, inner, bytes), rows);
    max_floats = blocks > max_floats ? blocks : max_floats;
  }
  return kCounts + max_floats;
}

Error cross_entropy(DType dtype, const CrossEntropy& args, float* workspace, Stream stream) {
  return with_type(dtype, [&](auto zero) -> Error {
    using T = decltype(zero);
    const Plan plan = plan_of(args.C, args.inner, sizeof(T));
    Rows<T> a = rows_of<T>(args, plan);
    const bool all = args.reduction != Reduction::kNone;
    if (all) a.partials = workspace + kCounts;
    if (args.reduction == Reduction::kMean && a.target && a.rows > 0) {
      const int64_t blocks = ceil_div(a.rows, 8 * kLongThreads);
      a.counts = workspace;
      a.count_parts = static_cast<int>(blocks < kCounts ? blocks : kCounts);
      const Error error = launch(count_kernel<T>, static_cast<unsigned>(a.count_parts),
                                 kLongThreads, kReduction, stream, a, workspace);
      if (error) return error;
    }
    const bool is_spread = !a.target || args.smoothing != 0;
    const Error error = (is_spread ? main_pass<true, T> : main_pass<false, T>)(a, plan, stream);
    if (error || !all) return error;
    return launch(finish_kernel<T>, 1, 1024, kReduction, stream, a, blocks_of(plan, a.rows));
  });
}

Error cross_entropy_backward(DType dtype, const CrossEntropy& args, const void* grad_y,
                             int64_t step, Stream stream) {
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const Plan plan = plan_of(args.C, args.inner, sizeof(T));
    const auto kernel = plan.team == Team::kLanes ? cross_entropy_backward_kernel<Team::kLanes, T>
                        : plan.team == Team::kBlock
                            ? cross_entropy_backward_kernel<Team::kBlock, T>
                            : cross_entropy_backward_kernel<Team::kColumns, T>;
    return launch(kernel, static_cast<unsigned>(blocks_of(plan, args.rows)), plan.threads, 0,
                  stream, rows_of<T>(args, plan), static_cast<const T*>(grad_y), step);
  });
}

}  // namespace dlkernels::cuda
