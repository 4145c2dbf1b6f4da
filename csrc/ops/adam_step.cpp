// A step of dlkernels.optim.Adam: collects the tensors of every parameter group and calls adam_ for
// each. In C++, because for hundreds of small parameters Python's part takes longer than the
// arithmetic: the hash of a tensor alone is a call of a Python function.
#include "adam_step.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

#include "common.h"

namespace dlkernels {
namespace {

using AdamOp = void(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                    at::TensorList exp_avg_sqs, at::TensorList state_steps, double lr, double beta1,
                    double beta2, double weight_decay, double eps, bool maximize,
                    bool decoupled_weight_decay, const optional<Tensor>& grad_scale,
                    const optional<Tensor>& found_inf);

struct Lists {
  std::vector<Tensor> params, grads, exp_avgs, exp_avg_sqs, steps;
};

// A list that is written must not hold tensors with the negative bit: the dispatcher refuses it.
bool is_for_list(const Tensor& t) { return is_plain(t) && t.is_cpu() && !t.is_neg(); }

// A plain tensor, or null.
const Tensor* plain(PyObject* object) {
  if (!object || !THPVariable_CheckExact(object)) return nullptr;
  const Tensor& t = THPVariable_Unpack(object);
  return is_for_list(t) ? &t : nullptr;
}

// The states of parameters, which mostly come in the parameters' order: then no key is looked up.
struct States {
  PyObject* dict;
  Py_ssize_t at = 0;
  bool in_order = true;  // so far

  // Borrowed; null where there is none.
  PyObject* of(PyObject* param) {
    PyObject *key = nullptr, *value = nullptr;
    if (in_order && PyDict_Next(dict, &at, &key, &value) && key == param) return value;
    in_order = false;
    value = PyDict_GetItemWithError(dict, param);
    if (!value && PyErr_Occurred()) throw pybind11::error_already_set();
    return value;
  }
};

// False where a tensor is not plain, has no state yet, or stands here twice.
bool collect(PyObject* params, States& states, Lists& lists) {
  static PyObject* const names[] = {PyUnicode_InternFromString("exp_avg"),
                                    PyUnicode_InternFromString("exp_avg_sq"),
                                    PyUnicode_InternFromString("step")};
  if (!PyList_CheckExact(params)) return false;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
    PyObject* const object = PyList_GET_ITEM(params, i);
    const Tensor* const param = plain(object);
    if (!param) return false;
    const Tensor& grad = param->grad();
    if (!grad.defined()) continue;
    if (!is_for_list(grad) || at::isTensorSubclassLike(grad)) return false;
    PyObject* const state = states.of(object);
    if (!state || !PyDict_CheckExact(state)) return false;
    const Tensor* t[3];
    for (int k = 0; k < 3; ++k)
      if (!(t[k] = plain(PyDict_GetItemWithError(state, names[k])))) return false;
    lists.params.push_back(*param), lists.grads.push_back(grad);
    lists.exp_avgs.push_back(*t[0]), lists.exp_avg_sqs.push_back(*t[1]);
    lists.steps.push_back(*t[2]);
  }
  if (states.in_order) return true;  // the keys of a dict differ
  std::vector<const void*> seen;
  for (const Tensor& t : lists.params) seen.push_back(t.unsafeGetTensorImpl());
  std::sort(seen.begin(), seen.end());
  return std::adjacent_find(seen.begin(), seen.end()) == seen.end();
}

}  // namespace

bool adam_step(const pybind11::dict& state,
               const std::vector<std::pair<pybind11::list, AdamScalars>>& groups,
               const pybind11::object& grad_scale, const pybind11::object& found_inf) {
  optional<Tensor> scales[2];
  for (const int i : {0, 1})
    if (const pybind11::object& object = i ? found_inf : grad_scale; !object.is_none()) {
      const Tensor* const t = plain(object.ptr());
      if (!t) return false;
      scales[i] = *t;
    }
  std::vector<Lists> all(groups.size());
  States states = {state.ptr()};
  for (size_t i = 0; i < groups.size(); ++i)
    if (!collect(groups[i].first.ptr(), states, all[i])) return false;
  static const auto op = find_op<AdamOp>("dlkernels::adam_");
  const pybind11::gil_scoped_release no_gil;
  const at::NoGradGuard no_grad;
  for (size_t i = 0; i < groups.size(); ++i) {
    const auto& [params, grads, exp_avgs, exp_avg_sqs, steps] = all[i];
    if (params.empty()) continue;
    std::apply(
        [&](auto... scalars) {
          op.call(params, grads, exp_avgs, exp_avg_sqs, steps, scalars..., scales[0], scales[1]);
        },
        groups[i].second);
  }
  return true;
}

}  // namespace dlkernels
