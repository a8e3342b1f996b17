// The Python module of the CUDA kernels. Loading it registers them; it has no functions.
#include <Python.h>

namespace {
PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
}

PyMODINIT_FUNC PyInit__C_cuda() { return PyModule_Create(&kModule); }
