// The nearest few of many vectors for every row: what the CPU kernel takes.
//
//   l2   the `count` least ||x_n − v_k||²     inner   the `count` largest <x_n, v_k>
//
// N rows, K vectors, D dimensions; 1 ≤ count ≤ K. Nearest first; of equal distances in float32 the lowest k.
#pragma once

#include <cstdint>

#include "../common/isa.h"

namespace fastproto {

struct Search {
  int64_t N, K, D, count;
  const float* x;        // (N, D), row stride stride_x
  int64_t stride_x;
  const float* vectors;  // (K, D)
  bool inner;
  int64_t* label;        // (N, count)
  float* distance;       // (N, count)
};

FASTPROTO_PER_ISA(void search(const Search& args, int threads);)

}  // namespace fastproto
