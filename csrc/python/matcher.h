// For module.cpp: what dlkernels.nn.Sequential finds the ops of its modules by.
#pragma once
#include <pybind11/pybind11.h>

namespace dlkernels {

// find_in_python() of dlkernels/_convert/patterns.py, by the tables there. torch.compile can't look
// into it.
pybind11::object matcher(const pybind11::dict& known, const pybind11::dict& tree,
                         const pybind11::tuple& global_hooks,
                         const pybind11::tuple& global_methods);

}  // namespace dlkernels
