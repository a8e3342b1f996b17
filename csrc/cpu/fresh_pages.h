// Fewer page faults in large new outputs.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstdint>
#include <cstring>

namespace neft {

// The OS maps an output of this size or more anew each time, because glibc never keeps blocks of that size.
constexpr int64_t kAlwaysFresh = int64_t{32} << 20;

// Requests pages of 2 MB for newly allocated `data`, because the faults of 4 KB pages take longer than filling them. If the OS
// has no such pages, or the memory is in use already, nothing happens.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  if (bytes < kAlwaysFresh) return;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const auto end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

#if defined(__linux__)
// Whether pages that are returned to the OS read as zeros afterwards. Old user-mode emulators keep their contents.
inline bool discarded_pages_are_zeros() {
  static const bool are_zeros = [] {
    const auto size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* page = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED) return false;
    auto* byte = static_cast<volatile char*>(page);
    *byte = 1;
    const bool zero = madvise(page, size, MADV_DONTNEED) == 0 && *byte == 0;
    munmap(page, size);
    return zero;
  }();
  return are_zeros;
}
#endif

// Whether `data` has pages already, because malloc took it from a large block that was freed. Some pages of it are asked.
inline bool has_pages(const void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kSamples = 16;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  for (int64_t sample = 1; sample <= kSamples; ++sample) {
    const auto address = reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes / (kSamples + 1) * sample);
    unsigned char is_resident = 0;
    if (mincore(reinterpret_cast<void*>(address & ~(page - 1)), page, &is_resident) != 0 || !(is_resident & 1)) return false;
  }
  return true;
#else
  return false;
#endif
}

// Sets `data`, newly allocated by malloc, to zeros without writing them: its pages are returned to the OS, which maps zeros
// when they are touched next. Does nothing and returns false where that is not possible or not faster.
inline bool zero_without_writing(void* data, int64_t bytes) {
#if defined(__linux__)
  if (bytes < kAlwaysFresh || !discarded_pages_are_zeros()) return false;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(data), end = begin + static_cast<uintptr_t>(bytes);
  const auto first_page = (begin + page - 1) & ~(page - 1), last_page = end & ~(page - 1);
  if (madvise(reinterpret_cast<void*>(first_page), last_page - first_page, MADV_DONTNEED) != 0) return false;
  std::memset(data, 0, first_page - begin);
  std::memset(reinterpret_cast<void*>(last_page), 0, end - last_page);
  return true;
#else
  return false;
#endif
}

}  // namespace neft
