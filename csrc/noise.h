// The noise contract, version 1: all noise arithmetic in C++. It is compiled for the host, for CUDA devices, and for vectors
// of words: the generator is a template over the type of a word. neft_kernels/ops/reference.py has the contract in prose.
//
// The translation unit must be compiled without floating-point contraction: the product and the sum round separately.
#pragma once

#include <cstdint>
#include <cstring>

#include "macros.h"
#include "noise_kind.h"

namespace neft {
namespace NEFT_NAMESPACE {

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53;  // Salmon et al. 2011, table 2
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9;  // golden ratio
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85;  // sqrt(3) - 1

struct Key {
  uint32_t lo, hi;
};

NEFT_FUNCTION Key make_key(int64_t seed) {
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)};
}

// The 64-bit product of two words, as its two halves.
NEFT_FUNCTION void multiply_wide(uint32_t a, uint32_t b, uint32_t& hi, uint32_t& lo) {
#if defined(__CUDA_ARCH__)
  uint64_t product;  // in a chain of these products, nvcc compiles most to two instructions
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
#else
  const uint64_t product = static_cast<uint64_t>(a) * b;
#endif
  hi = static_cast<uint32_t>(product >> 32);
  lo = static_cast<uint32_t>(product);
}

// Philox4x32-10 in place: counter words in, random words out. Word is uint32_t or a vector of them.
template <class Word>
NEFT_FUNCTION void philox4x32(Word (&c)[4], Key key) {
  NEFT_UNROLL
  for (int round = 0; round < kPhiloxRounds; ++round) {
    Word hi0, lo0, hi1, lo1;
    multiply_wide(kPhiloxMultiplier0, c[0], hi0, lo0);
    multiply_wide(kPhiloxMultiplier1, c[2], hi1, lo1);
    c[0] = hi1 ^ c[1] ^ key.lo;
    c[1] = lo1;
    c[2] = hi0 ^ c[3] ^ key.hi;
    c[3] = lo0;
    key.lo += kPhiloxWeyl0;
    key.hi += kPhiloxWeyl1;
  }
}

// The counter of one block of columns.
template <class Word>
NEFT_FUNCTION void set_counter(Word (&c)[4], Word block, int64_t token, uint32_t stream) {
  c[0] = block;
  c[1] = Word{} + static_cast<uint32_t>(token);
  c[2] = Word{} + static_cast<uint32_t>(static_cast<uint64_t>(token) >> 32);
  c[3] = Word{} + stream;
}

constexpr uint32_t kSignBit = 0x80000000, kOne = 0x3F800000, kMinusOne = 0xBF800000;  // of a float

// Conversions between the scalar types; csrc/cpu/simd.h has them, and multiply_wide, for vectors.
NEFT_FUNCTION int32_t as_signed(uint32_t word) { return static_cast<int32_t>(word); }
NEFT_FUNCTION float to_float(int32_t value) { return static_cast<float>(value); }
NEFT_FUNCTION float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
NEFT_FUNCTION uint32_t as_word(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Word to uniform, for 32- and 64-bit element types: 23 random bits and a sign, open at both ends, never zero.
template <class Word>
NEFT_FUNCTION auto uniform_from_word(Word word) {
  return to_float((as_signed(word) >> 8) | 1) * 0x1p-23f;
}

// Half-word h to uniform, for 16-bit element types: (2 h + 1 - 65536) / 65536. In the mantissa of a float in [2, 4), h means
// 2 + h / 32768, and the subtraction is exact. This takes half the instructions of an integer conversion.
template <class Word>
NEFT_FUNCTION auto uniform_from_mantissa(Word mantissa) {  // h << 7
  return as_float(mantissa | 0x40000000) - (3 - 0x1p-16f);
}
template <class Word>
NEFT_FUNCTION auto uniform_from_low_half(Word word) {
  return uniform_from_mantissa((word << 7) & 0x7FFF80);
}
template <class Word>
NEFT_FUNCTION auto uniform_from_high_half(Word word) {
  return uniform_from_mantissa((word >> 9) & 0x7FFF80);
}

#if defined(__CUDA_ARCH__)
// The same values. A GPU converts either half of a word directly, and the fused multiply-add is exact here.
NEFT_FUNCTION float uniform_from_low_half(uint32_t word) {
  return __fmaf_rn(static_cast<float>(word & 0xFFFF), 0x1p-15f, 0x1p-16f - 1);
}
NEFT_FUNCTION float uniform_from_high_half(uint32_t word) {
  return __fmaf_rn(static_cast<float>(word >> 16), 0x1p-15f, 0x1p-16f - 1);
}
#endif

// Products and sums that round each by itself. Device code does not depend on -fmad; host code needs -ffp-contract=off.
template <class Value>
NEFT_FUNCTION Value product(Value a, Value b) {
  return a * b;
}
template <class Value>
NEFT_FUNCTION Value sum(Value a, Value b) {
  return a + b;
}
#if defined(__CUDA_ARCH__)
template <>
NEFT_FUNCTION float product(float a, float b) {
  return __fmul_rn(a, b);
}
template <>
NEFT_FUNCTION float sum(float a, float b) {
  return __fadd_rn(a, b);
}
template <>
NEFT_FUNCTION double product(double a, double b) {
  return __dmul_rn(a, b);
}
template <>
NEFT_FUNCTION double sum(double a, double b) {
  return __dadd_rn(a, b);
}
#endif

// Uniform to gaussian noise. The exponent and the fraction of a float, taken as one integer, are a rough logarithm, so x is about
// 1 - log2(1 - u * u) / 32; the fourth power makes it a better one. experiments/randomness/gaussian.py fits the constants.
template <class Value>
NEFT_FUNCTION Value gaussian_from_uniform(Value u) {
  const Value zero{}, q = product(sum(zero + 1.0f, -u), sum(zero + 1.0f, u)), r = product(q, q), s = product(r, r);
  const Value x = as_float(0x3FFF0000 - (as_word(s) >> 7));
  const Value b = sum(zero + 2.2166462f, -x), c = sum(x, zero - 1.579746f), e = sum(x, zero - 0.78377885f);
  const Value first = sum(product(c, c), zero + 0.51102036f), second = sum(product(e, e), zero + 0.0049715075f);
  return product(product(product(zero + 13.442853f, u), b), product(first, second));
}

// Word to the noise of one column, for 32- and 64-bit element types.
template <NoiseKind kind, class Word>
NEFT_FUNCTION auto noise_from_word(Word word) {
  if constexpr (kind == NoiseKind::kUniform) return uniform_from_word(word);
  else if constexpr (kind == NoiseKind::kSign) return as_float((word & kSignBit) | kOne);
  else return gaussian_from_uniform(uniform_from_word(word));
}

// The same of a half-word, for 16-bit element types, whose uniforms are negative where the top bit is 0.
template <NoiseKind kind, class Word>
NEFT_FUNCTION auto noise_from_low_half(Word word) {
  if constexpr (kind == NoiseKind::kUniform) return uniform_from_low_half(word);
  else if constexpr (kind == NoiseKind::kSign) return as_float(((word << 16) & kSignBit) ^ kMinusOne);
  else return gaussian_from_uniform(uniform_from_low_half(word));
}
template <NoiseKind kind, class Word>
NEFT_FUNCTION auto noise_from_high_half(Word word) {
  if constexpr (kind == NoiseKind::kUniform) return uniform_from_high_half(word);
  else if constexpr (kind == NoiseKind::kSign) return as_float((word & kSignBit) ^ kMinusOne);
  else return gaussian_from_uniform(uniform_from_high_half(word));
}

// Columns that one Philox call feeds.
constexpr int columns_per_block(int element_size) { return element_size == 2 ? 8 : 4; }

// w + m * n, rounded twice.
template <class Value>
NEFT_FUNCTION Value add_scaled(Value w, Value m, Value n) {
  return sum(w, product(m, n));
}

}  // namespace NEFT_NAMESPACE
}  // namespace neft
