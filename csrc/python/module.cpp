// dlkernels._C: importing it loads this library, and loading it runs the registrations of csrc/ops.
// The functions below are what the library says about itself, the ops as functions, and the
// optimizers' step.
#include "ops/core/torch_headers.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/kernels.h"
#include "ops/conv2d/algorithm.h"
#include "ops/core/cuda.h"
#include "ops/core/stats.h"
#include "python/direct.h"
#include "python/matcher.h"
#include "python/optim_step.h"

namespace py = pybind11;

TORCH_LIBRARY(dlkernels, /*m*/) {}

PYBIND11_MODULE(_C, m) {
  using namespace dlkernels;
  m.def("isa", [] { return cpu::kernels().isa; }, "The instruction set the kernels run on.");
  m.def("multiplies_bfloat16", &cpu::multiplies_bfloat16, "Whether PyTorch does that faster.");
  m.def("set_isa", &cpu::set_isa, "Change it (tests, benchmarks); False where the machine can't.");
  m.def(
      "stats",
      [] {
        py::dict all;
        for (OpStats* s = OpStats::first; s; s = s->next)
          all[s->name] = py::make_tuple(s->kernel.load(), s->aten.load());
        return all;
      },
      "{op: (calls of our kernel, calls left to PyTorch)}");
  m.def(
      "ops",
      [] {
        py::dict all;
        for (const OpSupport* s = OpSupport::first; s; s = s->next)
          all[s->name] = py::make_tuple(s->cuda, s->gemm);
        return all;
      },
      "{public op: (whether it has a CUDA kernel, whether it is a matrix product)}");
  m.def("reset_stats", [] {
    for (OpStats* s = OpStats::first; s; s = s->next) s->kernel = s->aten = 0;
  });
  m.def(
      "torch_ran",
      [](const std::string& op) {
        for (OpStats* s = OpStats::first; s; s = s->next)
          if (op == s->name) s->aten_ran();
      },
      "Count a call that Python left to PyTorch; raises where set_fallback_error says so.");
  m.def(
      "multiply_add",
      [](int64_t times) {
        const cpu::Kernels& table = cpu::kernels();
        const int64_t threads = at::get_num_threads();
        std::atomic<int64_t> finite = 0;
        at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) finite += std::isfinite(table.multiply_add(times));
        });
        return finite * times * table.multiply_add_flops;
      },
      "Multiply-adds alone, on all threads: how many FLOPs were done (the roof in benchmarks).");
  m.def("direct", &direct, "An OpOverload as a function that takes less time to call it.");
  m.def("matcher", &matcher, "The function that finds which modules in a row run as one op.");
  m.def(
      "optim_step", &optim_step,
      "An optimizer's op on [(parameters, keys of their states, scalars)] with the state of their "
      "optimizer, grad_scale and found_inf: True; or, with nothing done, False where not all of "
      "it is for our op, None where states are missing.");
  m.def("load_cuda", &load_cuda, "Load the CUDA kernels from the library at this path.");
  m.def(
      "set_cuda_capability",
      [](int device, int capability) { dlkernels::capability(device) = capability; },
      "Take a device for an older one, as 75 (tests); 0: ask it again.");
  m.def("set_cuda_reason", [](const std::string& reason) { cuda_reason = reason; });
  m.def("set_fallback_error", [](bool error) { return fallback_is_error.exchange(error); });
  m.def("set_precision_ieee", [](bool ieee) { return precision_is_ieee.exchange(ieee); });
  m.def(
      "set_conv_algorithm",
      [](const std::string& name) {
        const auto before = forced_conv2d.exchange(find_conv2d_force(name.c_str()));
        return kConv2dForces[static_cast<int>(before)];
      },
      "Change what DLKERNELS_CONV forces (tests); what it was.");
}
