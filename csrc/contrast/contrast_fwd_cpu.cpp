// Forward: one pass over the keys gives the log-sum-exp and Σ_j p_ij a_j y_j, and with it dL/dx. It is attention with
// keys = values: 2 · 2 · N · K · D operations with a gradient for x, half without; no N × K matrix.
//
// A task is a chunk of rows times a segment of keys. It walks the segment in blocks of KEYS keys, packs a block in both
// layouts (2 · 256 · 128 · 4 B = 256 KB: the L2's), and takes its rows through the block MR at a time: scores, running
// maximum, exponentials, and their product with the keys. Segments are merged in their order. How many there are depends
// on N and K alone, and a row does not depend on its chunk: the same bits for any number of threads.
#include "contrast.h"

#include <limits>
#include <vector>

#include "../common/parallel.h"
#include "../common/tile.h"

namespace fastproto {
namespace FASTPROTO_ISA {
namespace {

constexpr int64_t KEYS = 256 / NR * NR;
constexpr int64_t MAX_ROWS = 64 * MR;  // of a chunk: x and its gradient at D = 128 take 2 · 200 KB
constexpr float INF = std::numeric_limits<float>::infinity();

// Running state of a chunk's rows over one segment of keys.
struct Segment {
  float *max, *sum, *positive, *weighted, *best;  // (N,) weighted: Σ e^{s−max} s, for the entropy
  int64_t* top1;
  float* acc;                                     // (N, D) Σ e^{s−max} a y
};

// Per block: scale, bias and group of its keys, padded to whole vectors with keys that no row may see.
struct Block {
  int64_t first, count, padded;
  float a[KEYS], b[KEYS];
  const float *across, *along;
};

struct Scratch {
  std::vector<float> x, rows, across, along, scores;
};

// scores[m, j] = s_ij of one row and block, −inf where the row may not see the key. Returns their maximum.
inline float finish_scores(const Contrast& args, const Block& block, int64_t i, float* scores) {
  for (int64_t j = 0; j < block.padded; j += LANES)
    store(scores + j, load(scores + j) * load(block.a + j) + load(block.b + j));
  const int64_t target = args.target[i] - block.first;
  if (args.group) {
    const int64_t mine = args.group[i];
    for (int64_t j = 0; j < block.count; ++j)
      if (args.key_group[block.first + j] == mine && j != target) scores[j] = -INF;
  }
  Vec best = splat(-INF);
  for (int64_t j = 0; j < block.padded; j += LANES) {
    const Vec s = load(scores + j);
    best = (s > best) | (s != s) ? s : best;
  }
  return largest(best);
}

// Entropy and top1 want more of a block than the loss does.
inline void add_stats(const Block& block, const float* scores, float max, float shrink, int64_t i, Segment& segment) {
  float weighted = segment.weighted[i] * shrink;
  for (int64_t j = 0; j < block.count; ++j) {
    if (scores[j] == -INF) continue;
    weighted += std::exp(scores[j] - max) * scores[j];
    if (scores[j] > segment.best[i]) {
      segment.best[i] = scores[j];
      segment.top1[i] = block.first + j;
    }
  }
  segment.weighted[i] = weighted;
}

// Takes one row's scores of a block into its state: scores become a_j e^{s−max}. Returns by what to shrink what was
// there.
inline float add_row(const Contrast& args, const Block& block, int64_t i, float* scores, Segment& segment) {
  const float before = segment.max[i];
  const float here = finish_scores(args, block, i, scores);
  const float max = here > before || here != here ? here : before;
  if (max == -INF) {  // nothing seen so far
    std::fill(scores, scores + block.padded, 0.f);
    return 1.f;
  }
  const int64_t target = args.target[i] - block.first;
  if (target >= 0 && target < block.count) segment.positive[i] = scores[target];
  const float shrink = before == -INF ? 0.f : std::exp(before - max);
  if (segment.weighted) add_stats(block, scores, max, shrink, i, segment);
  Vec total{};
  for (int64_t j = 0; j < block.padded; j += LANES) {
    const Vec e = exp(load(scores + j) - max);
    total += e;
    store(scores + j, e * load(block.a + j));
  }
  segment.sum[i] = segment.sum[i] * shrink + sum(total);
  segment.max[i] = max;
  return shrink;
}

// MR or fewer rows of a chunk through one block.
template <int M>
void row_tile(const Contrast& args, const Block& block, int64_t first, const float* x, float* scores, Segment& segment) {
  for (int64_t panel = 0; panel < block.padded / NR; ++panel)
    tile_product<M>(x, args.D, block.across + panel * args.D * NR, args.D, scores + panel * NR, KEYS, nullptr);
  float shrink[M];
  for (int m = 0; m < M; ++m) shrink[m] = add_row(args, block, first + m, scores + m * KEYS, segment);
  if (!segment.acc) return;
  const int64_t width = round_up(args.D, NR);
  for (int64_t panel = 0; panel < width / NR; ++panel)
    tile_product<M>(scores, KEYS, block.along + panel * block.padded * NR, block.padded,
                    segment.acc + first * width + panel * NR, width, shrink);
}

template <int M = MR>
void rows_left(int count, const Contrast& args, const Block& block, int64_t first, const float* x, float* scores,
               Segment& segment) {
  if (count == M) return row_tile<M>(args, block, first, x, scores, segment);
  if constexpr (M > 1) rows_left<M - 1>(count, args, block, first, x, scores, segment);
}

void task(const Contrast& args, int64_t row_begin, int64_t row_end, int64_t key_begin, int64_t key_end,
          Segment segment) {
  thread_local Scratch scratch;
  scratch.x.resize((row_end - row_begin) * args.D);
  scratch.rows.resize(KEYS * args.D);
  scratch.across.resize(KEYS * args.D);
  scratch.along.resize(KEYS * round_up(args.D, NR));
  scratch.scores.resize(MR * KEYS);
  for (int64_t i = row_begin; i < row_end; ++i)
    load_row(args.x, args.x_dtype, i * args.stride_x, args.D, scratch.x.data() + (i - row_begin) * args.D);
  for (int64_t first = key_begin; first < key_end; first += KEYS) {
    Block block;
    block.first = first;
    block.count = std::min(KEYS, key_end - first);
    block.padded = round_up(block.count, NR);
    for (int64_t j = 0; j < block.padded; ++j) {
      const bool real = j < block.count;
      block.a[j] = real ? args.a[first + j] : 0.f;
      block.b[j] = real ? (args.b ? args.b[first + j] : 0.f) : -INF;
      if (real) load_row(args.y, args.y_dtype, (first + j) * args.stride_y, args.D, scratch.rows.data() + j * args.D);
    }
    pack_across(scratch.rows.data(), block.count, args.D, scratch.across.data());
    if (segment.acc) pack_along(scratch.rows.data(), block.count, args.D, block.padded, scratch.along.data());
    block.across = scratch.across.data();
    block.along = scratch.along.data();
    for (int64_t i = row_begin; i < row_end; i += MR)
      rows_left(static_cast<int>(std::min<int64_t>(MR, row_end - i)), args, block, i,
                scratch.x.data() + (i - row_begin) * args.D, scratch.scores.data(), segment);
  }
}

// Merges a row's segments in their order and writes what was asked for.
void finish_row(const Contrast& args, const std::vector<Segment>& segments, int64_t i) {
  const int64_t width = round_up(args.D, NR), target = args.target[i];
  float max = -INF, sum = 0, positive = -INF, weighted = 0, best = -INF;
  int64_t top1 = -1;
  for (const Segment& segment : segments) {
    const float here = segment.max[i];
    if (here > max || here != here) max = here;
  }
  for (const Segment& segment : segments) {
    const float share = segment.max[i] == -INF ? 0.f : std::exp(segment.max[i] - max);
    sum += segment.sum[i] * share;
    if (segment.positive[i] != -INF) positive = segment.positive[i];
    if (!segment.weighted) continue;
    weighted += segment.weighted[i] * share;
    if (segment.best[i] > best) best = segment.best[i], top1 = segment.top1[i];
  }
  const bool counted = target >= 0;
  // (max − s) + log sum, not lse − s: the difference of two large numbers would lose the digits of a small loss.
  args.loss[i] = counted ? (max - positive) + std::log(sum) : 0.f;
  args.lse[i] = counted ? max + std::log(sum) : 0.f;
  if (args.entropy) {
    args.entropy[i] = counted ? args.lse[i] - weighted / sum : 0.f;
    args.top1[i] = counted ? top1 : target;
    args.positive[i] = counted ? positive : 0.f;
  }
  if (!args.dx) return;
  float* dx = args.dx + i * args.D;
  std::fill(dx, dx + args.D, 0.f);
  if (!counted) return;
  for (const Segment& segment : segments) {
    if (segment.max[i] == -INF) continue;
    const float share = std::exp(segment.max[i] - max) / sum;
    for (int64_t d = 0; d < args.D; ++d) dx[d] += segment.acc[i * width + d] * share;
  }
  thread_local std::vector<float> key;
  key.resize(args.D);
  load_row(args.y, args.y_dtype, target * args.stride_y, args.D, key.data());
  for (int64_t d = 0; d < args.D; ++d) dx[d] -= args.a[target] * key[d];
}

}  // namespace

void contrast_fwd(const Contrast& args, int threads) {
  if (args.N == 0) return;
  // Few rows leave threads idle and re-read every key for little work: split the keys, into no more than holds the
  // segments' accumulators to 1024 rows.
  const int64_t splits = std::max<int64_t>(1, std::min(1024 / args.N, args.K / (4 * KEYS)));
  const int64_t keys = round_up((args.K + splits - 1) / splits, KEYS);
  const int64_t width = round_up(args.D, NR);
  const int64_t even = (args.N + threads - 1) / threads;
  const int64_t rows = std::min(MAX_ROWS, round_up(even, MR));
  const int64_t chunks = (args.N + rows - 1) / rows;

  const int64_t floats = args.N * (3 + (args.entropy ? 2 : 0) + (args.dx ? width : 0));
  std::vector<float> state(splits * floats, 0.f);
  std::vector<int64_t> top1(args.entropy ? splits * args.N : 0, 0);
  std::vector<Segment> segments(splits);
  for (int64_t s = 0; s < splits; ++s) {
    float* next = state.data() + s * floats;
    auto take = [&](int64_t count) { float* p = next; next += count; return p; };
    segments[s] = {take(args.N), take(args.N), take(args.N), nullptr, nullptr, nullptr, nullptr};
    std::fill(segments[s].max, segments[s].max + args.N, -INF);
    std::fill(segments[s].positive, segments[s].positive + args.N, -INF);
    if (args.entropy) {
      segments[s].weighted = take(args.N);
      segments[s].best = take(args.N);
      segments[s].top1 = top1.data() + s * args.N;
      std::fill(segments[s].best, segments[s].best + args.N, -INF);
    }
    if (args.dx) segments[s].acc = take(args.N * width);
  }
  parallel_for(chunks * splits, threads, [&](int64_t t) {
    const int64_t row = t / splits * rows, key = t % splits * keys;
    task(args, row, std::min(row + rows, args.N), key, std::min(key + keys, args.K), segments[t % splits]);
  });
  parallel_for((args.N + 63) / 64, threads, [&](int64_t block) {
    for (int64_t i = block * 64; i < std::min(args.N, block * 64 + 64); ++i) finish_row(args, segments, i);
  });
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
