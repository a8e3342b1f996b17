// The Python module of the CUDA kernels. Its function registers them.
#include <Python.h>

#include "../module.h"
#include "../registration.h"

namespace {

PyObject* register_kernels(PyObject*, PyObject* argument) {
  PyObject* bytes = PyUnicode_AsUTF8String(argument);
  if (bytes == nullptr) return nullptr;
  neft::Registration::register_all(PyBytes_AsString(bytes), "CUDA");
  Py_DECREF(bytes);
  Py_RETURN_NONE;
}

PyMethodDef kMethods[] = {
    {"register_kernels", register_kernels, METH_O, "Registers the kernels in the namespace of torch.ops that is named."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, kMethods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda() { return neft::create_module(&kModule); }
