// The kinds of noise, as in NOISE_KINDS of neft_kernels/ops/reference.py.
#pragma once

#include <cstdint>

namespace neft {

enum class NoiseKind : int64_t { kUniform, kSign, kGaussian };
constexpr int64_t kNoiseKinds = 3;

}  // namespace neft
