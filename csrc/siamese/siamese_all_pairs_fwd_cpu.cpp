// Forward: the mean of M over the pairs of each kind, each unordered pair once, 3 · C · N² / 2 operations. The mean slope
// comes with it, since it is the gradient of β.
//
// A task is a block of rows against all rows before it. Its sums wait for those of the other tasks and are added in their
// order: the same bits for any number of threads.
#include "all_pairs.h"

#include <vector>

#include "../common/parallel.h"

namespace fastproto {
namespace FASTPROTO_ISA {
namespace {

struct Sums {
  double loss[3]{}, slope[3]{};
  int64_t count[3]{};
};

Sums task(const SiameseAllPairs& args, const float* w, int64_t first) {
  thread_local std::vector<float> x, y;
  Sums sums;
  const int64_t count = load_block(args, first, x);
  for (int64_t before = 0; before <= first; before += BLOCK) {
    const int64_t others = load_block(args, before, y);
    each_pair(args, x.data(), first, count, y.data(), before, others, w,
              [&](int64_t, int64_t, int kind, float loss, float slope) {
                sums.loss[kind] += loss;
                sums.slope[kind] += slope;
                ++sums.count[kind];
              });
  }
  return sums;
}

}  // namespace

void siamese_all_pairs_fwd(const SiameseAllPairs& args, int threads) {
  const std::vector<float> w = padded(args.w, args.C);
  const int64_t blocks = (args.N + BLOCK - 1) / BLOCK;
  std::vector<Sums> parts(blocks);
  // The last block has the most rows before it: it starts first.
  parallel_for(blocks, threads, [&](int64_t t) {
    parts[blocks - 1 - t] = task(args, w.data(), (blocks - 1 - t) * BLOCK);
  });
  Sums all;
  for (const Sums& part : parts) {
    for (int kind = 0; kind < 3; ++kind) {
      all.loss[kind] += part.loss[kind];
      all.slope[kind] += part.slope[kind];
      all.count[kind] += part.count[kind];
    }
  }
  for (int kind = 0; kind < 3; ++kind) {
    const double share = all.count[kind] ? 1.0 / static_cast<double>(all.count[kind]) : 0.0;
    args.mean[kind] = static_cast<float>(all.loss[kind] * share);
    args.slope[kind] = static_cast<float>(all.slope[kind] * share);
    args.share[kind] = static_cast<float>(share);
  }
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
