// Fewer page faults in large new outputs.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>

namespace neft {

// Asks for pages of 2 MB where `data`, newly allocated, has them whole. An output of 32 MB or more comes fresh from the
// kernel each time (glibc never keeps blocks of that size), and the faults of its 4 KB pages take longer than filling it.
// Where the kernel has no such pages, or the memory is in use already, nothing happens.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kAlwaysFresh = int64_t{32} << 20;
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  if (bytes < kAlwaysFresh) return;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const auto end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace neft
