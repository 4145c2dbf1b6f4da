// The arguments of max_pool2d and the shapes that follow from them, for max_pool2d.cpp
// and conv2d_relu_max_pool2d.cpp.
#pragma once
#include "ops/core/torch_headers.h"

#include <algorithm>
#include <array>

#include "ops/core/eligibility.h"

namespace dlkernels::pool {

using at::IntArrayRef;
using c10::SymInt;
using c10::SymIntArrayRef;

// As constants, which torch.compile then guards on.
inline at::DimVector ints(SymIntArrayRef values) {
  at::DimVector constants;
  for (const SymInt& v : values) constants.push_back(v.guard_int(__FILE__, __LINE__));
  return constants;
}

// The arguments but for input: checked, and all below 2^31, so that no product of two overflows.
struct Window {
  const char* op;
  std::array<int64_t, 8> sizes;  // kernel_size, stride, padding, dilation: (h, w) each
  bool ceil_mode;

  Window(const char* op, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding,
         IntArrayRef dilation, bool ceil_mode)
      : op(op), ceil_mode(ceil_mode) {
    set(0, "kernel size should be greater than zero", kernel_size, 1);
    set(2, "stride should be greater than zero", stride.empty() ? kernel_size : stride, 1);
    set(4, "pad must be non-negative", padding, 0);
    set(6, "dilation should be greater than zero", dilation, 1);
    for (const int i : {0, 1})
      TORCH_CHECK(sizes[4 + i] <= sizes[i] / 2, op, ": pad should be at most half of effective ",
                  "kernel size, but got pad=", padding, " and kernel_size=", kernel_size);
  }
  Window(const char* op, IntArrayRef sizes, bool ceil_mode)
      : Window(op, pair_of(sizes, 0), pair_of(sizes, 2), pair_of(sizes, 4), pair_of(sizes, 6),
               ceil_mode) {}

  static IntArrayRef pair_of(IntArrayRef window, size_t at) {
    TORCH_CHECK(window.size() == 8,
                "max_pool2d: window must be kernel_size, stride, padding and "
                "dilation, got ",
                window);
    return window.slice(at, 2);
  }
  // The rule is PyTorch's text.
  void set(int at, const char* rule, IntArrayRef values, int64_t min) {
    TORCH_CHECK((values.size() == 1 || values.size() == 2) && values.front() >= min &&
                    values.back() >= min && std::max(values.front(), values.back()) <= INT32_MAX,
                op, ": ", rule, ", one or two ints below 2^31, but got ", values);
    sizes[at] = values.front(), sizes[at + 1] = values.back();
  }

  PoolAxis axis(int i, int64_t in, int64_t out) const {
    return {in, out, sizes[i], sizes[2 + i], sizes[4 + i], sizes[6 + i]};
  }
  IntArrayRef kernel_size() const { return pair_of(sizes, 0); }
  IntArrayRef stride() const { return pair_of(sizes, 2); }
  IntArrayRef padding() const { return pair_of(sizes, 4); }
  IntArrayRef dilation() const { return pair_of(sizes, 6); }
  // A position in a window must fit a byte, and leave 255 for none.
  bool fits_argmax() const { return sizes[0] * sizes[1] <= kNoElement; }
};

inline bool has_kernel(const Window& window, const Tensor& input) {
  return is_supported(input) && window.fits_argmax();
}

inline SymInt output_size(const Window& window, int i, const SymInt& in) {
  const PoolAxis a = window.axis(i, 0, 0);
  const int64_t span = (a.kernel - 1) * a.dilation + 1, extra = window.ceil_mode ? a.stride - 1 : 0;
  TORCH_CHECK(in.is_symbolic() || in.expect_int() < INT64_MAX / 2, window.op,
              ": input must be smaller, got a side of ", in);
  TORCH_CHECK(in >= 1 && in + (2 * a.pad + extra) >= span, window.op,
              ": Output size is too small: input and padding must hold a window, of ", span,
              ", got ", in, " and padding ", a.pad);
  const SymInt out = (in + (2 * a.pad - span + extra)) / a.stride + 1;
  // With ceil_mode the last window still starts inside the input or the padding before it.
  return window.ceil_mode && (out - 1) * a.stride >= in + a.pad ? out - 1 : out;
}

// input ([N,] C, H, W) -> ([N,] C, OH, OW), laid out like input
inline Tensor new_output(const Window& window, const Tensor& input, at::ScalarType dtype) {
  const int64_t dim = input.dim();
  TORCH_CHECK(dim == 3 || dim == 4, window.op,
              ": non-empty 3D or 4D (batch mode) tensor expected for input, but got ",
              input.sym_sizes());
  for (const int i : {-3, -2, -1})
    TORCH_CHECK(input.sym_size(i) != 0, window.op,
                ": Expected 3D or 4D (batch mode) tensor with optional 0 dim batch size for input, "
                "but got ",
                input.sym_sizes());
  c10::SymDimVector sizes(input.sym_sizes().begin(), input.sym_sizes().end());
  for (const int i : {0, 1}) sizes[dim - 2 + i] = output_size(window, i, sizes[dim - 2 + i]);
  return at::empty_symint(sizes, input.options().dtype(dtype), input.suggest_memory_format());
}

// (H, W)
inline SymIntArrayRef plane(const Tensor& input) {
  return input.sym_sizes().slice(input.dim() - 2);
}

// argmax must be what an input of input_size gives.
inline void check_argmax(const Window& window, const Tensor& argmax, SymIntArrayRef input_size) {
  const int64_t dim = argmax.dim();
  TORCH_CHECK(
      argmax.scalar_type() == at::kByte && argmax.layout() == at::kStrided &&
          (dim == 3 || dim == 4) && input_size.size() == 2 && window.fits_argmax(),
      window.op, ": argmax must be uint8 of ([N,] C, OH, OW), input_size (H, W) and windows ",
      "of at most 255 elements, got argmax ", argmax.scalar_type(), " of ", argmax.sym_sizes(),
      ", input_size ", input_size, " and windows of ", window.kernel_size());
  for (const int i : {0, 1}) {
    const SymInt expected = output_size(window, i, input_size[i]);
    TORCH_CHECK(argmax.sym_size(i - 2) == expected, window.op, ": argmax must have dimension ",
                i - 2, " of ", expected, " for input_size ", input_size, ", got ",
                argmax.sym_sizes());
  }
}

// A window may lie all in the padding and in the holes of its dilation: PyTorch's kernels then
// write outside of their tensors. Ours give -inf.
inline void check_no_empty_window(const Window& window, const Tensor& input) {
  if (input.dim() < 2 || input.is_nested()) return;
  for (const int i : {0, 1}) {
    const PoolAxis a = window.axis(i, 0, 0);
    const SymInt in = input.sym_size(i - 2);
    if (a.pad == 0 || a.dilation == 1 || in >= a.dilation) continue;
    if (input.sym_numel() == 0) return;  // where they write nothing
    const SymInt out = output_size(window, i, in);
    for (int64_t o = 0; o * a.stride < a.pad && out > o; ++o) {
      const int64_t first = a.dilation - 1 - (a.pad - o * a.stride - 1) % a.dilation;  // from 0 on
      TORCH_CHECK(in > first, window.op,
                  ": every window must hold an element of the input, got one of padding only: "
                  "input ",
                  input.sym_sizes(), ", window ", IntArrayRef(window.sizes));
    }
  }
}

}  // namespace dlkernels::pool
