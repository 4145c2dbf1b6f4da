// For module.cpp: what dlkernels.optim.Adam calls.
#pragma once
#include <pybind11/pybind11.h>

#include <tuple>
#include <utility>
#include <vector>

namespace dlkernels {

// lr, beta1, beta2, weight_decay, eps, maximize, decoupled_weight_decay
using AdamScalars = std::tuple<double, double, double, double, double, bool, bool>;

// A step of all groups of parameters; false, with nothing done, where not all of it is for our op.
// state: {parameter: {"exp_avg": tensor, "exp_avg_sq": tensor, "step": tensor}}
// grad_scale, found_inf: a tensor or None
bool adam_step(const pybind11::dict& state,
               const std::vector<std::pair<pybind11::list, AdamScalars>>& groups,
               const pybind11::object& grad_scale, const pybind11::object& found_inf);

}  // namespace dlkernels
