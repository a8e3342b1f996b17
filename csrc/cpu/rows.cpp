// Chooses the row kernels: the best set that this machine supports, within the limit of cap_row_kernels().
#include "rows.h"

#include <array>
#include <atomic>

namespace neft {
namespace {

struct Candidate {
  const RowKernels* kernels;
  bool (*runs_here)();
};

// Best first; the last one runs everywhere.
const Candidate kCandidates[] = {
#if defined(NEFT_X86_KERNELS)
    {&avx512::kRowKernels,
     [] { return bool(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")); }},
    {&avx2::kRowKernels, [] { return bool(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")); }},
#endif
    {&portable::kRowKernels, [] { return true; }},
};

const RowKernels* best_from(const Candidate* candidate) {
  while (!candidate->runs_here()) ++candidate;
  return candidate->kernels;
}

std::atomic<const RowKernels*>& chosen() {
  static std::atomic<const RowKernels*> kernels{best_from(kCandidates)};
  return kernels;
}

}  // namespace

const RowKernels& row_kernels() { return *chosen().load(std::memory_order_relaxed); }

bool cap_row_kernels(const std::string& name) {
  for (const Candidate& candidate : kCandidates) {
    if (name == candidate.kernels->name) {
      chosen().store(best_from(&candidate), std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace neft
