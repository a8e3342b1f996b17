#pragma once

// A function that is always inlined, on the host and on the device.
#if defined(__CUDACC__)
#define NEFT_FUNCTION __host__ __device__ __forceinline__
#else
#define NEFT_FUNCTION inline __attribute__((always_inline))
#endif

// Before a short loop: unroll it.
#if defined(__CUDA_ARCH__)
#define NEFT_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__)
#define NEFT_UNROLL  // host code in a .cu file has no such loop
#else
#define NEFT_UNROLL _Pragma("GCC unroll 16")
#endif

// Each instruction set of the CPU compiles its own copy of noise.h, in its own namespace; see csrc/cpu/rows.h.
#ifndef NEFT_NAMESPACE
#define NEFT_NAMESPACE scalar
#endif
