// The nearest centre of every row: what the CPU kernel takes. docs/math/assign.md proves the bounds.
//
//   l2   label_n = argmin_k ||x_n − c_k||²     distance_n = ||x_n − c_label||²
//   ip   label_n = argmax_k <x_n, c_k>         distance_n = <x_n, c_label>
//
// N rows, K centres, D dimensions. Ties go to the lowest k.
#pragma once

#include <cstdint>

#include "../common/isa.h"

namespace fastproto {

struct Assign {
  int64_t N, K, D;
  const void* x;               // (N, D), row stride stride_x
  int64_t stride_x;
  int x_dtype;
  const float* centers;        // (K, D)
  bool inner;                  // ip
  bool exact;                  // settle what the screen leaves open
  int64_t* label;              // (N,)
  float* distance;             // (N,)
  // Bounds from the call before; null: every centre is tried on every row. label holds that call's labels.
  const int64_t* row_order;    // (N,) rows in the order in which panels take them
  const int64_t* center_order; // (K,) centres in the order in which groups take them
  const float* drift;          // (groups,) how far a centre of the group has moved since, at most
  float* slack;                // (panels, groups) by how much more than its own centre a panel's rows miss a group
  int64_t* tried;              // () pairs of a row and a centre that were computed
};

FASTPROTO_PER_ISA(
  void assign(const Assign& args, int threads);
  int64_t assign_panel_rows();
  int64_t assign_group_centers();
)

}  // namespace fastproto
