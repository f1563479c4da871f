// Softmax cross-entropy of rows against keys: what the CPU kernels take. docs/math/contrast.md derives the gradients.
//
//   s_ij = <x_i, y_j> · a_j + b_j          A(i): t(i), and the keys j whose group is not row i's
//   L_i  = log Σ_{j ∈ A(i)} exp(s_ij) − s_{i,t(i)}
//
// N rows x, K keys y, D embedding. Rows with t(i) < 0 are ignored. Normalised, x_i and y_j stand for x_i / |x_i| and y_j / |y_j|,
// and gradients are those of the rows as they came: dx = (dx̂ − <dx̂, x̂> x̂) / |x|.
#pragma once

#include <cstdint>

#include "../common/isa.h"

namespace fastproto {

struct Contrast {
  int64_t N, K, D;
  const void* x;            // (N, D), row stride stride_x
  const void* y;            // (K, D), row stride stride_y
  const void* more;         // forward, frozen: the keys from K_first on, row stride stride_more; null where y holds all
  int64_t K_first;
  int64_t stride_x, stride_y, stride_more;
  int x_dtype, y_dtype;
  bool normalize;
  bool symmetric;           // y is x, a is one number, b is null, no row is ignored; forward no dx, dy is of both roles
  const int64_t* target;    // (N,)
  const float* a;           // (K,) inverse temperatures; null: a_all for every key
  float a_all;
  const float* b;           // (K,) biases; null: 0
  const int64_t* group;     // (N,) and (K,); null: no key is hidden
  const int64_t* key_group;
  bool reduced;             // one loss: the rows' by the divisor, summed
  double divisor;           // of all losses and gradients; 1 where not reduced
  float* loss;              // (N,), reduced ()
  float* saved;             // (3, N): rows of lse, target_minus_one and factor
  // Forward. Each may be null.
  float* dx;                // (N, D) Σ_j p_ij a_j y_j − a_t y_t, by the divisor
  float* entropy;           // (N,), with top1 and positive: all or none
  int64_t* top1;            // (N,)
  float* positive;          // (N,) s_{i,t(i)}
  // Backward into the keys.
  const float* grad;        // dL / dL_i for row i at i · grad_stride
  int64_t grad_stride;      // 0: one for all rows
  float* dy;                // (K, D) Σ_i q_ij a_j x_i, with q_ij = g_i (p_ij − [j = t(i)])
  float* da;                // (K,)   Σ_i q_ij <x_i, y_j>; null: not wanted
  float* db;                // (K,)   Σ_i q_ij; null: not wanted

  float& lse(int64_t i) const { return saved[i]; }
  // p_t − 1 = expm1(−L_i).
  float& target_minus_one(int64_t i) const { return saved[N + i]; }
  // What exp(s − lse) is to be multiplied by to be p: lse has the rounding of a number as large as the scores.
  float& factor(int64_t i) const { return saved[2 * N + i]; }
};

FASTPROTO_PER_ISA(
  void contrast_fwd(const Contrast& args, int threads);
  void contrast_bwd_keys(const Contrast& args, int threads);
  // What the two above turn to where contrast_is_bounded.
  bool contrast_is_bounded(const Contrast& args);
  void contrast_fwd_symmetric(const Contrast& args, int threads);
  void contrast_bwd_symmetric(const Contrast& args, int threads);
)

}  // namespace fastproto
