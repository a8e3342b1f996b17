// The columns that one Philox call feeds, as raw bits in registers, and one struct per element type that adds the noise
// to them, named as in csrc/cpu/rows_body.h.
//
// Compiled for the device. A test also compiles it for the host, where CUDA's conversions do not exist.
#pragma once

#include <cstdint>
#include <cstring>

#include "../noise.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#endif

namespace neft {

using namespace NEFT_NAMESPACE;  // noise.h

template <class To, class From>
NEFT_FUNCTION To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

struct Fp32 {
  using Bits = uint32_t;
  static constexpr Bits kNan = 0x7FC00000;
  template <NoiseKind kind>
  NEFT_FUNCTION static void add(uint32_t (&data)[4], float magnitude, const uint32_t (&words)[4]) {
    NEFT_UNROLL
    for (int k = 0; k < 4; ++k)
      data[k] = bits_as<uint32_t>(add_scaled(as_float(data[k]), magnitude, noise_from_word<kind>(words[k])));
  }
};

struct Fp64 {
  using Bits = uint64_t;
  static constexpr Bits kNan = 0x7FF8000000000000;
  template <NoiseKind kind>
  NEFT_FUNCTION static void add(uint32_t (&data)[8], float magnitude, const uint32_t (&words)[4]) {
    NEFT_UNROLL
    for (int k = 0; k < 4; ++k) {
      double value;
      memcpy(&value, data + 2 * k, sizeof value);
      value = add_scaled<double>(value, magnitude, noise_from_word<kind>(words[k]));
      memcpy(data + 2 * k, &value, sizeof value);
    }
  }
};

// The 16-bit types: two columns share a word, the even one in its low half.
template <class Half>
struct Pairs {
  using Bits = uint16_t;
  template <NoiseKind kind>
  NEFT_FUNCTION static void add(uint32_t (&data)[4], float magnitude, const uint32_t (&words)[4]) {
    NEFT_UNROLL
    for (int k = 0; k < 4; ++k) {
      const float even = add_scaled(Half::widen_low(data[k]), magnitude, noise_from_low_half<kind>(words[k]));
      const float odd = add_scaled(Half::widen_high(data[k]), magnitude, noise_from_high_half<kind>(words[k]));
      data[k] = Half::pack(even, odd);
    }
  }
};

struct Fp16 : Pairs<Fp16> {
  static constexpr Bits kNan = 0x7E00;
  NEFT_FUNCTION static float widen_low(uint32_t pair) { return widen(static_cast<Bits>(pair)); }
  NEFT_FUNCTION static float widen_high(uint32_t pair) { return widen(static_cast<Bits>(pair >> 16)); }
#if defined(__CUDACC__)
  NEFT_FUNCTION static float widen(Bits bits) { return __half2float(__ushort_as_half(bits)); }
  NEFT_FUNCTION static uint32_t pack(float even, float odd) { return bits_as<uint32_t>(__floats2half2_rn(even, odd)); }
#else
  static float widen(Bits bits) { return torch::headeronly::detail::fp16_ieee_to_fp32_value(bits); }
  static uint32_t pack(float even, float odd) {
    using torch::headeronly::detail::fp16_ieee_from_fp32_value;
    return fp16_ieee_from_fp32_value(even) | uint32_t{fp16_ieee_from_fp32_value(odd)} << 16;
  }
#endif
};

struct Bf16 : Pairs<Bf16> {
  static constexpr Bits kNan = 0x7FC0;
  NEFT_FUNCTION static float widen_low(uint32_t pair) { return as_float(pair << 16); }
  NEFT_FUNCTION static float widen_high(uint32_t pair) { return as_float(pair & 0xFFFF0000); }
#if defined(__CUDACC__)
  NEFT_FUNCTION static uint32_t pack(float even, float odd) {
    return bits_as<uint32_t>(__floats2bfloat162_rn(even, odd));
  }
#else
  static uint32_t pack(float even, float odd) {
    using torch::headeronly::detail::round_to_nearest_even;
    return round_to_nearest_even(even) | uint32_t{round_to_nearest_even(odd)} << 16;
  }
#endif
};

template <class Element>
struct ColumnBlock {
  using Bits = typename Element::Bits;
  static constexpr int kColumns = columns_per_block(sizeof(Bits)), kVectors = kColumns * sizeof(Bits) / 16;

  struct alignas(16) Vector {  // what a thread loads and stores at once
    uint32_t words[4];
  };

  uint32_t data[4 * kVectors];

  template <NoiseKind kind>
  NEFT_FUNCTION void add_noise(float magnitude, const uint32_t (&words)[4]) {
    Element::template add<kind>(data, magnitude, words);
  }

  NEFT_FUNCTION void fill_with_nan() {
    NEFT_UNROLL
    for (int c = 0; c < kColumns; ++c) set(c, Element::kNan);
  }

  // A whole block, aligned to 16 bytes.
  NEFT_FUNCTION void load(const Bits* from) {
    NEFT_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      const Vector vector = reinterpret_cast<const Vector*>(from)[k];
      memcpy(data + 4 * k, &vector, sizeof vector);
    }
  }
  NEFT_FUNCTION void store(Bits* to) const {
    NEFT_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      Vector vector;
      memcpy(&vector, data + 4 * k, sizeof vector);
      reinterpret_cast<Vector*>(to)[k] = vector;
    }
  }

  // The first `count` columns, at any alignment. The others are set to 0, so that noise can be added to all.
  NEFT_FUNCTION void load(const Bits* from, int64_t count, int64_t stride) {
    NEFT_UNROLL
    for (int c = 0; c < kColumns; ++c) set(c, c < count ? from[c * stride] : Bits{0});
  }
  NEFT_FUNCTION void store(Bits* to, int64_t count) const {
    NEFT_UNROLL
    for (int c = 0; c < kColumns; ++c)
      if (c < count) to[c] = get(c);
  }

 private:
  NEFT_FUNCTION Bits get(int column) const {
    Bits bits;
    memcpy(&bits, reinterpret_cast<const char*>(data) + column * sizeof bits, sizeof bits);
    return bits;
  }
  NEFT_FUNCTION void set(int column, Bits bits) {
    memcpy(reinterpret_cast<char*>(data) + column * sizeof bits, &bits, sizeof bits);
  }
};

}  // namespace neft
