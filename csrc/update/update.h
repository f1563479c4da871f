// Sums and counts of the rows that carry each label, on a grid: what the CPU kernel takes.
//
//   sums_k = Σ_{n: label_n = k} w_n x_n        counts_k = Σ_{n: label_n = k} w_n
//
// each as Σ [v] and Σ [v − [v]]', where [v] = (v + r) − r: the rounder r is so large that float64 adds up multiples of its
// resolution without an error, in any order, and the fine one, r', does so for what the coarse one leaves.
// N rows, K clusters, D dimensions. Rows labelled −1 are left out.
#pragma once

#include <cstdint>

#include "../common/isa.h"

namespace fastproto {

struct Update {
  int64_t N, K, D;
  const void* x;          // (N, D), row stride stride_x
  int64_t stride_x;
  int x_dtype;
  const int64_t* label;   // (N,)
  const double* weight;   // (N,); null: 1
  const double* rounder;  // (2, 2): coarse and fine, of w x and of w
  double* sums;           // (2, K, D): coarse and fine, zeros
  double* counts;         // (2, K), zeros
};

FASTPROTO_PER_ISA(void update(const Update& args, int threads);)

}  // namespace fastproto
