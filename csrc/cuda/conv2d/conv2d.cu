// conv2d and its gradients: which kernels a convolution takes, what is packed for them, and where
// in the workspace that is.
#include "cuda/conv2d/direct.cuh"
#include "cuda/conv2d/gemm.cuh"
#include "cuda/conv2d/pack.cuh"

namespace dlkernels::cuda {

namespace {

using namespace conv;

int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }
int64_t run_size(const Conv2d& c) { return c.dtype == DType::kFloat32 ? 4 : 8; }
int64_t taps(const Conv2d& c) { return c.h.taps * c.w.taps; }

// Seconds, roughly, that the ordinary units and that the tensor cores take, on an H100.
struct Estimate {
  double direct, gemm;
};
double gemm_rate(const Conv2d& c) {  // multiply-adds
  if (c.dtype != DType::kFloat32) return 150e12;
  return c.allow_tf32 ? 75e12 : 25e12;
}
constexpr double kDirectRate = 8e12, kDirectWeightRate = 0.5e12, kPackRate = 2e12, kLaunch = 3e-6;

// A pass from `summed` channels a group to `written`. Of a strided gradient, each row meets its
// share of the taps.
Estimate estimate(const Conv2d& c, bool gradient) {
  const int64_t summed = (gradient ? c.K : c.C) / c.groups;
  const int64_t written = (gradient ? c.C : c.K) / c.groups;
  const double inputs = static_cast<double>(c.N * c.h.in) * static_cast<double>(c.w.in);
  const double outputs = static_cast<double>(c.N * c.h.out) * static_cast<double>(c.w.out);
  const double products = outputs * static_cast<double>(taps(c) * c.groups);
  const int64_t run = run_size(c);
  const auto padded = static_cast<double>(round_up(summed, run));
  const bool packs = !c.channels_last || summed % run != 0;  // a read and a write of 16 bytes a run
  const double runs = (gradient ? outputs : inputs) * padded * static_cast<double>(c.groups) / run;
  const double packing = packs ? runs * 2 * 16 / kPackRate : 0;
  return {products * static_cast<double>(round_up(written, 8) * summed) / kDirectRate + kLaunch,
          products * static_cast<double>(round_up(written, 64)) * padded / gemm_rate(c) + packing +
              3 * kLaunch};
}
Estimate estimate_weight(const Conv2d& c) {
  const double rows = static_cast<double>(c.N * c.h.out) * static_cast<double>(c.w.out);
  const int64_t k = c.K / c.groups, i = c.C / c.groups;
  const auto weights = static_cast<double>(c.K * i * taps(c));
  const int64_t tile = round_up(k, 64) * round_up(taps(c) * round_up(i, run_size(c)), 64);
  return {rows * weights / kDirectWeightRate + kLaunch,
          rows * static_cast<double>(tile * c.groups) / gemm_rate(c) + 4 * kLaunch};
}

// The matrix kernels count the elements of all images that a tile's rows, or the rows of a step,
// are of in 32 bits.
bool gemm_fits(const Conv2d& c) {
  const int64_t pixels = max(c.h.in * c.w.in, c.h.out * c.w.out), run = run_size(c);
  const int64_t rows = min(c.h.in * c.w.in / (c.h.stride * c.w.stride), c.h.out * c.w.out / 4);
  const int64_t channels =
      c.groups * max(round_up(c.C / c.groups, run), round_up(c.K / c.groups, run));
  return pixels <= (int64_t{1} << 30) / channels / (1 + 128 / (rows + 1));
}
bool by_gemm(const Conv2d& c, const Estimate& e) {
  if (c.algorithm == Conv2dAlgorithm::kDirect || !gemm_fits(c)) return false;
  return c.algorithm == Conv2dAlgorithm::kGemm || e.gemm < e.direct;
}

// Hands out a workspace, or only counts it.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}
  void* take(int64_t bytes) {
    void* const p = base_ ? base_ + used_ : nullptr;
    used_ += round_up(bytes, 256);
    return p;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// The passes of a convolution; or, where it `counts`, only the memory that they need.
template <class T>
class Passes {
 public:
  Passes(const Conv2d& c, void* workspace, bool counts, Stream stream)
      : c_(c),
        C_(c.C / c.groups),
        K_(c.K / c.groups),
        padded_C_(round_up(C_, kRun)),
        padded_K_(round_up(K_, kRun)),
        workspace_(workspace),
        counts_(counts),
        stream_(stream) {}

  int64_t used() const { return workspace_.used(); }

  Error forward(const Conv2dForward& t) {
    const Pass pass(c_, /*gradient=*/false, /*pools=*/t.argmax);
    const int64_t p = t.argmax ? 2 : 1;
    const View y = view(t.y, c_.groups, K_, c_.h.out / p, c_.w.out / p, c_.channels_last);
    const Finish finish(y, K_, t.bias, t.argmax, t.relu);
    if (!by_gemm(c_, estimate(c_, false)))
      return run([&] {
        return direct<T>(Direct(pass, input(t.x), filter(t.weight, false), finish), stream_);
      });
    const View x = packed_input(t.x);
    const void* const weight = packed_weight(t.weight);
    return run([&] {
      return gemm_pass<T>({pass, x, weight, padded_C_, padded_C_, finish}, c_.allow_tf32, stream_);
    });
  }

  Error backward(const Conv2dBackward& t) {
    const bool x_gemm = t.grad_x && by_gemm(c_, estimate(c_, true));
    const bool weight_gemm = t.grad_weight && by_gemm(c_, estimate_weight(c_));
    const View grad_y = gradient(t, x_gemm || weight_gemm);
    if (t.grad_x) grad_input(t, grad_y, x_gemm);
    if (t.grad_weight) grad_weight(t, grad_y, weight_gemm);
    return error_;
  }

 private:
  static constexpr int64_t kRun = Pack<T>::kSize;

  // What is launched, unless bytes are only counted, up to the first error.
  template <class F>
  Error run(const F& f) {
    if (!counts_ && error_ == 0) error_ = f();
    return error_;
  }

  View input(const void* x) const {
    return view(x, c_.groups, C_, c_.h.in, c_.w.in, c_.channels_last);
  }
  bool is_packed(const void* data, int64_t channels, bool channels_last) const {
    return channels_last && channels % kRun == 0 && aligned16(static_cast<const T*>(data));
  }
  Packing packing(const View& x, int64_t N, int64_t H, int64_t W, int64_t groups, int64_t channels,
                  int64_t padded, bool kept) {
    return {N,
            H,
            W,
            groups,
            channels,
            padded,
            x,
            kept ? workspace_.take(N * H * W * groups * padded * int64_t{sizeof(T)}) : nullptr};
  }
  View packed_input(const void* x) {
    if (is_packed(x, C_, c_.channels_last)) return input(x);
    const Packing p =
        packing(input(x), c_.N, c_.h.in, c_.w.in, c_.groups, C_, padded_C_, /*kept=*/true);
    run([&] { return pack<T>(p, stream_); });
    return view(p.to, c_.groups, padded_C_, c_.h.in, c_.w.in, true);
  }
  // (K, KH, KW, padded_C_)
  const void* packed_weight(const void* weight) {
    if (is_packed(weight, C_, c_.weight_channels_last)) return weight;
    const View from = view(weight, 1, C_, c_.h.taps, c_.w.taps, c_.weight_channels_last);
    const Packing p = packing(from, c_.K, c_.h.taps, c_.w.taps, 1, C_, padded_C_, /*kept=*/true);
    run([&] { return pack<T>(p, stream_); });
    return p.to;
  }
  // The weights as they are.
  WeightView filter(const void* weight, bool gradient) const {
    const View v = view(weight, 1, C_, c_.h.taps, c_.w.taps, c_.weight_channels_last);
    const int64_t so = gradient ? v.sc : v.sn, si = gradient ? v.sn : v.sc;
    return {weight, K_ * v.sn, so, si, v.sh, v.sw};
  }

  // grad_y of the convolution's output, masked, and packed where the matrix kernels want it, or
  // where it is not what is in memory. grad_bias on the way.
  View gradient(const Conv2dBackward& t, bool gemm) {
    const int64_t p = t.argmax ? 2 : 1;
    const View from = view(t.grad_y, c_.groups, K_, c_.h.out / p, c_.w.out / p, c_.channels_last);
    const bool wanted = t.grad_x || t.grad_weight;
    const bool as_it_is =
        !t.relu_y && !t.argmax && (!gemm || is_packed(t.grad_y, K_, c_.channels_last));
    if ((as_it_is || !wanted) && !t.grad_bias) return from;
    Packing packed = packing(from, c_.N, c_.h.out, c_.w.out, c_.groups, K_, padded_K_,
                             /*kept=*/wanted && !as_it_is);
    packed.relu_y = t.relu_y, packed.argmax = t.argmax;
    if (t.grad_bias) packed.sums = take_floats(packed.partials() * packed.width());
    run([&] { return pack<T>(packed, stream_); });
    if (t.grad_bias)
      run([&] {
        return sum_partials<T>({packed.sums, static_cast<int>(packed.partials()), c_.groups, 1,
                                packed.channels, packed.padded, /*planes=*/false, t.grad_bias},
                               stream_);
      });
    if (as_it_is || !wanted) return from;
    return view(packed.to, c_.groups, padded_K_, c_.h.out, c_.w.out, true);
  }

  void grad_input(const Conv2dBackward& t, const View& grad_y, bool gemm) {
    const Pass pass(c_, /*gradient=*/true, /*pools=*/false);
    const Finish finish(input(t.grad_x), C_, nullptr, nullptr, false);
    if (!gemm) {
      run([&] { return direct<T>(Direct(pass, grad_y, filter(t.weight, true), finish), stream_); });
      return;
    }
    const void* const weight = packed_weight(t.weight);
    run([&] {
      return gemm_pass<T>({pass, grad_y, weight, padded_K_, padded_C_, finish}, c_.allow_tf32,
                          stream_);
    });
  }

  void grad_weight(const Conv2dBackward& t, const View& grad_y, bool gemm) {
    const Pass pass(c_, /*gradient=*/false, /*pools=*/false);
    const int64_t padded = gemm ? padded_C_ : C_, weights = c_.K * taps(c_) * padded;
    const View x = gemm ? packed_input(t.x) : input(t.x);
    const int64_t rows = pass.rows();
    const int64_t blocks =
        gemm ? gemm_weight_blocks<T>(c_.groups, K_, taps(c_) * padded, c_.allow_tf32)
             : ceil_div(weights, kDirectThreads / kWarp);
    const int64_t splits = weight_splits(blocks, rows);
    const int64_t rows_a_split = ceil_div(rows, splits);
    float* const partials = take_floats(splits * weights);
    run([&] {
      if (gemm)
        return gemm_weight<T>(
            {pass, x, grad_y, padded_C_, padded_K_, partials, splits, rows_a_split}, c_.allow_tf32,
            stream_);
      return direct_weight<T>(
          {pass, x, grad_y, partials, weights, static_cast<int>(splits), rows_a_split}, stream_);
    });
    run([&] {
      return sum_partials<T>(
          {partials, static_cast<int>(splits), c_.K, static_cast<int>(taps(c_)),
           static_cast<int>(C_), static_cast<int>(padded), !c_.weight_channels_last, t.grad_weight},
          stream_);
    });
  }

  // Into how many parts the rows are cut: for two blocks a multiprocessor of a large GPU, each with
  // enough rows to be worth its store, and no more rows and numbers of x than 32 bits count.
  int64_t weight_splits(int64_t blocks, int64_t rows) const {
    const int64_t numbers = c_.N * c_.h.in * c_.w.in * c_.groups * padded_C_;
    return max(max(rows, numbers) / (1 << 30) + 1, min(ceil_div(2 * 132, blocks), rows / 512));
  }
  float* take_floats(int64_t n) {
    return static_cast<float*>(workspace_.take(n * int64_t{sizeof(float)}));
  }

  const Conv2d& c_;
  const int64_t C_, K_, padded_C_, padded_K_;  // channels a group
  Workspace workspace_;
  const bool counts_;
  const Stream stream_;
  Error error_ = 0;
};

// f(the passes of the conv's type)
template <class F>
Error with_passes(const Conv2d& c, void* workspace, bool counts, Stream stream, const F& f) {
  return with_type(c.dtype, [&](auto zero) {
    Passes<decltype(zero)> passes(c, workspace, counts, stream);
    return f(passes);
  });
}

}  // namespace

int64_t conv2d_workspace(const Conv2d& c, const Conv2dForward& tensors) {
  int64_t bytes = 0;
  with_passes(c, nullptr, /*counts=*/true, nullptr, [&](auto& passes) {
    const Error error = passes.forward(tensors);
    bytes = passes.used();
    return error;
  });
  return bytes;
}
Error conv2d(const Conv2d& c, const Conv2dForward& tensors, void* workspace, Stream stream) {
  return with_passes(c, workspace, /*counts=*/false, stream,
                     [&](auto& passes) { return passes.forward(tensors); });
}

int64_t conv2d_backward_workspace(const Conv2d& c, const Conv2dBackward& tensors) {
  int64_t bytes = 0;
  with_passes(c, nullptr, /*counts=*/true, nullptr, [&](auto& passes) {
    const Error error = passes.backward(tensors);
    bytes = passes.used();
    return error;
  });
  return bytes;
}
Error conv2d_backward(const Conv2d& c, const Conv2dBackward& tensors, void* workspace,
                      Stream stream) {
  return with_passes(c, workspace, /*counts=*/false, stream,
                     [&](auto& passes) { return passes.backward(tensors); });
}

}  // namespace dlkernels::cuda
