// huge_pages: asks Linux for pages of 2 MiB under a large output that a kernel is about to fill.
//
// A new output is memory that nothing has touched: each first write to a page of 4 KiB traps into the kernel. 64 images of
// 3 × 224² float32 are 9409 such traps, and they cost more than the resizing. Only whole 2 MiB blocks inside the output
// are asked for, so no more memory is held; pages that are there already stay as they are. It is advice: where huge pages
// are off, or the memory is a file's, nothing changes.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastproto {

constexpr uintptr_t kHugePage = uintptr_t{2} << 20;

inline void huge_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (start + kHugePage - 1) / kHugePage * kHugePage, last = (start + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace fastproto
