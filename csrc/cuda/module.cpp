// The Python module that holds the CUDA kernels. Loading it registers them; it offers nothing itself.
#include <Python.h>

namespace {
PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
}

PyMODINIT_FUNC PyInit__C_cuda() { return PyModule_Create(&kModule); }
