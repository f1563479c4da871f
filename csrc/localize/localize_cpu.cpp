// localize on the CPU. One task per image: the channels' sum, its rows stretched to the image's width, then a search for each
// edge from outside inwards, up to the first value above the threshold.
//
// Floor: the map read once. Scratch per thread: h rows of the image's width. Same bits for any number of threads.
#include "localize.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "../common/dtype.h"
#include "../common/parallel.h"

namespace fastproto {
namespace FASTPROTO_ISA {
namespace {

template <typename T> inline double widen(T x) {
  if constexpr (std::is_floating_point_v<T>) {
    return x;
  } else {
    return to_float(x);
  }
}

// heat[p] = sum over the channels of place p, in their order whatever the strides.
template <typename T> void channel_sum(const Localize& args, int64_t n, double* heat) {
  const int64_t* stride = args.strides;
  const bool dense = stride[2] == args.w * stride[3];
  const int64_t rows = dense ? 1 : args.h, columns = dense ? args.h * args.w : args.w, step = stride[3];
  std::fill(heat, heat + args.h * args.w, 0.);
  for (int64_t c = 0; c < args.C; ++c) {
    for (int64_t y = 0; y < rows; ++y) {
      const T* row = static_cast<const T*>(args.map) + n * stride[0] + c * stride[1] + y * stride[2];
      double* sums = heat + y * columns;
      if (step == 1) {
        for (int64_t x = 0; x < columns; ++x) sums[x] += widen(row[x]);
      } else {
        for (int64_t x = 0; x < columns; ++x) sums[x] += widen(row[x * step]);
      }
    }
  }
}

template <typename T> void one_image(const Localize& args, int64_t n) {
  thread_local std::vector<double> heat, stretched;
  thread_local std::vector<Neighbours> rows;
  heat.resize(args.h * args.w);
  channel_sum<T>(args, n, heat.data());
  const auto [low, high] = std::minmax_element(heat.begin(), heat.end());
  const double least = *low, range = *high - least;
  const bool finite = std::all_of(heat.begin(), heat.end(), [](double x) { return std::isfinite(x); });
  if (!finite || !(range > 0)) return args.write(n, true, 0, 0, 0, 0);

  const double ratio_h = static_cast<double>(args.h) / static_cast<double>(args.H);
  const double ratio_w = static_cast<double>(args.w) / static_cast<double>(args.W);
  for (double& x : heat) x = (x - least) / range;
  stretched.resize(args.h * args.W);
  for (int64_t x = 0; x < args.W; ++x) {
    const Neighbours columns = neighbours(x, args.w, ratio_w);
    for (int64_t y = 0; y < args.h; ++y) {
      const double* row = heat.data() + y * args.w;
      stretched[y * args.W + x] = mixed(row[columns.first], row[columns.second], columns.weight);
    }
  }
  rows.resize(args.H);
  for (int64_t y = 0; y < args.H; ++y) rows[y] = neighbours(y, args.h, ratio_h);

  const auto hot = [&](int64_t y, int64_t x) {
    const double first = stretched[rows[y].first * args.W + x], second = stretched[rows[y].second * args.W + x];
    return mixed(first, second, rows[y].weight) > args.threshold;
  };
  const auto hot_row = [&](int64_t y) {
    for (int64_t x = 0; x < args.W; ++x)
      if (hot(y, x)) return true;
    return false;
  };
  const auto hot_column = [&](int64_t x) {
    for (int64_t y = 0; y < args.H; ++y)
      if (hot(y, x)) return true;
    return false;
  };
  int64_t top = 0, left = 0, bottom = args.H - 1, right = args.W - 1;
  while (top < args.H && !hot_row(top)) ++top;
  if (top == args.H) return args.write(n, true, 0, 0, 0, 0);
  while (bottom > top && !hot_row(bottom)) --bottom;
  while (left < right && !hot_column(left)) ++left;
  while (right > left && !hot_column(right)) --right;
  args.write(n, false, top, left, bottom, right);
}

}  // namespace

void localize(const Localize& args, int threads) {
  with_dtype(args.dtype, [&](auto zero) {
    parallel_for(args.N, threads, [&](int64_t n) { one_image<decltype(zero)>(args, n); });
  });
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
