// A step of an optimizer: collects the tensors of every parameter group and calls the op for each.
// In C++, because for hundreds of small parameters Python's part takes longer than the arithmetic:
// the hash of a tensor alone is a call of a Python function.
#include "ops/core/torch_headers.h"

#include "python/optim_step.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>

#include "ops/optim/optim.h"

namespace dlkernels {
namespace {

using Lists = std::vector<std::vector<Tensor>>;  // params, grads, and one for each key

// A list that is written must not hold tensors with the negative bit: the dispatcher refuses it.
bool is_for_list(const Tensor& t) { return is_plain(t) && !t.is_neg(); }

// A plain tensor on the CPU, or on CUDA if that will do; or null.
const Tensor* plain(PyObject* object, bool cuda) {
  if (!object || !THPVariable_CheckExact(object)) return nullptr;
  const Tensor& t = THPVariable_Unpack(object);
  return (t.is_cpu() || (cuda && t.is_cuda())) && is_for_list(t) ? &t : nullptr;
}

// Borrowed; null where there is none.
PyObject* get(PyObject* dict, PyObject* key) {
  PyObject* const value = PyDict_GetItemWithError(dict, key);
  if (!value && PyErr_Occurred()) throw pybind11::error_already_set();
  return value;
}

// The states of parameters, which mostly come in the parameters' order: then no key is looked up.
struct States {
  PyObject* dict;
  Py_ssize_t at = 0;
  bool in_order = true;  // so far

  PyObject* of(PyObject* param) {
    PyObject *key = nullptr, *value = nullptr;
    if (in_order && PyDict_Next(dict, &at, &key, &value) && key == param) return value;
    in_order = false;
    return get(dict, param);
  }
};

enum class Found { kAll, kNotOurs, kNoState };

// The states' tensors by their keys.
Found collect_state(PyObject* state, const pybind11::tuple& keys, bool cuda, Lists& lists) {
  if (!state) return Found::kNoState;
  if (!PyDict_CheckExact(state)) return Found::kNotOurs;
  for (size_t k = 0; k < keys.size(); ++k) {
    PyObject* const key = PyTuple_GET_ITEM(keys.ptr(), k);
    if (key == Py_None) continue;
    PyObject* const value = get(state, key);
    if (!value || value == Py_None) return Found::kNoState;
    const Tensor* const t = plain(value, cuda);
    if (!t) return Found::kNotOurs;
    lists[2 + k].push_back(*t);
  }
  return Found::kAll;
}

// kNotOurs where a tensor is not plain, or its state stands here twice.
Found collect(PyObject* params, const pybind11::tuple& keys, bool cuda, States& states,
              Lists& lists) {
  if (!PyList_CheckExact(params)) return Found::kNotOurs;
  const bool stateless = std::all_of(keys.begin(), keys.end(), [](auto k) { return k.is_none(); });
  Found found = Found::kAll;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
    PyObject* const object = PyList_GET_ITEM(params, i);
    const Tensor* const param = plain(object, cuda);
    if (!param) return Found::kNotOurs;
    const Tensor& grad = param->grad();
    if (!grad.defined()) continue;
    if (!is_for_list(grad) || at::isTensorSubclassLike(grad)) return Found::kNotOurs;
    lists[0].push_back(*param), lists[1].push_back(grad);
    if (stateless) continue;
    const Found state = collect_state(states.of(object), keys, cuda, lists);
    if (state == Found::kNotOurs) return state;
    if (state == Found::kNoState) found = state;
  }
  if (stateless || states.in_order) return found;  // the keys of a dict differ
  std::vector<const void*> seen;
  for (const Tensor& t : lists[0]) seen.push_back(t.unsafeGetTensorImpl());
  std::sort(seen.begin(), seen.end());
  const bool twice = std::adjacent_find(seen.begin(), seen.end()) != seen.end();
  return twice ? Found::kNotOurs : found;
}

// numpy's numbers, of which float64 alone is a float of Python's.
bool is_numpy_number(PyObject* object) {
  const auto numpy = pybind11::reinterpret_steal<pybind11::object>(
      PyImport_GetModule(pybind11::str("numpy").ptr()));
  return numpy && (pybind11::isinstance(object, numpy.attr("floating")) ||
                   pybind11::isinstance(object, numpy.attr("integer")));
}

// A number that is finite in float32, too. What a group was given by hand, PyTorch has not checked
// yet.
optional<double> number(PyObject* object) {
  double x = 0;
  if (PyFloat_Check(object)) {
    x = PyFloat_AS_DOUBLE(object);
  } else if ((PyLong_Check(object) && !PyBool_Check(object)) || is_numpy_number(object)) {
    x = PyFloat_AsDouble(object);
    if (PyErr_Occurred()) PyErr_Clear(), x = INFINITY;
  } else {
    return std::nullopt;
  }
  return std::abs(x) < 1e38 ? optional(x) : std::nullopt;
}

struct Scalars {
  std::vector<double> values;  // none where one of the numbers is none
  optional<Tensor> device_lr;  // in place of the first of them
};

// lr may be a tensor. One on the device is read there, so that a step can be captured. Options may
// be anything that is true or false.
Scalars collect_scalars(const pybind11::tuple& numbers, const pybind11::tuple& options,
                        bool on_device) {
  Scalars scalars;
  scalars.values.reserve(numbers.size() + options.size());
  for (size_t i = 0; i < numbers.size(); ++i) {
    PyObject* const object = PyTuple_GET_ITEM(numbers.ptr(), i);
    optional<double> x;
    if (i == 0 && THPVariable_CheckExact(object)) {
      const Tensor& lr = THPVariable_Unpack(object);
      if (lr.is_complex() || lr.numel() != 1 || lr.requires_grad()) return {};
      if (on_device && lr.is_cuda())
        scalars.device_lr = lr, x = 0;
      else if (const double value = lr.item<double>(); std::abs(value) < 1e38)
        x = value;
    } else {
      x = number(object);
    }
    if (!x) return {};
    scalars.values.push_back(*x);
  }
  for (size_t i = 0; i < options.size(); ++i) {
    const int is_true = PyObject_IsTrue(PyTuple_GET_ITEM(options.ptr(), i));
    if (is_true < 0) throw pybind11::error_already_set();
    scalars.values.push_back(is_true);
  }
  return scalars;
}

const OptimCall& find_call(const std::string& op) {
  for (const OptimCall* call = OptimCall::first; call; call = call->next)
    if (op == call->name) return *call;
  TORCH_CHECK(false, "no optimizer's op is named ", op);
}

}  // namespace

pybind11::object optim_step(const std::string& op, const pybind11::dict& state,
                            const std::vector<OptimGroup>& groups,
                            const pybind11::object& grad_scale, const pybind11::object& found_inf) {
  const OptimCall& step = find_call(op);
  optional<Tensor> scales[2];
  for (const int i : {0, 1})
    if (const pybind11::object& object = i ? found_inf : grad_scale; !object.is_none()) {
      const Tensor* const t = plain(object.ptr(), step.cuda);
      if (!t) return pybind11::bool_(false);
      scales[i] = *t;
    }
  std::vector<std::pair<Lists, Scalars>> all;
  States states = {state.ptr()};
  bool complete = true;
  for (const auto& [params, keys, numbers, options] : groups) {
    auto& [lists, scalars] = all.emplace_back(2 + keys.size(), Scalars());
    const Found found = collect(params.ptr(), keys, step.cuda, states, lists);
    if (found == Found::kNotOurs) return pybind11::bool_(false);
    scalars = collect_scalars(numbers, options, !lists[0].empty() && lists[0][0].is_cuda());
    if (scalars.values.empty()) return pybind11::bool_(false);
    complete &= found == Found::kAll;
  }
  if (!complete) return pybind11::none();
  {
    const pybind11::gil_scoped_release no_gil;
    const at::NoGradGuard no_grad;
    for (const auto& [lists, scalars] : all)
      if (!lists[0].empty())
        step.call(lists, scalars.values, scalars.device_lr, scales[0], scales[1]);
  }
  return pybind11::bool_(true);
}

}  // namespace dlkernels
