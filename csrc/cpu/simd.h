// Vectors of 32-bit lanes, by GCC's vector extensions: + - * & | ^ << >> work lane by lane and compile to whatever the
// instruction set has. Only three things are written with intrinsics, because the compiler finds no good code for them:
// the widening multiply, the 4 x 4 transpose and the conversion of half-precision floats.
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
typedef uint16_t HalfWords __attribute__((vector_size(2 * NEFT_LANES)));

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
NEFT_FUNCTION Floats to_float(Ints ints) { return __builtin_convertvector(ints, Floats); }
NEFT_FUNCTION Words widen(HalfWords halves) { return __builtin_convertvector(halves, Words); }

// In which order the lanes of a counter hold consecutive blocks, so that transpose() below, which only moves words inside
// 128-bit quarters, leaves the words in column order: lane 4 q + j holds block (kLanes / 4) j + q.
NEFT_FUNCTION Words block_of_lane() {
  Words blocks;
  for (int lane = 0; lane < kLanes; ++lane) blocks[lane] = (kLanes / 4) * (lane % 4) + lane / 4;
  return blocks;
}

#if NEFT_LANES == 16

NEFT_FUNCTION void multiply_wide(uint32_t a, Words b, Words& hi, Words& lo) {
  const __m512i factor = _mm512_set1_epi32(static_cast<int>(a)), words = bit_cast<__m512i>(b);
  const __m512i even = _mm512_mul_epu32(factor, words);  // 64-bit products of lanes 0, 2, 4 ...
  const __m512i odd = _mm512_mul_epu32(factor, _mm512_srli_epi64(words, 32));
  hi = bit_cast<Words>(_mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB));
  lo = bit_cast<Words>(_mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA));
}

NEFT_FUNCTION void transpose(Words (&w)[4]) {
  const __m512i w0 = bit_cast<__m512i>(w[0]), w1 = bit_cast<__m512i>(w[1]);
  const __m512i w2 = bit_cast<__m512i>(w[2]), w3 = bit_cast<__m512i>(w[3]);
  const __m512i low01 = _mm512_unpacklo_epi32(w0, w1), high01 = _mm512_unpackhi_epi32(w0, w1);
  const __m512i low23 = _mm512_unpacklo_epi32(w2, w3), high23 = _mm512_unpackhi_epi32(w2, w3);
  w[0] = bit_cast<Words>(_mm512_unpacklo_epi64(low01, low23));
  w[1] = bit_cast<Words>(_mm512_unpackhi_epi64(low01, low23));
  w[2] = bit_cast<Words>(_mm512_unpacklo_epi64(high01, high23));
  w[3] = bit_cast<Words>(_mm512_unpackhi_epi64(high01, high23));
}

NEFT_FUNCTION Floats from_fp16(HalfWords halves) {
  return bit_cast<Floats>(_mm512_cvtph_ps(bit_cast<__m256i>(halves)));
}
NEFT_FUNCTION HalfWords to_fp16(Floats floats) {
  return bit_cast<HalfWords>(
      _mm512_cvtps_ph(bit_cast<__m512>(floats), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#elif NEFT_LANES == 8

NEFT_FUNCTION void multiply_wide(uint32_t a, Words b, Words& hi, Words& lo) {
  const __m256i factor = _mm256_set1_epi32(static_cast<int>(a)), words = bit_cast<__m256i>(b);
  const __m256i even = _mm256_mul_epu32(factor, words);  // 64-bit products of lanes 0, 2, 4 ...
  const __m256i odd = _mm256_mul_epu32(factor, _mm256_srli_epi64(words, 32));
  hi = bit_cast<Words>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA));
  lo = bit_cast<Words>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA));
}

NEFT_FUNCTION void transpose(Words (&w)[4]) {
  const __m256i w0 = bit_cast<__m256i>(w[0]), w1 = bit_cast<__m256i>(w[1]);
  const __m256i w2 = bit_cast<__m256i>(w[2]), w3 = bit_cast<__m256i>(w[3]);
  const __m256i low01 = _mm256_unpacklo_epi32(w0, w1), high01 = _mm256_unpackhi_epi32(w0, w1);
  const __m256i low23 = _mm256_unpacklo_epi32(w2, w3), high23 = _mm256_unpackhi_epi32(w2, w3);
  w[0] = bit_cast<Words>(_mm256_unpacklo_epi64(low01, low23));
  w[1] = bit_cast<Words>(_mm256_unpackhi_epi64(low01, low23));
  w[2] = bit_cast<Words>(_mm256_unpacklo_epi64(high01, high23));
  w[3] = bit_cast<Words>(_mm256_unpackhi_epi64(high01, high23));
}

NEFT_FUNCTION Floats from_fp16(HalfWords halves) {
  return bit_cast<Floats>(_mm256_cvtph_ps(bit_cast<__m128i>(halves)));
}
NEFT_FUNCTION HalfWords to_fp16(Floats floats) {
  return bit_cast<HalfWords>(
      _mm256_cvtps_ph(bit_cast<__m256>(floats), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#elif NEFT_LANES == 4

#if defined(__SSE2__)
NEFT_FUNCTION void multiply_wide(uint32_t a, Words b, Words& hi, Words& lo) {
  const __m128i factor = _mm_set1_epi32(static_cast<int>(a)), words = bit_cast<__m128i>(b);
  const __m128i even = _mm_mul_epu32(factor, words);  // 64-bit products of lanes 0 and 2
  const __m128i odd = _mm_mul_epu32(factor, _mm_srli_epi64(words, 32));
  const __m128i even_lo_hi = _mm_shuffle_epi32(even, _MM_SHUFFLE(3, 1, 2, 0));
  const __m128i odd_lo_hi = _mm_shuffle_epi32(odd, _MM_SHUFFLE(3, 1, 2, 0));
  lo = bit_cast<Words>(_mm_unpacklo_epi32(even_lo_hi, odd_lo_hi));
  hi = bit_cast<Words>(_mm_unpackhi_epi32(even_lo_hi, odd_lo_hi));
}
#elif defined(__ARM_NEON)
NEFT_FUNCTION void multiply_wide(uint32_t a, Words b, Words& hi, Words& lo) {
  const uint32x4_t words = bit_cast<uint32x4_t>(b);
  const uint32x4_t low = vreinterpretq_u32_u64(vmull_n_u32(vget_low_u32(words), a));
  const uint32x4_t high = vreinterpretq_u32_u64(vmull_n_u32(vget_high_u32(words), a));
  lo = bit_cast<Words>(vuzp1q_u32(low, high));
  hi = bit_cast<Words>(vuzp2q_u32(low, high));
}
#else
NEFT_FUNCTION void multiply_wide(uint32_t a, Words b, Words& hi, Words& lo) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint64_t product = static_cast<uint64_t>(a) * b[lane];
    hi[lane] = static_cast<uint32_t>(product >> 32);
    lo[lane] = static_cast<uint32_t>(product);
  }
}
#endif

NEFT_FUNCTION void transpose(Words (&w)[4]) {
  const Words low01 = {w[0][0], w[1][0], w[0][1], w[1][1]}, high01 = {w[0][2], w[1][2], w[0][3], w[1][3]};
  const Words low23 = {w[2][0], w[3][0], w[2][1], w[3][1]}, high23 = {w[2][2], w[3][2], w[2][3], w[3][3]};
  w[0] = Words{low01[0], low01[1], low23[0], low23[1]};
  w[1] = Words{low01[2], low01[3], low23[2], low23[3]};
  w[2] = Words{high01[0], high01[1], high23[0], high23[1]};
  w[3] = Words{high01[2], high01[3], high23[2], high23[3]};
}

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

}  // namespace NEFT_NAMESPACE
}  // namespace neft
