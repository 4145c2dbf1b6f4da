// PyTorch's headers that every op includes, 14 of the 26 s that one took to compile. setup.py
// precompiles them, which counts where a source includes this before all else.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/stack.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <optional>

namespace dlkernels {

using at::Tensor;
using std::optional;

}  // namespace dlkernels
