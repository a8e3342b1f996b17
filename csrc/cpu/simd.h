// Vectors with GCC's vector extensions: + - * & | ^ << >> work lane by lane and compile to the instruction set in use. Only
// four operations use intrinsics, because the compiler generates slow code for them: the widening multiplication, the
// interleaving of 64-bit lanes and the conversions of half-precision floats and of doubles.
//
// Included by one translation unit per instruction set, which defines NEFT_NAMESPACE and NEFT_LANES first.
#pragma once

#include <cstdint>
#include <cstring>

#if NEFT_LANES > 4
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 on its own _mm512_undefined_epi32 (GCC bug 105593)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "../macros.h"

namespace neft {
namespace NEFT_NAMESPACE {

constexpr int kLanes = NEFT_LANES;

typedef uint32_t Words __attribute__((vector_size(4 * NEFT_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * NEFT_LANES)));
typedef float Floats __attribute__((vector_size(4 * NEFT_LANES)));
typedef float HalfFloats __attribute__((vector_size(2 * NEFT_LANES)));
typedef double Doubles __attribute__((vector_size(4 * NEFT_LANES)));
typedef uint16_t HalfWords __attribute__((vector_size(2 * NEFT_LANES)));
// A word in the low half of each 64-bit lane; the upper half has no meaning. The generator uses such lanes, because a widening
// multiplication reads their low halves and writes 64-bit products.
typedef uint64_t LongWords __attribute__((vector_size(4 * NEFT_LANES)));

template <class To, class From>
NEFT_FUNCTION To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class Vector>
NEFT_FUNCTION Vector load(const void* from) {  // no alignment needed
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class Vector>
NEFT_FUNCTION void store(void* to, const Vector& vector) {
  std::memcpy(to, &vector, sizeof vector);
}

NEFT_FUNCTION Ints as_signed(Words words) { return bit_cast<Ints>(words); }
NEFT_FUNCTION Floats as_float(Words words) { return bit_cast<Floats>(words); }
NEFT_FUNCTION Words as_word(Floats floats) { return bit_cast<Words>(floats); }
NEFT_FUNCTION Floats to_float(Ints ints) { return __builtin_convertvector(ints, Floats); }

// GCC 12 makes four instructions of either conversion.
#if NEFT_LANES == 16
NEFT_FUNCTION Doubles widen(HalfFloats floats) { return bit_cast<Doubles>(_mm512_cvtps_pd(bit_cast<__m256>(floats))); }
NEFT_FUNCTION HalfFloats narrow(Doubles doubles) {
  return bit_cast<HalfFloats>(_mm512_cvtpd_ps(bit_cast<__m512d>(doubles)));
}
#elif NEFT_LANES == 8
NEFT_FUNCTION Doubles widen(HalfFloats floats) { return bit_cast<Doubles>(_mm256_cvtps_pd(bit_cast<__m128>(floats))); }
NEFT_FUNCTION HalfFloats narrow(Doubles doubles) {
  return bit_cast<HalfFloats>(_mm256_cvtpd_ps(bit_cast<__m256d>(doubles)));
}
#else
NEFT_FUNCTION Doubles widen(HalfFloats floats) { return __builtin_convertvector(floats, Doubles); }
NEFT_FUNCTION HalfFloats narrow(Doubles doubles) { return __builtin_convertvector(doubles, HalfFloats); }
#endif

NEFT_FUNCTION Doubles widen_half(Floats floats, int half) {
  const auto* bytes = reinterpret_cast<const char*>(&floats);
  return widen(load<HalfFloats>(bytes + half * sizeof(HalfFloats)));
}
NEFT_FUNCTION Floats narrow(const Doubles (&halves)[2]) {
  Floats floats;
  auto* bytes = reinterpret_cast<char*>(&floats);
  for (int half = 0; half < 2; ++half)
    store(bytes + half * sizeof(HalfFloats), narrow(halves[half]));
  return floats;
}
NEFT_FUNCTION Words widen(HalfWords halves) { return __builtin_convertvector(halves, Words); }

#if NEFT_LANES == 16

NEFT_FUNCTION LongWords multiply(uint32_t a, LongWords b) {
  return bit_cast<LongWords>(_mm512_mul_epu32(_mm512_set1_epi32(static_cast<int>(a)), bit_cast<__m512i>(b)));
}
NEFT_FUNCTION Words interleave_low(LongWords a, LongWords b) {
  return bit_cast<Words>(_mm512_unpacklo_epi64(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
}
NEFT_FUNCTION Words interleave_high(LongWords a, LongWords b) {
  return bit_cast<Words>(_mm512_unpackhi_epi64(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
}
NEFT_FUNCTION Floats from_fp16(HalfWords halves) {
  return bit_cast<Floats>(_mm512_cvtph_ps(bit_cast<__m256i>(halves)));
}
NEFT_FUNCTION HalfWords to_fp16(Floats floats) {
  return bit_cast<HalfWords>(
      _mm512_cvtps_ph(bit_cast<__m512>(floats), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#elif NEFT_LANES == 8

NEFT_FUNCTION LongWords multiply(uint32_t a, LongWords b) {
  return bit_cast<LongWords>(_mm256_mul_epu32(_mm256_set1_epi32(static_cast<int>(a)), bit_cast<__m256i>(b)));
}
NEFT_FUNCTION Words interleave_low(LongWords a, LongWords b) {
  return bit_cast<Words>(_mm256_unpacklo_epi64(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
}
NEFT_FUNCTION Words interleave_high(LongWords a, LongWords b) {
  return bit_cast<Words>(_mm256_unpackhi_epi64(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
}
NEFT_FUNCTION Floats from_fp16(HalfWords halves) {
  return bit_cast<Floats>(_mm256_cvtph_ps(bit_cast<__m128i>(halves)));
}
NEFT_FUNCTION HalfWords to_fp16(Floats floats) {
  return bit_cast<HalfWords>(
      _mm256_cvtps_ph(bit_cast<__m256>(floats), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#else

NEFT_FUNCTION LongWords multiply(uint32_t a, LongWords b) {
#if defined(__SSE2__)
  return bit_cast<LongWords>(_mm_mul_epu32(_mm_set1_epi32(static_cast<int>(a)), bit_cast<__m128i>(b)));
#elif defined(__ARM_NEON)
  return bit_cast<LongWords>(vmull_n_u32(vmovn_u64(bit_cast<uint64x2_t>(b)), a));
#else
  return (b & 0xFFFFFFFF) * a;
#endif
}
NEFT_FUNCTION Words interleave_low(LongWords a, LongWords b) { return bit_cast<Words>(LongWords{a[0], b[0]}); }
NEFT_FUNCTION Words interleave_high(LongWords a, LongWords b) { return bit_cast<Words>(LongWords{a[1], b[1]}); }
NEFT_FUNCTION Floats from_fp16(HalfWords halves) {
  Floats floats;
  for (int lane = 0; lane < kLanes; ++lane)
    floats[lane] = torch::headeronly::detail::fp16_ieee_to_fp32_value(halves[lane]);
  return floats;
}
NEFT_FUNCTION HalfWords to_fp16(Floats floats) {
  HalfWords halves;
  for (int lane = 0; lane < kLanes; ++lane)
    halves[lane] = torch::headeronly::detail::fp16_ieee_from_fp32_value(floats[lane]);
  return halves;
}

#endif

// Two vectors that are computed side by side. The rounds of the generator are one chain of dependent instructions, and the
// processor does not look far enough ahead to overlap it with the chain of the next batch.
struct Chains {
  LongWords v[2];
};

NEFT_FUNCTION Chains operator^(Chains a, Chains b) { return {{a.v[0] ^ b.v[0], a.v[1] ^ b.v[1]}}; }
NEFT_FUNCTION Chains operator^(Chains a, uint32_t b) { return {{a.v[0] ^ b, a.v[1] ^ b}}; }
NEFT_FUNCTION Chains operator+(Chains a, uint32_t b) { return {{a.v[0] + b, a.v[1] + b}}; }

NEFT_FUNCTION void multiply_wide(uint32_t a, Chains b, Chains& hi, Chains& lo) {
  lo = {{multiply(a, b.v[0]), multiply(a, b.v[1])}};
  hi = {{lo.v[0] >> 32, lo.v[1] >> 32}};
}

// The low words of two vectors, side by side: a0 b0 a1 b1 ...
NEFT_FUNCTION LongWords pair(LongWords a, LongWords b) { return (a & 0xFFFFFFFF) | (b << 32); }

// Four words for each lane's block, from four vectors per chain into two, in column order. Interleaving stays within 128
// bits, so blocks must lie in a chain's lanes as block_of_lane() says: its first half in the even lanes, the rest in the odd.
NEFT_FUNCTION void to_column_order(const Chains (&w)[4], Words (&columns)[4]) {
  for (int chain = 0; chain < 2; ++chain) {
    const LongWords words01 = pair(w[0].v[chain], w[1].v[chain]), words23 = pair(w[2].v[chain], w[3].v[chain]);
    columns[2 * chain] = interleave_low(words01, words23);
    columns[2 * chain + 1] = interleave_high(words01, words23);
  }
}

NEFT_FUNCTION Chains block_of_lane() {
  Chains blocks;
  for (int chain = 0; chain < 2; ++chain)
    for (int lane = 0; lane < kLanes / 2; ++lane)
      blocks.v[chain][lane] = chain * (kLanes / 2) + (lane % 2) * (kLanes / 4) + lane / 2;
  return blocks;
}

}  // namespace NEFT_NAMESPACE
}  // namespace neft
