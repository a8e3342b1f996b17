// The CUDA kernels' own code on the host: the launch that they would make, one thread after the other, on memory that
// faults when anything beside it is touched; and the scalar functions of noise.h. Called from tests/test_cuda_sources.py.
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <vector>

#include "cuda/rows.cuh"

using namespace neft;

namespace {

sigjmp_buf after_fault;
void on_fault(int) { siglongjmp(after_fault, 1); }

// A copy of `data` between two pages that cannot be touched, right after the first one or right before the second.
class Guarded {
 public:
  Guarded(const void* data, size_t bytes, bool at_end) : bytes_(bytes) {
    const size_t page = sysconf(_SC_PAGESIZE), inner = (bytes + page - 1) / page * page;
    mapped_ = inner + 2 * page;
    base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (inner) mprotect(base_ + page, inner, PROT_READ | PROT_WRITE);
    begin_ = base_ + page + (at_end ? inner - bytes : 0);
    if (data) memcpy(begin_, data, bytes);
  }
  ~Guarded() { munmap(base_, mapped_); }
  Guarded(const Guarded&) = delete;
  char* begin() const { return begin_; }
  size_t bytes() const { return bytes_; }

 private:
  char *base_, *begin_;
  size_t bytes_, mapped_;
};

template <class Element, NoiseKind kind, class RowOf>
void run_place(const Rows<RowOf>& rows, Place place, bool aligned) {
  if (aligned)
    add_noise_to_rows<Element, kind, true>(rows, place);
  else
    add_noise_to_rows<Element, kind, false>(rows, place);
}

// Runs one thread twice, on outputs that differ everywhere, so that every byte it writes shows.
template <class Element, class RowOf>
void run_thread(Rows<RowOf> rows, NoiseKind kind, const LaunchPlan& plan, Index block, Index thread, Guarded (&outs)[2],
                uint8_t* times_written, char* out) {
  for (int run = 0; run < 2; ++run) {
    memset(outs[run].begin(), run ? 0xAA : 0x55, outs[run].bytes());
    rows.out = outs[run].begin();
    const Place place = place_of<Element>(plan.grid, plan.threads, block, thread);
    switch (kind) {
      case NoiseKind::kUniform: run_place<Element, NoiseKind::kUniform>(rows, place, plan.aligned); break;
      case NoiseKind::kSign: run_place<Element, NoiseKind::kSign>(rows, place, plan.aligned); break;
      case NoiseKind::kGaussian: run_place<Element, NoiseKind::kGaussian>(rows, place, plan.aligned); break;
    }
  }
  constexpr size_t kChunk = 256;
  char untouched[kChunk];
  memset(untouched, 0x55, kChunk);
  for (size_t begin = 0; begin < outs[0].bytes(); begin += kChunk) {
    const size_t end = std::min(begin + kChunk, outs[0].bytes());
    const char *first = outs[0].begin(), *second = outs[1].begin();
    if (memcmp(first + begin, untouched, end - begin) == 0) continue;  // no noise is a row of 0x55
    for (size_t byte = begin; byte < end; ++byte) {
      if (first[byte] == char(0x55) && second[byte] == char(0xAA)) continue;
      ++times_written[byte];
      out[byte] = first[byte] == second[byte] ? first[byte] : 0;
    }
  }
}

template <class Visit>
void for_each(Index count, const Visit& visit) {
  for (uint32_t z = 0; z < count.z; ++z)
    for (uint32_t y = 0; y < count.y; ++y)
      for (uint32_t x = 0; x < count.x; ++x) visit(Index{x, y, z});
}

}  // namespace

extern "C" {

// Everything that a launch takes. Pointers may be null where the launch has none.
struct Arguments {
  int32_t element;  // 0: fp32, 1: fp64, 2: fp16, 3: bf16
  int32_t id_bytes;  // 0: no ids
  const void* storage;  // that `in` is a view of
  int64_t storage_bytes, in_offset_bytes, row_stride, column_stride, num_rows;
  const void* ids;
  const float* token_magnitude;
  int64_t seed, first_token, num_tokens, num_columns;
  float magnitude;
  uint32_t stream;
  int32_t guard_after;     // memory faults right after its last byte, or else right before its first
  int32_t noise;           // a NoiseKind
  int32_t seed_by_value;
  int32_t symmetric;
  int32_t few_threads;     // a grid that needs several goes at a row, and the third dimension for rows
  void* out;
  uint8_t* times_written;  // for every byte of `out`
};
}

namespace {

template <class RowOf>
Rows<RowOf> rows_of(const Arguments& a, const void* storage, void* out, RowOf row_of, const void* token_magnitude,
                    const void* seed) {
  return {static_cast<const char*>(storage) + a.in_offset_bytes,
          out,
          row_of,
          a.row_stride,
          a.column_stride,
          a.num_tokens,
          a.num_columns,
          a.seed_by_value ? nullptr : static_cast<const int64_t*>(seed),
          a.seed_by_value ? a.seed : 0,
          a.token_magnitude ? static_cast<const float*>(token_magnitude) : nullptr,
          a.magnitude,
          a.stream,
          a.first_token,
          a.symmetric ? a.num_tokens / 2 : 0};
}

template <class Element, class RowOf>
int run(const Arguments& a, RowOf row_of, const Guarded& storage, const Guarded& magnitudes, const Guarded& seed) {
  const size_t out_bytes = a.num_tokens * a.num_columns * sizeof(typename Element::Bits);
  const bool at_end = a.guard_after;
  Guarded outs[2] = {{nullptr, out_bytes, at_end}, {nullptr, out_bytes, at_end}};
  auto rows = rows_of(a, storage.begin(), outs[0].begin(), row_of, magnitudes.begin(), seed.begin());

  LaunchPlan plan = plan_launch<Element>(rows);
  if (a.few_threads) {
    plan.threads = {kLanes, 1, 1};
    plan.grid = {static_cast<uint32_t>(a.num_tokens + 1) / 2, 1, 2};
  }
  for_each(plan.grid, [&](Index block) {
    for_each(plan.threads, [&](Index thread) {
      run_thread<Element>(rows, static_cast<NoiseKind>(a.noise), plan, block, thread, outs, a.times_written, static_cast<char*>(a.out));
    });
  });
  return plan.aligned;
}

template <class Element>
int run_element(const Arguments& a) {
  const bool at_end = a.guard_after;
  const Guarded storage(a.storage, a.storage_bytes, at_end), ids(a.ids, a.id_bytes * a.num_tokens, at_end);
  const Guarded magnitudes(a.token_magnitude, a.token_magnitude ? 4 * a.num_tokens : 0, at_end);
  const Guarded seed(&a.seed, sizeof a.seed, at_end);
  if (a.id_bytes == 0) return run<Element>(a, RowOfToken{}, storage, magnitudes, seed);
  if (a.id_bytes == 4)
    return run<Element>(a, RowOfId<int32_t>{reinterpret_cast<int32_t*>(ids.begin()), a.num_rows}, storage, magnitudes,
                        seed);
  return run<Element>(a, RowOfId<int64_t>{reinterpret_cast<int64_t*>(ids.begin()), a.num_rows}, storage, magnitudes,
                      seed);
}

// What the launcher hands to the device.
struct Launch {
  Index grid, threads;
  int32_t aligned;  // which kernel
  int32_t parameter_bytes;
  unsigned char parameters[128];
};

template <class Element, class RowOf>
void launch_of(const Arguments& a, RowOf row_of, Launch& launch) {
  auto rows = rows_of(a, a.storage, a.out, row_of, a.token_magnitude, &a.seed);
  const LaunchPlan plan = plan_launch<Element>(rows);
  static_assert(sizeof rows <= sizeof launch.parameters);
  launch = {plan.grid, plan.threads, plan.aligned, sizeof rows, {}};
  memcpy(launch.parameters, &rows, sizeof rows);
}

template <class Element>
void launch_element(const Arguments& a, Launch& launch) {
  if (a.id_bytes == 0) return launch_of<Element>(a, RowOfToken{}, launch);
  if (a.id_bytes == 4)
    return launch_of<Element>(a, RowOfId<int32_t>{static_cast<const int32_t*>(a.ids), a.num_rows}, launch);
  return launch_of<Element>(a, RowOfId<int64_t>{static_cast<const int64_t*>(a.ids), a.num_rows}, launch);
}

template <class Element>
void plan_of(int64_t num_tokens, int64_t num_columns, uint32_t* out) {
  Rows<RowOfToken> rows{nullptr, nullptr, {}, num_columns, 1, num_tokens, num_columns};
  const LaunchPlan plan = plan_launch<Element>(rows);
  for (const Index& index : {plan.grid, plan.threads}) *out++ = index.x, *out++ = index.y, *out++ = index.z;
}

}  // namespace

extern "C" {

// 1 if the launch was on the path of 16-byte accesses, 0 if not, -1 if a thread touched what is not its own.
int emulate(const Arguments* a) {
  struct sigaction action = {}, before;
  action.sa_handler = on_fault;
  sigaction(SIGSEGV, &action, &before);
  int result = -1;
  if (sigsetjmp(after_fault, 1) == 0) {
    constexpr int (*kRun[])(const Arguments&) = {run_element<Fp32>, run_element<Fp64>, run_element<Fp16>,
                                                 run_element<Bf16>};
    result = kRun[a->element](*a);
  }
  sigaction(SIGSEGV, &before, nullptr);
  return result;
}

// The launch that the CUDA launcher would make of `a`, on its own memory; the seed is read from `a` itself.
void launch(const Arguments* a, Launch* found) {
  constexpr void (*kLaunch[])(const Arguments&, Launch&) = {launch_element<Fp32>, launch_element<Fp64>,
                                                            launch_element<Fp16>, launch_element<Bf16>};
  kLaunch[a->element](*a, *found);
}

// The grid and the threads of a block, of a launch on `num_tokens` rows.
void plan(int element, int64_t num_tokens, int64_t num_columns, uint32_t* grid_and_threads) {
  constexpr void (*kPlan[])(int64_t, int64_t, uint32_t*) = {plan_of<Fp32>, plan_of<Fp64>, plan_of<Fp16>, plan_of<Bf16>};
  kPlan[element](num_tokens, num_columns, grid_and_threads);
}

// The position of the token of one thread.
int64_t token_of(const Index* grid, const Index* threads, const Index* block, const Index* thread) {
  return place_of<Fp32>(*grid, *threads, *block, *thread).position;
}

// The last row of an fp32 output of any size, written by the threads of the last block of threads, in memory that is
// reserved but, but for that row, not used. All tokens read the same row.
int emulate_last_row(const float* row, int64_t num_tokens, int64_t num_columns, int64_t seed, float magnitude,
                     float* last_row) {
  const size_t bytes = num_tokens * num_columns * sizeof(float);
  void* out = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (out == MAP_FAILED) return -1;
  Rows<RowOfToken> rows{row, out, {}, 0, 1, num_tokens, num_columns, &seed, 0, nullptr, magnitude, 0, 0};
  const LaunchPlan plan = plan_launch<Fp32>(rows);
  for (uint32_t y = 0; y < plan.grid.y; ++y)
    for_each(plan.threads, [&](Index thread) {
      const Index block{plan.grid.x - 1, y, plan.grid.z - 1};
      add_noise_to_rows<Fp32, NoiseKind::kUniform, false>(rows, place_of<Fp32>(plan.grid, plan.threads, block, thread));
    });
  memcpy(last_row, static_cast<float*>(out) + (num_tokens - 1) * num_columns, num_columns * sizeof(float));
  munmap(out, bytes);
  return 0;
}

void philox(const uint32_t* counter, const uint32_t* key, uint32_t* words) {
  uint32_t c[4] = {counter[0], counter[1], counter[2], counter[3]};
  philox4x32(c, Key{key[0], key[1]});
  memcpy(words, c, sizeof c);
}

// The words of one block of columns, from the counter that the kernels build.
void block_words(uint32_t block, int64_t token, uint32_t stream, int64_t seed, uint32_t* words) {
  uint32_t c[4];
  set_counter(c, block, token, stream);
  philox4x32(c, make_key(seed));
  memcpy(words, c, sizeof c);
}

void noise_from_words(int64_t kind, const uint32_t* words, int64_t count, float* noise) {
  for (int64_t i = 0; i < count; ++i) {
    switch (static_cast<NoiseKind>(kind)) {
      case NoiseKind::kUniform: noise[i] = noise_from_word<NoiseKind::kUniform>(words[i]); break;
      case NoiseKind::kSign: noise[i] = noise_from_word<NoiseKind::kSign>(words[i]); break;
      case NoiseKind::kGaussian: noise[i] = noise_from_word<NoiseKind::kGaussian>(words[i]); break;
    }
  }
}

void noise_from_halves(int64_t kind, const uint32_t* words, int64_t count, float* noise) {
  const auto convert = [&](auto from_low_half, auto from_high_half) {
    for (int64_t i = 0; i < count; ++i) {
      noise[2 * i] = from_low_half(words[i]);
      noise[2 * i + 1] = from_high_half(words[i]);
    }
  };
  constexpr auto kUniform = NoiseKind::kUniform, kSign = NoiseKind::kSign, kGaussian = NoiseKind::kGaussian;
  switch (static_cast<NoiseKind>(kind)) {
    case kUniform: return convert(noise_from_low_half<kUniform, uint32_t>, noise_from_high_half<kUniform, uint32_t>);
    case kSign: return convert(noise_from_low_half<kSign, uint32_t>, noise_from_high_half<kSign, uint32_t>);
    case kGaussian: return convert(noise_from_low_half<kGaussian, uint32_t>, noise_from_high_half<kGaussian, uint32_t>);
  }
}

void add_scaled_fp32(const float* w, const float* m, const float* u, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = add_scaled(w[i], m[i], u[i]);
}

void add_scaled_fp64(const double* w, const double* m, const double* u, int64_t count, double* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = add_scaled(w[i], m[i], u[i]);
}
}
