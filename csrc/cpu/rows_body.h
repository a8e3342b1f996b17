// The common body of the CPU row kernels. Each instruction set has a translation unit that defines NEFT_NAMESPACE and
// NEFT_LANES and includes this file. It must not include a file with functions before: they would be compiled for that
// instruction set, and the linker could use that copy everywhere.
//
// A batch is kLanes Philox blocks, one per 64-bit lane of two vectors; they become four vectors of words in column order,
// each 32-bit lane one column of a 32- or 64-bit type or two columns of a 16-bit one.
#pragma once

#include "rows.h"
#include "simd.h"  // before noise.h, whose templates call these functions on vectors
#include "../noise.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "two 16-bit columns share a word, the even one in its low half");

namespace neft {
namespace NEFT_NAMESPACE {

struct Fp32 {
  static constexpr int kSize = 4, kColumns = kLanes;  // bytes of an element; columns that one vector of words feeds
  template <NoiseKind kind>
  NEFT_FUNCTION static void add(const char* in, char* out, Floats magnitude, Words words) {
    store(out, add_scaled(load<Floats>(in), magnitude, noise_from_word<kind>(words)));
  }
  NEFT_FUNCTION static Floats to_floats(const char* in) { return load<Floats>(in); }
  NEFT_FUNCTION static void from_floats(Floats floats, char* out) { store(out, floats); }
};

struct Fp64 {
  static constexpr int kSize = 8, kColumns = kLanes;
  template <NoiseKind kind>
  NEFT_FUNCTION static void add(const char* in, char* out, Floats magnitude, Words words) {
    const Floats n = noise_from_word<kind>(words);
    for (int half = 0; half < 2; ++half) {
      const size_t offset = half * sizeof(Doubles);
      store(out + offset, add_scaled(load<Doubles>(in + offset), widen_half(magnitude, half), widen_half(n, half)));
    }
  }
};

struct Fp16 {
  static constexpr int kSize = 2, kColumns = 2 * kLanes;
  template <NoiseKind kind>
  NEFT_FUNCTION static void add(const char* in, char* out, Floats magnitude, Words words) {
    HalfWords halves[2];  // columns [0, kLanes) and [kLanes, 2 kLanes)
    std::memcpy(halves, &words, sizeof words);
    for (int k = 0; k < 2; ++k) {
      const Floats w = from_fp16(load<HalfWords>(in + k * sizeof(HalfWords)));
      store(out + k * sizeof(HalfWords), to_fp16(add_scaled(w, magnitude, noise_from_low_half<kind>(widen(halves[k])))));
    }
  }
  NEFT_FUNCTION static Floats to_floats(const char* in) { return from_fp16(load<HalfWords>(in)); }
  NEFT_FUNCTION static void from_floats(Floats floats, char* out) { store(out, to_fp16(floats)); }
};

// The high half of a float is the bf16 it truncates to, so even and odd columns are shifted and masked into place.
struct Bf16 {
  static constexpr int kSize = 2, kColumns = 2 * kLanes;
  template <NoiseKind kind>
  NEFT_FUNCTION static void add(const char* in, char* out, Floats magnitude, Words words) {
    const Words w = load<Words>(in);
    const Floats even = add_scaled(as_float(w << 16), magnitude, noise_from_low_half<kind>(words));
    const Floats odd = add_scaled(as_float(w & 0xFFFF0000), magnitude, noise_from_high_half<kind>(words));
    store(out, (round_to_bf16(even) >> 16) | (round_to_bf16(odd) & 0xFFFF0000));
  }
  // Rounds to nearest even in the upper half of each lane; the lower half has no meaning. NaN needs no special case: it came
  // from a bf16, or is the default NaN, so its lower half is zero, and the addition does not reach the upper half.
  NEFT_FUNCTION static Words round_to_bf16(Floats floats) {
    const Words bits = bit_cast<Words>(floats);
    return bits + 0x7FFF + ((bits >> 16) & 1);
  }
  NEFT_FUNCTION static Floats to_floats(const char* in) { return as_float(widen(load<HalfWords>(in)) << 16); }
  NEFT_FUNCTION static void from_floats(Floats floats, char* out) {
    store(out, __builtin_convertvector(round_to_bf16(floats) >> 16, HalfWords));
  }
};

template <class Element, NoiseKind kind, int kRows>
void add_noise_to_rows(const Row* rows, int64_t begin, int64_t end, const RowNoise& noise) {
  constexpr int kVectors = 4, kVectorBytes = Element::kSize * Element::kColumns;
  constexpr int kBatchColumns = kVectors * Element::kColumns, kBatchBytes = kVectors * kVectorBytes;
  constexpr int kCacheLine = 64;
  static_assert(kColumnAlignment % kBatchColumns == 0);
  // Copies, because the compiler must assume that writes to `out` change what the arguments point to.
  const char *in[kRows], *next[kRows];
  char* out[kRows];
  Floats magnitude[kRows];
  for (int r = 0; r < kRows; ++r) {
    in[r] = static_cast<const char*>(rows[r].in);
    next[r] = static_cast<const char*>(rows[r].next);
    out[r] = static_cast<char*>(rows[r].out);
    magnitude[r] = Floats{} + rows[r].magnitude;
  }
  const Key key = make_key(noise.seed);
  const int64_t token = noise.token;
  const uint32_t stream = noise.stream;
  const Chains lane_blocks = block_of_lane();

  const auto draw = [&](int64_t column, Words (&words)[kVectors]) __attribute__((always_inline)) {
    Chains block_words[4];
    const auto first_block = static_cast<uint32_t>(column / columns_per_block(Element::kSize));
    set_counter(block_words, lane_blocks + first_block, token, stream);
    philox4x32(block_words, key);
    to_column_order(block_words, words);
  };

  int64_t column = begin;
  for (; column + kBatchColumns <= end; column += kBatchColumns) {
    const int64_t offset = column * Element::kSize;
    for (int r = 0; r < kRows; ++r)
      for (int byte = 0; byte < kBatchBytes; byte += kCacheLine) __builtin_prefetch(next[r] + offset + byte);
    Words words[kVectors];
    draw(column, words);
    for (int k = 0; k < kVectors; ++k)
      for (int r = 0; r < kRows; ++r)
        Element::template add<kind>(in[r] + offset + k * kVectorBytes, out[r] + offset + k * kVectorBytes, magnitude[r],
                                    words[k]);
  }

  if (column < end) {  // the last, partial batch uses a buffer of a whole batch
    Words words[kVectors];
    draw(column, words);
    const size_t bytes = (end - column) * Element::kSize;
    for (int r = 0; r < kRows; ++r) {
      char buffer[kBatchBytes] = {};
      std::memcpy(buffer, in[r] + column * Element::kSize, bytes);
      for (int k = 0; k < kVectors; ++k)
        Element::template add<kind>(buffer + k * kVectorBytes, buffer + k * kVectorBytes, magnitude[r], words[k]);
      std::memcpy(out[r] + column * Element::kSize, buffer, bytes);
    }
  }
}

// The next kLanes columns, as doubles and back.
template <class Element>
NEFT_FUNCTION void add_columns(const char* in, Doubles (&sums)[2]) {
  if constexpr (Element::kSize == 8) {
    for (int half = 0; half < 2; ++half) sums[half] += load<Doubles>(in + half * sizeof(Doubles));
  } else {
    const Floats floats = Element::to_floats(in);
    for (int half = 0; half < 2; ++half) sums[half] += widen_half(floats, half);
  }
}

template <class Element>
NEFT_FUNCTION void store_columns(const Doubles (&sums)[2], char* out) {
  if constexpr (Element::kSize == 8) {
    for (int half = 0; half < 2; ++half) store(out + half * sizeof(Doubles), sums[half]);
  } else {
    Element::from_floats(narrow(sums), out);
  }
}

// Adds `kRows` rows to the sums, in their order. Several at once load and store each sum only once. `count` rows are left, and
// one more may be read.
template <class Element, int kRows>
NEFT_FUNCTION void add_rows(const char* in, const int64_t* rows, int64_t count, int64_t vectors, int64_t rest_bytes,
                            Doubles (*sums)[2]) {
  constexpr int64_t kVectorBytes = kLanes * Element::kSize, kCacheLine = 64;
  const char *row[kRows], *next[kRows];
  for (int k = 0; k < kRows; ++k) {
    row[k] = in + rows[k];
    next[k] = in + rows[kRows + k < count ? kRows + k : count];
  }
  for (int64_t v = 0; v < vectors; ++v)
    NEFT_UNROLL
    for (int k = 0; k < kRows; ++k) {
      if (v * kVectorBytes % kCacheLine == 0) __builtin_prefetch(next[k] + v * kVectorBytes, 0, /*locality=*/2);  // L2
      add_columns<Element>(row[k] + v * kVectorBytes, sums[v]);
    }
  for (int k = 0; rest_bytes != 0 && k < kRows; ++k) {
    char buffer[kVectorBytes] = {};
    std::memcpy(buffer, row[k] + vectors * kVectorBytes, rest_bytes);
    add_columns<Element>(buffer, sums[vectors]);
  }
}

template <class Element>
void sum_rows(const void* data, const int64_t* rows, int64_t count, int64_t begin, int64_t end, int64_t divisor,
              void* out_row) {
  constexpr int64_t kVectors = 1024 / kLanes;  // summed at a time: 8 KB of doubles, which stay in the fastest cache
  constexpr int64_t kVectorBytes = kLanes * Element::kSize;
  constexpr int kRowsAtOnce = 4;
  for (int64_t column = begin; column < end; column += kVectors * kLanes) {
    const int64_t columns = end - column < kVectors * kLanes ? end - column : kVectors * kLanes;
    const int64_t vectors = columns / kLanes, rest_bytes = columns % kLanes * Element::kSize;
    const char* in = static_cast<const char*>(data) + column * Element::kSize;
    char* out = static_cast<char*>(out_row) + column * Element::kSize;
    Doubles sums[kVectors][2];
    for (int64_t v = 0; v < vectors + (rest_bytes != 0); ++v) sums[v][0] = sums[v][1] = Doubles{};
    int64_t r = 0;
    for (; r + kRowsAtOnce <= count; r += kRowsAtOnce)
      add_rows<Element, kRowsAtOnce>(in, rows + r, count - r, vectors, rest_bytes, sums);
    for (; r < count; ++r) add_rows<Element, 1>(in, rows + r, count - r, vectors, rest_bytes, sums);
    for (int64_t v = 0; v < vectors + (rest_bytes != 0); ++v) {
      if (divisor != 1)
        for (int half = 0; half < 2; ++half) sums[v][half] /= static_cast<double>(divisor);
      if (v < vectors) {
        store_columns<Element>(sums[v], out + v * kVectorBytes);
      } else {
        char buffer[kVectorBytes];
        store_columns<Element>(sums[v], buffer);
        std::memcpy(out + v * kVectorBytes, buffer, rest_bytes);
      }
    }
  }
}

template <NoiseKind kind>
constexpr NoiseKernels kNoiseKernels = {{add_noise_to_rows<Fp32, kind, 1>, add_noise_to_rows<Fp32, kind, 2>},
                                        {add_noise_to_rows<Fp64, kind, 1>, add_noise_to_rows<Fp64, kind, 2>},
                                        {add_noise_to_rows<Fp16, kind, 1>, add_noise_to_rows<Fp16, kind, 2>},
                                        {add_noise_to_rows<Bf16, kind, 1>, add_noise_to_rows<Bf16, kind, 2>}};

const RowKernels kRowKernels = {
    NEFT_NAME,
    {kNoiseKernels<NoiseKind::kUniform>, kNoiseKernels<NoiseKind::kSign>, kNoiseKernels<NoiseKind::kGaussian>},
    sum_rows<Fp32>, sum_rows<Fp64>, sum_rows<Fp16>, sum_rows<Bf16>};

}  // namespace NEFT_NAMESPACE
}  // namespace neft
