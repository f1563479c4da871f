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

// total += [w x]
void add_row(const float* x, double weight, double rounder, int64_t D, double* total) {
  for (int64_t d = 0; d < D; ++d) {
    const double value = weight * x[d];
    total[d] += (value + rounder) - rounder;
  }
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
  std::mutex borders[64];
  const int64_t rows = std::max<int64_t>(256, counted / (8 * std::max(threads, 1)) + 1);
  parallel_for((counted + rows - 1) / rows, threads, [&](int64_t t) {
    thread_local std::vector<double> total;
    thread_local std::vector<float> row;
    row.resize(args.D);
    const int64_t last = std::min(counted, (t + 1) * rows);
    for (int64_t i = t * rows; i < last;) {
      const int64_t k = args.label[order[i]];
      double count = 0;
      total.assign(args.D, 0.);
      for (; i < last && args.label[order[i]] == k; ++i) {
        const int64_t n = order[i];
        // Rows out of order are what the CPU cannot foresee.
        if (i + 4 < last)
          for (int64_t b = 0; b < row_bytes; b += 64)
            __builtin_prefetch(static_cast<const char*>(args.x) + order[i + 4] * row_stride + b);
        const double weight = args.weight ? args.weight[n] : 1.;
        load_row(args.x, args.x_dtype, n * args.stride_x, args.D, row.data());
        add_row(row.data(), weight, args.rounder[0], args.D, total.data());
        count += (weight + args.rounder[1]) - args.rounder[1];
      }
      std::lock_guard<std::mutex> lock(borders[k % 64]);
      for (int64_t d = 0; d < args.D; ++d) args.sums[k * args.D + d] += total[d];
      args.counts[k] += count;
    }
  });
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
