// For module.cpp: what dlkernels.functional calls the ops by.
#pragma once
#include <pybind11/pybind11.h>

namespace dlkernels {

// overload (a torch._ops.OpOverload that gives tensors) as a function that calls it in half the
// time. Arguments that are no plain tensors and numbers, and everything under a torch function
// mode, go to overload itself. torch.compile can't look into it.
pybind11::object direct(const pybind11::object& overload);

}  // namespace dlkernels
