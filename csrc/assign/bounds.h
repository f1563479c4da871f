// Bounds between the searches of one fit: which groups of centres a panel of rows need not try. docs/math/assign.md proves
// them. Included by *_cpu.cpp only.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/tile.h"
#include "../common/vec.h"
#include "chunk.h"

namespace fastproto {
namespace FASTPROTO_ISA {

// How far the LANES rows from `first` on miss a group whose scores are at most `scores`, beyond their own centres.
inline float miss(const Chunk& chunk, int64_t first, Vec scores) {
  float beyond[LANES];
  // ||x − c||² = |x|² − 2 (<x, c> − |c|² / 2)
  store(beyond, larger(load(chunk.square.data() + first) - 2 * scores, Vec{}));
  for (int l = 0; l < LANES; ++l) beyond[l] = std::sqrt(beyond[l]) - chunk.own[first + l];
  return -largest(-load(beyond));
}

// Groups whose centres are, for every row of a panel, farther than the row's own: by the slack of the call before, less
// how far the group's centres and the own one can have moved.
inline void skip_groups(const Assign& args, const Centers& centers, Chunk& chunk) {
  chunk.own.assign(chunk.size(), -INF);  // of the padding: it misses no group
  chunk.miss.assign(chunk.panels * centers.groups, INF);
  for (int64_t panel = 0; panel < chunk.panels; ++panel) {
    const int64_t last = std::min(chunk.count, (panel + 1) * NR);
    float farther = -INF, longest = 0;
    bool known = true;
    for (int64_t i = panel * NR; i < last; ++i) {
      const int64_t n = args.row_order[chunk.begin + i];
      const float* c = args.centers + args.label[n] * args.D;
      const float share = (args.D / LANES + 16) * 0x1p-24f;
      chunk.own[i] = std::sqrt(squared_distance(chunk.row[i], c, args.D) * (1 + share)) * (1 + ROUNDING);
      farther = std::max(farther, chunk.own[i] - std::sqrt(args.distance[n]));
      longest = std::max(longest, chunk.own[i]);
      known &= chunk.screened[i] != 0;
    }
    const float* slack = args.slack + (chunk.begin / NR + panel) * centers.groups;
    for (int64_t group = 0; group < centers.groups; ++group)
      chunk.skipped[panel * centers.groups + group] =
          known && slack[group] - args.drift[group] - farther > ROUNDING * longest;
  }
}

// The slack that this call leaves, of the groups it skipped and of those it did not.
inline void keep_slack(const Assign& args, const Centers& centers, Chunk& chunk, const std::vector<float>& before) {
  for (int64_t panel = 0; panel < chunk.panels; ++panel) {
    const int64_t last = std::min(chunk.count, (panel + 1) * NR);
    float* slack = args.slack + (chunk.begin / NR + panel) * centers.groups;
    float nearer = INF, nearer_than_own = INF, longest = 0;
    bool known = true;
    for (int64_t i = panel * NR; i < last; ++i) {
      const float distance = std::sqrt(args.distance[args.row_order[chunk.begin + i]]);
      nearer = std::min(nearer, std::sqrt(before[i]) - distance);
      nearer_than_own = std::min(nearer_than_own, chunk.own[i] - distance);
      longest = std::max(longest, chunk.own[i]);
      known &= chunk.screened[i] != 0;
    }
    for (int64_t group = 0; group < centers.groups; ++group) {
      const int64_t at = panel * centers.groups + group;
      const float kept = chunk.skipped[at] ? slack[group] - args.drift[group] + nearer : chunk.miss[at] + nearer_than_own;
      slack[group] = known ? kept - ROUNDING * longest : -INF;
    }
    for (int64_t i = panel * NR; i < last; ++i)
      slack[centers.group_of[args.label[args.row_order[chunk.begin + i]]]] = -INF;
  }
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
