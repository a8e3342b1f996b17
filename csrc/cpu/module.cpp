// The Python module of the CPU kernels. Its functions register them, and tell and limit the instruction set that they use.
#include <Python.h>

#include "../module.h"
#include "../registration.h"
#include "rows.h"

namespace {

PyObject* instruction_set(PyObject*, PyObject*) { return PyUnicode_FromString(neft::row_kernels().name); }

PyObject* cap_instruction_set(PyObject*, PyObject* argument) {
  PyObject* bytes = PyUnicode_AsUTF8String(argument);
  if (bytes == nullptr) return nullptr;
  const bool known = neft::cap_row_kernels(PyBytes_AsString(bytes));
  Py_DECREF(bytes);
  if (known) Py_RETURN_NONE;
  PyErr_Format(PyExc_ValueError, "no such instruction set: %R", argument);
  return nullptr;
}

PyObject* register_kernels(PyObject*, PyObject* argument) {
  PyObject* bytes = PyUnicode_AsUTF8String(argument);
  if (bytes == nullptr) return nullptr;
  neft::Registration::register_all(PyBytes_AsString(bytes), "CPU");
  Py_DECREF(bytes);
  Py_RETURN_NONE;
}

PyMethodDef kMethods[] = {
    {"register_kernels", register_kernels, METH_O, "Registers the kernels in the namespace of torch.ops that is named."},
    {"instruction_set", instruction_set, METH_NOARGS, "The instruction set that the CPU kernels use."},
    {"cap_instruction_set", cap_instruction_set, METH_O, "Use no instruction set above the one named."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "_C_cpu", nullptr, -1, kMethods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C_cpu() { return neft::create_module(&kModule); }
