// The kernel table of one instruction set. An isa_<name>.cpp includes its simd header, sets ISA,
// and includes this file. Only <immintrin.h> and <cstdint> may be included in such a file: an
// inline std:: function compiled here could be the copy the linker keeps for all machines.
#pragma once
#include "cpu/kernels.h"
#include "cpu/conv2d/depthwise.inl.h"
#include "cpu/conv2d/direct.inl.h"
#include "cpu/conv2d/scatter.inl.h"
#include "cpu/conv2d/small_k.inl.h"
#include "cpu/conv2d/winograd.inl.h"
#include "cpu/cross_entropy.inl.h"
#include "cpu/gemm/dot.inl.h"
#include "cpu/gemm/gemm.inl.h"
#include "cpu/leaky_relu.inl.h"
#include "cpu/optim/adadelta.inl.h"
#include "cpu/optim/adagrad.inl.h"
#include "cpu/optim/adam.inl.h"
#include "cpu/optim/rmsprop.inl.h"
#include "cpu/optim/sgd.inl.h"
#include "cpu/pool2d/max_pool2d.inl.h"
#include "cpu/pool2d/max_pool2d_backward.inl.h"
#include "cpu/probe.inl.h"
#include "cpu/relu.inl.h"

namespace dlkernels::cpu {

#define STRING_(x) #x
#define STRING(x) STRING_(x)
constinit const Kernels ISA = {
    .isa = STRING(ISA),
    .gemm = gemm,
    .gemm_scratch = kGemmScratch,
    .gemm_chunk_size = gemm_chunk_size,
    .gemm_dot = gemm_dot,
    .direct = kDirect,
    .small_k = kSmallK,
    .scatter = kScatter,
    .depthwise = kDepthwise,
    .winograd_4x4 = kWinograd<4>,
    .winograd_2x2 = kWinograd<2>,
    .sum_rows = sum_rows,
    .relu = relu,
    .relu_backward = relu_backward,
    .leaky_relu = leaky_relu,
    .leaky_relu_backward = leaky_relu_backward,
    .max_pool2d = max_pool2d,
    .max_pool2d_backward = max_pool2d_backward,
    .max_pool2d_indices = max_pool2d_indices,
    .sgd = sgd,
    .adam = adam,
    .adagrad = adagrad,
    .adadelta = adadelta,
    .rmsprop = rmsprop,
    .cross_entropy = cross_entropy,
    .cross_entropy_backward = cross_entropy_backward,
    .multiply_add_flops = 2 * kProbeChains * Vec::kWidth,
    .multiply_add = multiply_add,
};

}  // namespace dlkernels::cpu
