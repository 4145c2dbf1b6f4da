// The kernel table of one instruction set. An isa_<name>.cpp includes its simd header, sets ISA,
// and includes this file. Only <immintrin.h> and <cstdint> may be included in such a file: an
// inline std:: function compiled here could be the copy the linker keeps for all machines.
#include "kernels.h"

namespace dlkernels::cpu {
namespace {
#include "lanes.inl.h"
#include "math.inl.h"
#include "pack.inl.h"
#include "tile.inl.h"
#include "block.inl.h"

#include "gemm.inl.h"
#include "cut.inl.h"
#include "few_outputs.inl.h"
#include "optim.inl.h"

#include "adadelta.inl.h"
#include "adagrad.inl.h"
#include "adam.inl.h"
#include "conv2d.inl.h"
#include "cross_entropy.inl.h"
#include "depthwise.inl.h"
#include "dot.inl.h"
#include "max_pool2d.inl.h"
#include "max_pool2d_backward.inl.h"
#include "probe.inl.h"
#include "relu.inl.h"
#include "rmsprop.inl.h"
#include "sgd.inl.h"
#include "winograd.inl.h"
}  // namespace

#define STRING_(x) #x
#define STRING(x) STRING_(x)
constinit const Kernels ISA = {
    .isa = STRING(ISA),
    .gemm = gemm,
    .gemm_scratch = kGemmScratch,
    .gemm_part_size = gemm_part_size,
    .gemm_dot = gemm_dot,
    .conv2d = kConv2d,
    .depthwise = kDepthwise,
    .winograd_4x4 = kWinograd<4>,
    .winograd_2x2 = kWinograd<2>,
    .sum_rows = sum_rows,
    .relu = relu,
    .relu_backward = relu_backward,
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
