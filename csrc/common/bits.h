// What comparisons of vectors say, one bit per lane.
// Included by *_cpu.cpp only, inside whose instruction set it lives.
#pragma once

#include "vec.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fastproto {
namespace FASTPROTO_ISA {

// One bit per lane: whether it is true.
inline unsigned bits(IntVec truth) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)truth);
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)truth);
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)truth);
#else
  unsigned result = 0;
  for (int l = 0; l < LANES; ++l) result |= unsigned(truth[l] & 1) << l;
  return result;
#endif
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
