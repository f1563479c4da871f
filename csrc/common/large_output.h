// What a kernel does for a large output that it is about to fill: huge pages under it, and stores that pass the caches by.
//
// A new output is memory that nothing has touched: each first write to a page of 4 KiB traps into Linux. 64 images of
// 3 × 224² float32 are 9409 such traps, and they cost more than the resizing. An ordinary store reads the line that it
// writes to: of an output that no cache holds, every byte crosses the memory bus twice.
// Included by *_cpu.cpp only.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace fastproto {

constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
// From here on most of an output is gone from the caches before anybody reads it.
constexpr int64_t kStreamed = int64_t{16} << 20;

// Asks for pages of 2 MiB: whole ones inside the output, so no more memory is held, and pages that are there already stay
// as they are. It is advice: where huge pages are off, or the memory is a file's, nothing changes.
inline void huge_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (start + kHugePage - 1) / kHugePage * kHugePage, last = (start + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

namespace FASTPROTO_ISA {

#if defined(__AVX512F__)
constexpr int64_t kStreamBytes = 64;
inline void stream_vector(void* to, const void* from) {
  _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
}
#elif defined(__AVX2__)
constexpr int64_t kStreamBytes = 32;
inline void stream_vector(void* to, const void* from) {
  _mm256_stream_si256(static_cast<__m256i*>(to), _mm256_loadu_si256(static_cast<const __m256i*>(from)));
}
#elif defined(__SSE2__)
constexpr int64_t kStreamBytes = 16;
inline void stream_vector(void* to, const void* from) {
  _mm_stream_si128(static_cast<__m128i*>(to), _mm_loadu_si128(static_cast<const __m128i*>(from)));
}
#else
constexpr int64_t kStreamBytes = 1;
inline void stream_vector(void* to, const void* from) { std::memcpy(to, from, 1); }
#endif

// memcpy by stores that read no line, where `to` is aligned for them. Other threads see them after stream_end.
inline void stream(void* to, const void* from, int64_t bytes) {
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  int64_t done = 0;
  if (kStreamBytes > 1 && reinterpret_cast<uintptr_t>(to) % kStreamBytes == 0)
    for (; done + kStreamBytes <= bytes; done += kStreamBytes) stream_vector(out + done, in + done);
  std::memcpy(out + done, in + done, bytes - done);
}
inline void stream_end() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
