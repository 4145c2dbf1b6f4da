// The convolutions' passes on the CPU: an algorithm for each, and its work on all threads. The
// arithmetic is in cpu/conv2d/.
#include "ops/core/torch_headers.h"

#include <algorithm>

#include "ops/conv2d/algorithm.h"
#include "ops/conv2d/geometry.h"
#include "ops/core/memory.h"
#include "ops/core/parallel.h"

namespace dlkernels::conv {
namespace {

// The algorithm of a pass over N images, from the shape alone: the one with the fewest products for
// a pair of channels, where packing one weight takes the time of some hundred of these. Few
// channels do not make up for the transforms. What was measured is in docs/performance/conv2d.md.
const cpu::Conv2dKernels& choose(int64_t N, const cpu::Conv2d& v) {
  const cpu::Kernels& table = cpu::kernels();
  const auto is_plain_3x3 = [](const cpu::ConvAxis& a) {
    return a.taps == 3 && a.stride == 1 && a.dilation == 1 && a.up == 1;
  };
  const ConvAlgorithm forced = conv_algorithm();
  if (forced == ConvAlgorithm::kDirect) return table.conv2d;
  if (v.groups != 1) {
    const int64_t few = 8 * v.groups;  // above, direct's tiles fill their lanes as well
    return v.x.C <= few && v.K <= few ? table.depthwise : table.conv2d;
  }
  if (!is_plain_3x3(v.h) || !is_plain_3x3(v.w)) return table.conv2d;
  if (forced == ConvAlgorithm::kWinograd2) return table.winograd_2x2;
  if (forced == ConvAlgorithm::kWinograd4) return table.winograd_4x4;
  if (precision_is_ieee || v.x.C < 8 || v.K < 8 || v.x.C * v.K < 256) return table.conv2d;
  const auto products = [&](int64_t tile, double packing) {
    const auto tiles = [&](int64_t out) { return static_cast<double>((out + tile - 1) / tile); };
    const auto points = static_cast<double>((tile + 2) * (tile + 2));
    return static_cast<double>(N) * tiles(v.h.out) * tiles(v.w.out) * points + packing;
  };
  const double direct = products(1, 450), two = products(2, 400), four = products(4, 1600);
  if (four < two && four < direct) return table.winograd_4x4;
  return two < direct ? table.winograd_2x2 : table.conv2d;
}

double flops(const Geometry& g) {
  return 2.0 * static_cast<double>(g.N * g.K) * static_cast<double>(g.OH * g.OW) *
         static_cast<double>(g.c * g.KH * g.KW);
}

// `units` of work, `flops` in all, each on all panels: f(unit, panel, panel_end, scratch).
using Pass = c10::function_ref<void(int64_t, int64_t, int64_t, float*)>;
void parallel_units(int64_t units, int64_t panels, int64_t floats, double flops, Pass f) {
  // Where there are few, several threads share one, each with some of its panels.
  const int64_t parts = std::clamp<int64_t>(2 * at::get_num_threads() / units, 1, panels);
  const auto grain = static_cast<int64_t>(1 + 2e6 / (flops / (units * parts) + 1));
  parallel_chunks(units * parts, grain, [&](int64_t begin, int64_t end) {
    float* const memory = scratch(floats);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i % parts;
      f(i / parts, panels * part / parts, panels * (part + 1) / parts, memory);
    }
  });
}

// Sums over all pixels of all images. The blocks are cut into chunks, each with sums of its own, by
// a rule of the shape alone: same bits always.
void sum_gradients(const Geometry& g, const cpu::Images& grad_y, const Tensor& x,
                   const Tensor& grad_weight, const Tensor& grad_bias) {
  const cpu::Conv2d v = g.forward(x);
  const cpu::Conv2dKernels& kernels = choose(g.N, v);
  const int64_t blocks = g.N * kernels.blocks(v), batch = kernels.batch(v);
  const int64_t batches = (blocks + batch - 1) / batch, panels = kernels.panels(v);
  const int64_t size = grad_weight.defined() ? kernels.sum_floats(v) : 0;
  const int64_t bias_size = grad_bias.defined() ? g.K : 0;
  const int64_t chunks =
      std::clamp<int64_t>((int64_t{1} << 22) / (size + 1), 1, std::min<int64_t>(batches, 8));
  const Tensor sums = at::empty({chunks, size}, at::kFloat);
  const Tensor bias_sums = at::empty({chunks, bias_size}, at::kFloat);
  float* const to = size ? sums.mutable_data_ptr<float>() : nullptr;
  float* const bias_to = bias_size ? bias_sums.mutable_data_ptr<float>() : nullptr;
  parallel_units(chunks, panels, kernels.scratch(v), flops(g),
                 [&](int64_t i, int64_t panel, int64_t panel_end, float* memory) {
                   const int64_t begin = batches * i / chunks * batch;
                   const int64_t end = std::min(batches * (i + 1) / chunks * batch, blocks);
                   kernels.grad_weight(v, grad_y, begin, end, panel, panel_end,
                                       to ? to + i * size : nullptr,
                                       bias_to ? bias_to + i * bias_size : nullptr, memory);
                 });
  // All chunks into the first: each element is read before it is written.
  const auto reduce = [&](float* partial, int64_t n, float* result) {
    parallel_chunks(n, 65536, [&](int64_t begin, int64_t end) {
      cpu::kernels().sum_rows(partial, chunks, n, result, begin, end);
    });
  };
  if (bias_to) {
    const Tensor total = empty_float32(grad_bias);
    reduce(bias_to, bias_size, total.mutable_data_ptr<float>());
    if (!total.is_same(grad_bias)) grad_bias.copy_(total);
  }
  if (to) {
    reduce(to, size, to);
    void* const result = grad_weight.mutable_data_ptr();
    parallel_chunks(panels, 1 + 20000 * panels / size, [&](int64_t begin, int64_t end) {
      kernels.unpack(v, to, g.filter(grad_weight), result, begin, end);
    });
  }
}

}  // namespace

void convolve(const Geometry& g, const cpu::Conv2d& v, const cpu::Filter& filter) {
  const cpu::Conv2dKernels& kernels = choose(g.N, v);
  const int64_t panels = kernels.panels(v), panel_floats = kernels.panel_floats(v);
  const Tensor packed = at::empty({panels * panel_floats}, at::kFloat);
  float* const weights = packed.mutable_data_ptr<float>();
  parallel_chunks(panels, 1 + 20000 / panel_floats, [&](int64_t begin, int64_t end) {
    kernels.pack(v, filter, weights, begin, end);
  });
  const int64_t blocks = g.N * kernels.blocks(v), batch = kernels.batch(v);
  parallel_units((blocks + batch - 1) / batch, panels, kernels.scratch(v), flops(g),
                 [&](int64_t i, int64_t panel, int64_t panel_end, float* memory) {
                   const int64_t end = std::min((i + 1) * batch, blocks);
                   kernels.forward(v, weights, i * batch, end, panel, panel_end, memory);
                 });
}

void gradients(const Geometry& g, const cpu::Images& grad_y, const Tensor& input,
               const Tensor& weight, const Grads& out) {
  const auto& [grad_input, grad_weight, grad_bias] = out;
  if (grad_input.defined()) {
    cpu::Conv2d v = g.backward(grad_y);
    g.set_output(v, grad_input, g.images(grad_input, g.C, g.H, g.W));
    convolve(g, v, g.reversed(weight));
  }
  if (grad_weight.defined() || grad_bias.defined())
    sum_gradients(g, grad_y, batched(input).contiguous(g.format()), grad_weight, grad_bias);
}

}  // namespace dlkernels::conv
