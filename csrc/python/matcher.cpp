// Which modules in a row run as one op: find() of dlkernels/_convert/patterns.py, which says why.
// With it in Python a Sequential of three modules takes 3 us more, where a small op takes 5.
#include "ops/core/torch_headers.h"

#include "python/matcher.h"

#include <torch/csrc/autograd/python_variable.h>

#include <array>

namespace dlkernels {
namespace {

namespace py = pybind11;

struct Matcher {  // lives as long as the process
  py::dict known, tree;
  py::tuple global_hooks, global_methods;
};

struct Names {
  static py::str intern(const char* text) {
    return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(text));
  }
  const std::array<py::str, 5> true_if_changed{
      intern("_forward_hooks"), intern("_forward_pre_hooks"), intern("_backward_hooks"),
      intern("_backward_pre_hooks"), intern("return_indices")};
  const std::array<py::str, 4> there_if_changed{intern("forward"), intern("_conv_forward"),
                                                intern("_call_impl"),
                                                intern("_compiled_call_impl")};
  const py::str parameters = intern("_parameters"), weight = intern("weight"),
                bias = intern("bias"), run = intern("run");
};

const Names& names() {
  static const Names& names = *new Names;  // outlives Python
  return names;
}

// Borrowed, or null where there is none.
PyObject* get(PyObject* dict, const py::handle& key) {
  PyObject* const value = PyDict_GetItemWithError(dict, key.ptr());
  if (!value && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

bool is_true(PyObject* object) { return object && PyObject_IsTrue(object) == 1; }

bool is_unchanged(PyObject* methods) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(methods); ++i) {
    PyObject* const method = PyTuple_GET_ITEM(methods, i);
    PyObject* const now =
        PyObject_GetAttr(PyTuple_GET_ITEM(method, 0), PyTuple_GET_ITEM(method, 1));
    if (!now) PyErr_Clear();
    Py_XDECREF(now);  // compared, no more
    if (now != PyTuple_GET_ITEM(method, 2)) return false;
  }
  return true;
}

py::object state_of(PyObject* module) {
  PyObject* const state = PyObject_GenericGetDict(module, nullptr);
  if (!state) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(state);
}

// kind_of() of patterns.py: borrowed, or null.
PyObject* kind_of(const Matcher& matcher, PyObject* step) {
  if (PyTuple_CheckExact(step)) return PyTuple_GET_ITEM(step, 0);
  PyObject* const known = get(matcher.known.ptr(), reinterpret_cast<PyObject*>(Py_TYPE(step)));
  if (!known) return nullptr;
  const py::object state = state_of(step);
  for (const py::str& name : names().true_if_changed)
    if (is_true(get(state.ptr(), name))) return nullptr;
  for (const py::str& name : names().there_if_changed)
    if (get(state.ptr(), name)) return nullptr;
  if (PyTuple_GET_ITEM(known, 2) == Py_True) {
    PyObject* const parameters = get(state.ptr(), names().parameters);
    if (!parameters || !PyDict_CheckExact(parameters) || !get(parameters, names().weight) ||
        !get(parameters, names().bias))
      return nullptr;
  }
  return is_unchanged(PyTuple_GET_ITEM(known, 1)) ? PyTuple_GET_ITEM(known, 0) : nullptr;
}

py::object find(const Matcher& matcher, PyObject* steps, Py_ssize_t begin, PyObject* input) {
  if (!THPVariable_CheckExact(input)) return py::none();
  for (const py::handle& hooks : matcher.global_hooks)
    if (is_true(hooks.ptr())) return py::none();
  if (!is_unchanged(matcher.global_methods.ptr())) return py::none();
  PyObject *node = matcher.tree.ptr(), *op = nullptr;
  Py_ssize_t end = begin;
  for (Py_ssize_t i = begin; i < PyList_GET_SIZE(steps); ++i) {
    PyObject* const kind = kind_of(matcher, PyList_GET_ITEM(steps, i));
    node = kind ? get(node, kind) : nullptr;
    if (!node) break;
    if (PyObject* const run = get(node, names().run)) {
      op = PyTuple_GET_ITEM(run, 0);
      PyObject* const length = PyTuple_GET_ITEM(run, 1);
      end = length == Py_None ? i + 1 : begin + PyLong_AsSsize_t(length);
    }
  }
  if (!op) return py::none();
  py::list weights, biases;
  for (Py_ssize_t i = begin; i < end; ++i) {
    PyObject* const step = PyList_GET_ITEM(steps, i);
    if (PyTuple_CheckExact(step)) continue;
    const py::object state = state_of(step);
    PyObject* const parameters = get(state.ptr(), names().parameters);
    if (PyObject* const weight = get(parameters, names().weight)) {
      weights.append(weight);
      PyObject* const bias = get(parameters, names().bias);
      if (bias != Py_None) biases.append(bias);
    }
  }
  return py::make_tuple(py::handle(op), end, weights, biases);
}

PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t n) {
  const Py_ssize_t begin = n == 3 ? PyLong_AsSsize_t(args[1]) : -1;
  if (PyErr_Occurred()) return nullptr;
  if (begin < 0 || !PyList_Check(args[0])) {
    PyErr_SetString(PyExc_TypeError, "find: takes a list of steps, an index and an input");
    return nullptr;
  }
  try {
    const auto& matcher = *static_cast<const Matcher*>(PyCapsule_GetPointer(self, nullptr));
    return find(matcher, args[0], begin, args[2]).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  }
}

PyMethodDef method{"find", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call)),
                   METH_FASTCALL, nullptr};

}  // namespace

py::object matcher(const py::dict& known, const py::dict& tree, const py::tuple& global_hooks,
                   const py::tuple& global_methods) {
  const py::capsule self(new Matcher{known, tree, global_hooks, global_methods});
  return py::reinterpret_steal<py::object>(PyCFunction_New(&method, self.ptr()));
}

}  // namespace dlkernels
