// What both passes over all pairs share: blocks of rows, their logits, and which pairs count as what.
// Included by *_cpu.cpp only, inside whose instruction set it lives.
#pragma once

#include <algorithm>
#include <vector>

#include "../common/float_rows.h"
#include "../common/vec.h"
#include "metric.h"
#include "siamese.h"

namespace fastproto {
namespace FASTPROTO_ISA {

// 0 one image, 1 one prototype, 2 two prototypes, −1 a pair that does not count.
inline int kind_of(const SiameseAllPairs& args, int64_t i, int64_t j) {
  if (args.image[i] == args.image[j]) return 0;
  if (args.prototype[i] < 0 || args.prototype[j] < 0) return -1;
  return args.prototype[i] == args.prototype[j] ? 1 : 2;
}

// Channels of row i, `size` of them from `channel` on.
inline void load_channels(const SiameseAllPairs& args, int64_t i, int64_t channel, int64_t size, float* out) {
  if (i < args.split)
    load_row(args.x, args.x_dtype, i * args.stride_x + channel, size, out);
  else
    load_row(args.second, args.x_dtype, (i - args.split) * args.stride_second + channel, size, out);
}

// BLOCK rows from the first on, as floats, zeros where padded. Returns how many are real.
inline int64_t load_block(const SiameseAllPairs& args, int64_t first, std::vector<float>& out) {
  const int64_t width = round_up(args.C, LANES), count = std::min(BLOCK, args.N - first);
  out.assign(BLOCK * width, 0.f);
  for (int64_t r = 0; r < count; ++r)
    load_channels(args, first + r, 0, args.C, out.data() + r * width);
  return count;
}

// Calls f(i, j, kind, M, dM/ds) for the pairs j < i that count, of one block of rows i and one of rows j, in order.
template <typename F>
inline void each_pair(const SiameseAllPairs& args, const float* x, int64_t first_i, int64_t count_i, const float* y,
                      int64_t first_j, int64_t count_j, const float* w, F&& f) {
  float logits[BLOCK * BLOCK];
  metric_block(x, count_i, y, count_j, first_i == first_j, w, round_up(args.C, LANES), logits);
  const float beta = *args.beta;
  for (int64_t i = first_i; i < first_i + count_i; ++i) {
    for (int64_t j = first_j; j < std::min(i, first_j + count_j); ++j) {
      const int kind = kind_of(args, i, j);
      if (kind < 0) continue;
      const float s = logits[(i - first_i) * BLOCK + j - first_j] + beta;
      const Loss loss = loss_of(kind < 2 ? -s : s);
      f(i, j, kind, loss.value, kind < 2 ? -loss.slope : loss.slope);
    }
  }
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
