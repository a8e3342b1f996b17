// What the Python modules of the extensions have in common.
#pragma once
#include <Python.h>

namespace neft {

// Counts the changes of the kernels' signatures. neft_kernels/ops/native.py uses only extensions of its own number.
constexpr long kInterface = 2;

inline PyObject* create_module(PyModuleDef* definition) {
  PyObject* module = PyModule_Create(definition);
  if (module != nullptr && PyModule_AddIntConstant(module, "INTERFACE", kInterface) != 0) Py_CLEAR(module);
  return module;
}

}  // namespace neft
