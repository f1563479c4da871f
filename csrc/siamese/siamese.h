// The siamese metric loss: what the CPU kernels take. docs/math/siamese.md derives the gradients.
//
//   s(a, b)    = <w, |a − b|> + β
//   M(a, b, t) = log(1 + e^z),  z = −s where t = 1, s where t = 0      dM/dz = 1 / (1 + e^−z)
//   da = q w ∘ sign(a − b),  dw = Σ q |a − b| over the pairs           q = dL/ds, sign(0) = 0
//
// N rows, C backbone features.
#pragma once

#include <cstdint>

#include "../common/isa.h"

namespace fastproto {

// Given pairs: row i of a with row i of b.
struct SiamesePairs {
  int64_t N, C;
  const void* a;            // (N, C), row stride stride_a
  const void* b;            // (N, C), row stride stride_b
  int64_t stride_a, stride_b;
  int a_dtype, b_dtype;
  const int64_t* same;      // (N,) t, or negative: the pair does not count
  const float* w;           // (C,)
  // Forward.
  const float* beta;        // ()
  float* loss;              // (N,) M
  float* slope;             // (N,) dM/ds
  // Backward.
  const float* coefficient; // (N,) q
  float* da;                // (N, C) dL/da = −dL/db; null: not wanted
  float* dw;                // (C,); null: not wanted
};

// Every unordered pair of rows, by kind: 0 one image, 1 one prototype, 2 two prototypes.
struct SiameseAllPairs {
  int64_t N, C;
  const void* x;            // (split, C), row stride stride_x: the first rows
  const void* second;       // (N − split, C), row stride stride_second: the others
  int64_t split, stride_x, stride_second;
  int x_dtype;              // of both
  const int64_t* image;     // (N,)
  const int64_t* prototype; // (N,), negative: none
  const float* w;           // (C,)
  const float* beta;        // ()
  // Forward, each (3,), one number per kind.
  float* mean;              // of M; 0 where there is no such pair
  float* slope;             // of dM/ds
  float* share;             // 1 / number of pairs; 0 where there is none
  // Backward.
  const float* coefficient; // (3,) dL/dM of a pair of that kind
  float* dx;                // (N, C)
  float* dw;                // (C,)
};

FASTPROTO_PER_ISA(
  void siamese_pairs_fwd(const SiamesePairs& args, int threads);
  void siamese_pairs_bwd(const SiamesePairs& args, int threads);
  void siamese_all_pairs_fwd(const SiameseAllPairs& args, int threads);
  void siamese_all_pairs_bwd(const SiameseAllPairs& args, int threads);
)

}  // namespace fastproto
