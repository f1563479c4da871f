// Sums per label. Rows are first put in the order of their labels, so that a task adds up runs of one label in registers, some
// columns at a time, and touches the result once per run: N · D numbers are read once from memory, K · D written about once.
// Two tasks may share a label at their border; since sums on the grid are exact, it does not matter who adds first.
#include "update.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <vector>

#include "../common/float_rows.h"
#include "../common/parallel.h"
#include "../common/vec.h"

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
template <typename Value>
inline void add(Value value, double rounder, double fine_rounder, Value& coarse, Value& fine) {
  const Value rounded = (value + rounder) - rounder;
  coarse += rounded;
  fine += ((value - rounded) + fine_rounder) - fine_rounder;
}

// Columns whose sums, coarse and fine, stay in registers while the rows of a run pass: 2 · 8 vectors.
constexpr int WIDTH = LANES / 2, BLOCK = 8 * WIDTH;
typedef double DoubleVec __attribute__((vector_size(WIDTH * 8)));
typedef float FloatVec __attribute__((vector_size(WIDTH * 4)));

struct Run {
  const int64_t* order;  // rows of one label
  int64_t count;
  int64_t last;          // in `order`, of what may be fetched ahead
};

// Sums of BLOCK columns of a run from `first` on, or, not WHOLE, of fewer.
template <bool WHOLE>
void sum_columns(const Update& args, Run run, int64_t first, int64_t columns, double* coarse, double* fine) {
  DoubleVec sum[BLOCK / WIDTH]{}, rest[BLOCK / WIDTH]{};
  alignas(64) float row[BLOCK]{};
  const int64_t item = args.x_dtype == static_cast<int>(Dtype::float32) ? 4 : 2, row_bytes = args.stride_x * item;
  for (int64_t i = 0; i < run.count; ++i) {
    const int64_t n = run.order[i];
    // Rows out of order are what the CPU cannot foresee.
    if (first == 0)
      for (int64_t b = 0; b < args.D * item; b += 64)
        __builtin_prefetch(static_cast<const char*>(args.x) + run.order[std::min(i + 6, run.last)] * row_bytes + b);
    const float* x = read_row(args.x, args.x_dtype, n * args.stride_x + first, columns, row);
    if (!WHOLE && x != row) x = static_cast<const float*>(std::memcpy(row, x, columns * sizeof(float)));
    const double weight = args.weight ? args.weight[n] : 1.;
#pragma GCC unroll 8
    for (int v = 0; v < BLOCK / WIDTH; ++v) {
      FloatVec values;
      std::memcpy(&values, x + v * WIDTH, sizeof values);
      add(__builtin_convertvector(values, DoubleVec) * weight, args.rounder[0], args.rounder[2], sum[v], rest[v]);
    }
  }
  std::memcpy(coarse, sum, columns * sizeof(double));
  std::memcpy(fine, rest, columns * sizeof(double));
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

  double* const fine_sums = args.sums + args.K * args.D;
  std::mutex borders[64];
  const int64_t rows = std::max<int64_t>(256, counted / (8 * std::max(threads, 1)) + 1);
  parallel_for((counted + rows - 1) / rows, threads, [&](int64_t t) {
    thread_local std::vector<double> coarse, fine;
    coarse.resize(args.D), fine.resize(args.D);
    const int64_t last = std::min(counted, (t + 1) * rows);
    for (int64_t i = t * rows; i < last;) {
      const int64_t k = args.label[order[i]];
      double count = 0, fine_count = 0;
      Run run{order.data() + i, 0, last - 1 - i};
      for (; i < last && args.label[order[i]] == k; ++i, ++run.count)
        add(args.weight ? args.weight[order[i]] : 1., args.rounder[1], args.rounder[3], count, fine_count);
      for (int64_t first = 0; first < args.D; first += BLOCK) {
        const int64_t columns = std::min<int64_t>(BLOCK, args.D - first);
        const auto sum_some = columns == BLOCK ? sum_columns<true> : sum_columns<false>;
        sum_some(args, run, first, columns, coarse.data() + first, fine.data() + first);
      }
      std::lock_guard<std::mutex> lock(borders[k % 64]);
      for (int64_t d = 0; d < args.D; ++d) args.sums[k * args.D + d] += coarse[d], fine_sums[k * args.D + d] += fine[d];
      args.counts[k] += count, args.counts[args.K + k] += fine_count;
    }
  });
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
