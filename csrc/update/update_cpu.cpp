// Sums per label. Rows are first put in the order of their labels, so that a task adds up runs of one label in a buffer of
// D numbers and touches the result once per run: N · D numbers are read once, K · D written about once. Two tasks may share
// a label at their border; since sums on the grid are exact, it does not matter who adds first.
#include "update.h"

#include <mutex>
#include <vector>

#include "../common/parallel.h"
#include "../common/tile.h"

// A fused multiply-add would round w x otherwise than the reference does.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

namespace fastproto {
namespace FASTPROTO_ISA {
namespace {

// Adds [v] and [v − [v]]'.
inline void add(double value, double rounder, double fine_rounder, double& coarse, double& fine) {
  const double rounded = (value + rounder) - rounder;
  coarse += rounded;
  fine += ((value - rounded) + fine_rounder) - fine_rounder;
}

}  // namespace

void update(const Update& args, int threads) {
  std::vector<int64_t> place(args.K + 1, 0);
  for (int64_t n = 0; n < args.N; ++n)
    if (args.label[n] >= 0) ++place[args.label[n] + 1];
  for (int64_t k = 0; k < args.K; ++k) place[k + 1] += place[k];
  const int64_t counted = place[args.K];
  std::vector<int64_t> order(counted);
  for (int64_t n = 0; n < args.N; ++n)
    if (args.label[n] >= 0) order[place[args.label[n]]++] = n;

  const int64_t item = args.x_dtype == static_cast<int>(Dtype::float32) ? 4 : 2;
  const int64_t row_stride = args.stride_x * item, row_bytes = args.D * item;
  const double of_x = args.rounder[0], fine_of_x = args.rounder[2];
  double* const fine_sums = args.sums + args.K * args.D;
  std::mutex borders[64];
  const int64_t rows = std::max<int64_t>(256, counted / (8 * std::max(threads, 1)) + 1);
  parallel_for((counted + rows - 1) / rows, threads, [&](int64_t t) {
    thread_local std::vector<double> coarse, fine;
    thread_local std::vector<float> row;
    row.resize(args.D);
    const int64_t last = std::min(counted, (t + 1) * rows);
    for (int64_t i = t * rows; i < last;) {
      const int64_t k = args.label[order[i]];
      double count = 0, fine_count = 0;
      coarse.assign(args.D, 0.), fine.assign(args.D, 0.);
      double *const coarse_d = coarse.data(), *const fine_d = fine.data();
      for (; i < last && args.label[order[i]] == k; ++i) {
        const int64_t n = order[i];
        // Rows out of order are what the CPU cannot foresee.
        if (i + 4 < last)
          for (int64_t b = 0; b < row_bytes; b += 64)
            __builtin_prefetch(static_cast<const char*>(args.x) + order[i + 4] * row_stride + b);
        const double weight = args.weight ? args.weight[n] : 1.;
        load_row(args.x, args.x_dtype, n * args.stride_x, args.D, row.data());
        const float* const x = row.data();
        for (int64_t d = 0; d < args.D; ++d) add(weight * x[d], of_x, fine_of_x, coarse_d[d], fine_d[d]);
        add(weight, args.rounder[1], args.rounder[3], count, fine_count);
      }
      std::lock_guard<std::mutex> lock(borders[k % 64]);
      for (int64_t d = 0; d < args.D; ++d) args.sums[k * args.D + d] += coarse[d], fine_sums[k * args.D + d] += fine[d];
      args.counts[k] += count, args.counts[args.K + k] += fine_count;
    }
  });
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
