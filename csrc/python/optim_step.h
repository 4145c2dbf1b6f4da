// For module.cpp: what the optimizers of dlkernels.optim call.
#pragma once
#include <pybind11/pybind11.h>

#include <string>
#include <tuple>
#include <vector>

namespace dlkernels {

// Parameters, the keys of their states in the order of the op's lists (None for an option that is
// off), and the op's scalars: numbers, lr first, and options.
using OptimGroup = std::tuple<pybind11::object, pybind11::tuple, pybind11::tuple, pybind11::tuple>;

// A step of all groups of parameters by the op of that name: True; or, with nothing done, False
// where not all of it is for our op, and None where all of it may be, once every state is there.
// state: {parameter: {key: tensor}}
// grad_scale, found_inf: a tensor or None
pybind11::object optim_step(const std::string& op, const pybind11::dict& state,
                            const std::vector<OptimGroup>& groups,
                            const pybind11::object& grad_scale, const pybind11::object& found_inf);

}  // namespace dlkernels
