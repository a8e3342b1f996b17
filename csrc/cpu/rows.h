// The CPU row kernels: one set for each instruction set, all in one binary. The best set that the machine supports is chosen
// at run time. rows_body.h is the common body; rows_avx512.cpp, rows_avx2.cpp and rows_portable.cpp compile it.
#pragma once

#include <cstdint>
#include <string>

#include "../noise_kind.h"

namespace neft {

// Which noise a row gets: what the generator is given, beside the columns.
struct RowNoise {
  int64_t seed;
  int64_t token;
  uint32_t stream;
};

// A row that gets noise, times a magnitude that may be negative. `in` may equal `out`. `next` is a later row, whose same columns
// are prefetched into the cache: the hardware cannot predict where in the table the next row lies.
struct Row {
  const void *in, *next;
  void* out;
  float magnitude;
};

// out[begin:end] = in[begin:end] + magnitude * noise, columns counted from the start of the row, for one or two rows. The noise
// of two rows is drawn once. `begin` must be a multiple of kColumnAlignment.
using AddNoiseToRows = void (*)(const Row* rows, int64_t begin, int64_t end, const RowNoise& noise);
constexpr int kMaxRows = 2;

// out[begin:end] = the sum of rows[:count][begin:end] / divisor, taken in fp64 from first to last and rounded once. `rows`
// are the rows' offsets in `data`, in bytes. rows[count] must be the offset of a row too: it is fetched into the cache.
using SumRows = void (*)(const void* data, const int64_t* rows, int64_t count, int64_t begin, int64_t end, int64_t divisor,
                         void* out);

constexpr int64_t kColumnAlignment = 128;  // the columns of one batch of the widest kernel: 16 lanes x 8 columns

struct NoiseKernels {  // by the number of rows, less one
  AddNoiseToRows fp32[kMaxRows], fp64[kMaxRows], fp16[kMaxRows], bf16[kMaxRows];
};

struct RowKernels {
  const char* name;
  NoiseKernels noise[kNoiseKinds];  // by NoiseKind
  SumRows sum_fp32, sum_fp64, sum_fp16, sum_bf16;
};

namespace portable {
extern const RowKernels kRowKernels;
}
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define NEFT_X86_KERNELS 1
namespace avx2 {
extern const RowKernels kRowKernels;
}
namespace avx512 {
extern const RowKernels kRowKernels;
}
#endif

// The kernels in use.
const RowKernels& row_kernels();

// Limits the kernels to instruction set `name` ("avx512", "avx2", "portable") and those below it. Returns false for an
// unknown name. An instruction set that the machine lacks is never used.
bool cap_row_kernels(const std::string& name);

}  // namespace neft
