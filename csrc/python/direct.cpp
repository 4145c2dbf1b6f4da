// Calls of an op from Python that skip what torch.ops does for any arguments of any op: a function
// in Python, tuples and dicts of arguments, a choice among overloads, subclasses. Between two
// passes of autograd's engine, where code is in no cache, that is 8 of the 55 us of a small relu
// forward and backward (docs/performance/calls.md).
#include "ops/core/torch_headers.h"

#include "python/direct.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

namespace dlkernels {
namespace {

using c10::TypeKind;
using std::optional;
using torch::jit::Stack;

struct Op {  // lives as long as the process
  c10::OperatorHandle handle;
  PyObject* overload;  // owned
  PyMethodDef method;
};

optional<at::Tensor> as_tensor(PyObject* object) {
  return THPVariable_CheckExact(object) ? optional(THPVariable_Unpack(object)) : std::nullopt;
}

optional<int64_t> as_int(PyObject* object) {
  if (!PyLong_CheckExact(object)) return std::nullopt;
  int overflow = 0;
  const int64_t value = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow ? std::nullopt : optional(value);
}

optional<double> as_float(PyObject* object) {
  return PyFloat_CheckExact(object) ? optional(PyFloat_AS_DOUBLE(object)) : std::nullopt;
}

optional<bool> as_bool(PyObject* object) {
  return PyBool_Check(object) ? optional(object == Py_True) : std::nullopt;
}

// A list or tuple of what `as` takes.
template <class T>
optional<c10::List<T>> as_list(PyObject* object, optional<T> (*as)(PyObject*)) {
  if (!PyList_CheckExact(object) && !PyTuple_CheckExact(object)) return std::nullopt;
  const Py_ssize_t n = PySequence_Fast_GET_SIZE(object);
  c10::List<T> list;
  list.reserve(n);
  for (Py_ssize_t i = 0; i < n; ++i) {
    optional<T> value = as(PySequence_Fast_GET_ITEM(object, i));
    if (!value) return std::nullopt;
    list.push_back(*std::move(value));
  }
  return list;
}

// False where there is no value.
template <class T>
bool push(Stack& stack, optional<T> value) {
  if (value) stack.emplace_back(*std::move(value));
  return value.has_value();
}

// An argument for a parameter of this type; false where that takes more than is known here.
bool push(Stack& stack, PyObject* object, const c10::Type& type) {
  switch (type.kind()) {
    case TypeKind::TensorType:
      return push(stack, as_tensor(object));
    case TypeKind::IntType:
      return push(stack, as_int(object));
    case TypeKind::FloatType:
      return push(stack, as_float(object));
    case TypeKind::BoolType:
      return push(stack, as_bool(object));
    case TypeKind::OptionalType:
      if (object != Py_None) return push(stack, object, *type.containedType(0));
      stack.emplace_back();
      return true;
    case TypeKind::ListType:
      switch (type.containedType(0)->kind()) {
        case TypeKind::TensorType:
          return push(stack, as_list(object, as_tensor));
        case TypeKind::IntType:
          return push(stack, as_list(object, as_int));
        default:
          return false;
      }
    default:
      return false;
  }
}

PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  const Op& op = *static_cast<const Op*>(PyCapsule_GetPointer(self, nullptr));
  const auto& parameters = op.handle.schema().arguments();
  Stack stack;
  stack.reserve(n);
  bool is_plain =
      static_cast<size_t>(n) == parameters.size() && !at::impl::torch_function_mode_enabled();
  for (Py_ssize_t i = 0; is_plain && i < n; ++i)
    is_plain = push(stack, args[i], *parameters[i].type());
  if (!is_plain) return PyObject_Vectorcall(op.overload, args, n, nullptr);
  {
    const pybind11::gil_scoped_release no_gil;
    op.handle.callBoxed(stack);
  }
  if (stack.size() == 1) return THPVariable_Wrap(stack[0].toTensor());
  pybind11::tuple results(stack.size());
  for (size_t i = 0; i < stack.size(); ++i)
    results[i] =
        pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(stack[i].toTensor()));
  return results.release().ptr();
  END_HANDLE_TH_ERRORS
}

}  // namespace

pybind11::object direct(const pybind11::object& overload) {
  const auto name = overload.attr("_schema").attr("name").cast<std::string>();
  const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "");
  const auto function = reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call));
  auto* const op = new Op{handle,
                          pybind11::object(overload).release().ptr(),
                          {handle.schema().name().c_str(), function, METH_FASTCALL, nullptr}};
  const pybind11::capsule self(op);
  return pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&op->method, self.ptr()));
}

}  // namespace dlkernels
