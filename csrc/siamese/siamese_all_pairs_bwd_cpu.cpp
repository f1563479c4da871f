// Backward: with q_ij = dL/ds_ij of the pairs that count, and G_i = Σ_j q_ij sign(x_i − x_j),
//
//   dx_i = w ∘ G_i        dw = Σ_i (x_i − m) ∘ G_i  for any m, since Σ_i G_i = 0: the mean, for the least rounding
//
// The rows are taken in panels of PANEL, in two steps each. First the logits of the panel's pairs again, hence
// q (PANEL × N): no N × N matrix. Then G, by tasks that own a slice of the channels of all rows, so that a pair is met
// once and adds q · sign to one row and takes it from the other. Per pair and channel that is 3 operations and 7.
// Sums run over 4 rows, blocks of COLUMNS and panels, in this order: the same bits for any number of threads.
#include "all_pairs.h"

#include <algorithm>
#include <vector>

#include "../common/parallel.h"
#include "../common/vec.h"

namespace fastproto {
namespace FASTPROTO_ISA {
namespace {

constexpr int64_t PANEL = 6 * BLOCK;  // q takes 590 KB at N = 1024
constexpr int64_t COLUMNS = 128;
constexpr int64_t SLICE = 16;         // channels of a task: one cache line of a float32 row
constexpr int ROWS_AT_ONCE = 4;       // rows that share a load of x_j and G_j

// q of BLOCK rows of the panel against BLOCK rows before them or among them, 0 for pairs that do not count.
void coefficients(const SiameseAllPairs& args, const float* w, int64_t first, int64_t before, float* q, int64_t ldq) {
  thread_local std::vector<float> x, y;
  const int64_t count = load_block(args, first, x), others = load_block(args, before, y);
  for (int64_t r = 0; r < BLOCK; ++r) std::fill(q + r * ldq, q + r * ldq + BLOCK, 0.f);
  each_pair(args, x.data(), first, count, y.data(), before, others, w,
            [&](int64_t i, int64_t j, int kind, float, float slope) {
              q[(i - first) * ldq + j - before] = args.coefficient[kind] * slope;
            });
}

// G of ROWS_AT_ONCE rows i and the rows j in [begin, end), for LANES channels: x and G (N', LANES).
inline void add_pairs(const float* q, int64_t ldq, int64_t i, int64_t begin, int64_t end, const float* x, float* G) {
  const IntVec sign_bit = (IntVec)splat(-0.f);
  Vec rows[ROWS_AT_ONCE], total[ROWS_AT_ONCE]{};
  for (int g = 0; g < ROWS_AT_ONCE; ++g) rows[g] = load(x + (i + g) * LANES);
  for (int64_t j = begin; j < end; ++j) {
    const Vec other = load(x + j * LANES);
    Vec back{};
    for (int g = 0; g < ROWS_AT_ONCE; ++g) {
      const Vec d = rows[g] - other;
      // q with the sign of d; 0 where d is 0, not where it is NaN.
      const IntVec signed_q = (IntVec)splat(q[g * ldq + j]) ^ ((IntVec)d & sign_bit);
      const Vec v = (Vec)(signed_q & (IntVec)(d != 0));
      total[g] += v;
      back += v;
    }
    store(G + j * LANES, load(G + j * LANES) - back);
  }
  for (int g = 0; g < ROWS_AT_ONCE; ++g) store(G + (i + g) * LANES, load(G + (i + g) * LANES) + total[g]);
}

// dx = w ∘ G and dw for `width` channels, once dx holds the whole G. A row without a pair has G = 0, and not even a NaN
// in it reaches dw.
void finish(const SiameseAllPairs& args, int64_t channel, int64_t width, const float* x) {
  double total[LANES]{}, dw[LANES]{};
  int64_t count[LANES]{};
  for (int64_t i = 0; i < args.N; ++i) {
    const float* G = args.dx + i * args.C + channel;
    for (int64_t k = 0; k < width; ++k)
      if (G[k] != 0) total[k] += x[i * LANES + k], ++count[k];
  }
  for (int64_t i = 0; i < args.N; ++i) {
    float* G = args.dx + i * args.C + channel;
    for (int64_t k = 0; k < width; ++k) {
      if (G[k] != 0) dw[k] += (x[i * LANES + k] - total[k] / count[k]) * G[k];
      G[k] *= args.w[channel + k];
    }
  }
  for (int64_t k = 0; k < width; ++k) args.dw[channel + k] = static_cast<float>(dw[k]);
}

// One panel's pairs for LANES channels, added to G in dx.
void panel_lanes(const SiameseAllPairs& args, int64_t first, int64_t end, const float* q, int64_t ldq,
                 int64_t channel) {
  thread_local std::vector<float> x, G;
  const int64_t width = std::min<int64_t>(LANES, args.C - channel);
  x.assign(end * LANES, 0.f);
  G.assign(end * LANES, 0.f);
  const int64_t count = std::min(end, args.N);
  for (int64_t i = 0; i < count; ++i)
    load_channels(args, i, channel, width, x.data() + i * LANES);
  for (int64_t begin = 0; begin < end; begin += COLUMNS)
    for (int64_t i = std::max(first, begin); i < end; i += ROWS_AT_ONCE)
      add_pairs(q + (i - first) * ldq, ldq, i, begin, std::min(begin + COLUMNS, i + ROWS_AT_ONCE), x.data(), G.data());
  for (int64_t i = 0; i < count; ++i)
    for (int64_t k = 0; k < width; ++k) args.dx[i * args.C + channel + k] += G[i * LANES + k];
  if (end >= args.N) finish(args, channel, width, x.data());
}

}  // namespace

void siamese_all_pairs_bwd(const SiameseAllPairs& args, int threads) {
  std::fill(args.dx, args.dx + args.N * args.C, 0.f);
  std::fill(args.dw, args.dw + args.C, 0.f);
  const std::vector<float> w = padded(args.w, args.C);
  const int64_t blocks = (args.N + BLOCK - 1) / BLOCK, ldq = blocks * BLOCK;
  std::vector<float> q(std::min(PANEL, ldq) * ldq);
  for (int64_t first = 0; first < args.N; first += PANEL) {
    const int64_t end = std::min(first + PANEL, ldq), columns = end / BLOCK;
    parallel_for((end - first) / BLOCK * columns, threads, [&](int64_t t) {
      const int64_t row = t / columns * BLOCK, column = t % columns * BLOCK;
      if (column <= first + row) coefficients(args, w.data(), first + row, column, q.data() + row * ldq + column, ldq);
    });
    parallel_for((args.C + SLICE - 1) / SLICE, threads, [&](int64_t t) {
      for (int64_t channel = t * SLICE; channel < std::min(args.C, t * SLICE + SLICE); channel += LANES)
        panel_lanes(args, first, end, q.data(), ldq, channel);
    });
  }
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
