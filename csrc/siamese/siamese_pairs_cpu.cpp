// Given pairs, forward and backward: each element of a and b is read once per pass, so memory is what it costs.
//
// Forward: tasks of ROWS pairs. Backward: tasks that own SLICE channels of all pairs, so that dw needs no partial sums.
// Either way the same bits for any number of threads.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/float_rows.h"
#include "../common/parallel.h"
#include "../common/vec.h"
#include "metric.h"
#include "siamese.h"

namespace fastproto {
namespace FASTPROTO_ISA {
namespace {

constexpr int64_t ROWS = 32;
constexpr int64_t SLICE = 64;

void forward_row(const SiamesePairs& args, const float* w, int64_t i) {
  thread_local std::vector<float> a, b;
  args.loss[i] = args.slope[i] = 0;
  if (args.same[i] < 0) return;
  const int64_t width = round_up(args.C, LANES);
  a.assign(width, 0.f);
  b.assign(width, 0.f);
  load_row(args.a, args.a_dtype, i * args.stride_a, args.C, a.data());
  load_row(args.b, args.b_dtype, i * args.stride_b, args.C, b.data());
  float s;
  metric_tile<1, 1>(a.data(), b.data(), w, width, &s);
  s += *args.beta;
  const Loss loss = loss_of(args.same[i] ? -s : s);
  args.loss[i] = loss.value;
  args.slope[i] = args.same[i] ? -loss.slope : loss.slope;
}

void backward_slice(const SiamesePairs& args, int64_t channel, int64_t width) {
  float a[SLICE], b[SLICE];
  double dw[SLICE]{};
  for (int64_t i = 0; i < args.N; ++i) {
    float* da = args.da ? args.da + i * args.C + channel : nullptr;
    if (args.same[i] < 0) {
      if (da) std::fill(da, da + width, 0.f);
      continue;
    }
    load_row(args.a, args.a_dtype, i * args.stride_a + channel, width, a);
    load_row(args.b, args.b_dtype, i * args.stride_b + channel, width, b);
    const float q = args.coefficient[i];
    for (int64_t k = 0; k < width; ++k) {
      const float d = a[k] - b[k];
      if (da) da[k] = q * args.w[channel + k] * static_cast<float>((d > 0) - (d < 0));
      dw[k] += static_cast<double>(q) * std::abs(d);
    }
  }
  if (args.dw)
    for (int64_t k = 0; k < width; ++k) args.dw[channel + k] = static_cast<float>(dw[k]);
}

}  // namespace

void siamese_pairs_fwd(const SiamesePairs& args, int threads) {
  const std::vector<float> w = padded(args.w, args.C);
  parallel_for((args.N + ROWS - 1) / ROWS, threads, [&](int64_t t) {
    for (int64_t i = t * ROWS; i < std::min(args.N, t * ROWS + ROWS); ++i) forward_row(args, w.data(), i);
  });
}

void siamese_pairs_bwd(const SiamesePairs& args, int threads) {
  parallel_for((args.C + SLICE - 1) / SLICE, threads, [&](int64_t t) {
    backward_slice(args, t * SLICE, std::min(SLICE, args.C - t * SLICE));
  });
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
