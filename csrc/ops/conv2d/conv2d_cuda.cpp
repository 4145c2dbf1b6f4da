// The convolutions' passes on CUDA, for conv2d.cpp and conv2d_relu_max_pool2d.cpp. The kernels are
// in cuda/conv2d.cu.
#include "ops/core/torch_headers.h"

#include <ATen/Context.h>

#include "ops/conv2d/algorithm.h"
#include "ops/conv2d/geometry.h"

namespace dlkernels::conv {

namespace {

cuda::Conv2d described(const Geometry& g, const Tensor& input, bool channels_last,
                       bool weight_channels_last) {
  return {
      .dtype = dtype_of(input),
      .N = g.N,
      .C = g.C,
      .K = g.K,
      .groups = g.groups,
      .h = {g.H, g.OH, g.KH, g.stride[0], g.padding[0], g.dilation[0]},
      .w = {g.W, g.OW, g.KW, g.stride[1], g.padding[1], g.dilation[1]},
      .channels_last = channels_last,
      .weight_channels_last = weight_channels_last,
      .allow_tf32 = !precision_is_ieee && at::globalContext().allowTF32CuDNN(at::Float32Op::CONV),
      .algorithm = conv2d_force() == cpu::Conv2dForce::kDirect ? cuda::Conv2dAlgorithm::kDirect
                                                               : cuda::Conv2dAlgorithm::kFastest};
}

Tensor workspace(const Tensor& like, int64_t bytes) {
  return at::empty({bytes}, like.options().dtype(at::kByte));
}

at::MemoryFormat format(bool channels_last) {
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

const void* data(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
void* new_data(const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

}  // namespace

void forward_cuda(const char* op, const Geometry& g, const Tensor& input, const Tensor& weight,
                  const optional<Tensor>& bias, bool channels_last, bool relu, const Tensor& y,
                  const optional<Tensor>& argmax) {
  const bool weight_last = weight.is_contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor x = batched(input).contiguous(format(channels_last));
  const Tensor w = weight.contiguous(format(weight_last));
  const Tensor b = bias ? bias->contiguous() : Tensor();
  const cuda::Conv2d conv = described(g, x, channels_last, weight_last);
  const cuda::Conv2dForward tensors = {data(x),
                                       data(w),
                                       data(b),
                                       new_data(y),
                                       argmax ? argmax->mutable_data_ptr<uint8_t>() : nullptr,
                                       relu};
  launch(op, x, [&](const cuda::Kernels& kernels, cuda::Stream stream) {
    const Tensor memory = workspace(x, kernels.conv2d_workspace(conv, tensors));
    return kernels.conv2d(conv, tensors, memory.mutable_data_ptr(), stream);
  });
}

void gradients_cuda(const char* op, const Geometry& g, const Tensor& grad_y, const Tensor& relu_y,
                    const Tensor& argmax, const Tensor& input, const Tensor& weight,
                    const Grads& out) {
  const auto dense = [&](const Tensor& t) {
    return t.defined() ? batched(t).contiguous(g.format()) : t;
  };
  const Tensor gy = dense(grad_y), yc = dense(relu_y), x = dense(input);
  const Tensor w = weight.contiguous(g.format());  // as grad_weight
  const Tensor elements =
      argmax.defined() ? batched(argmax).contiguous(at::MemoryFormat::ChannelsLast) : argmax;
  const auto& [grad_input, grad_weight, grad_bias] = out;
  const cuda::Conv2d conv = described(g, x, g.channels_last, g.channels_last);
  const cuda::Conv2dBackward tensors = {data(gy),
                                        data(yc),
                                        static_cast<const uint8_t*>(data(elements)),
                                        data(x),
                                        data(w),
                                        new_data(grad_input),
                                        new_data(grad_weight),
                                        new_data(grad_bias)};
  launch(op, x, [&](const cuda::Kernels& kernels, cuda::Stream stream) {
    const Tensor memory = workspace(x, kernels.conv2d_backward_workspace(conv, tensors));
    return kernels.conv2d_backward(conv, tensors, memory.mutable_data_ptr(), stream);
  });
}

}  // namespace dlkernels::conv
