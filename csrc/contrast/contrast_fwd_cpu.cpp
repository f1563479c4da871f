// Forward: one pass over the keys gives the log-sum-exp and Σ_j p_ij a_j y_j, and with it dL/dx. It is attention with
// keys = values: 2 · 2 · N · K · D operations with a gradient for x, half without; no N × K matrix.
//
// A task is a chunk of rows times a segment of keys. It walks the segment in blocks of keys, packs a block in both
// layouts (2 · 256 · 128 · 4 B = 256 KB: the L2's), and takes its rows through the block a tile at a time: scores, running
// maximum, exponentials, and their product with the keys. Segments are merged in their order. How many there are depends
// on N and K alone, and a row does not depend on its chunk: the same bits for any number of threads.
#include "contrast.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "../common/float_rows.h"
#include "../common/parallel.h"
#include "../common/tile.h"
#include "../common/vec.h"
#include "product.h"
#include "rows.h"

namespace fastproto {
namespace FASTPROTO_ISA {
namespace {

constexpr int64_t MAX_ROWS = 64 * MR;  // of a chunk: x and its gradient at D = 128 take 2 · 448 KB (AVX2: 2 · 192)
constexpr float INF = std::numeric_limits<float>::infinity();
// Below every score, and finite: no −∞ − (−∞) while a row has seen nothing.
constexpr float LOWEST = std::numeric_limits<float>::lowest();

// Running state of a chunk's rows over one segment of keys; sum, spread and acc are without the target.
struct Segment {
  float *max, *sum, *positive, *spread, *best;  // (N,) spread: Σ e^{s−max} (s − max), for the entropy
  int64_t* top1;
  float* acc;                                   // (N, D) Σ e^{s−max} a y
};

// A block of keys a_j y_j, or in bfloat16 of y_j, in both layouts, padded to whole vectors with keys that no row may see.
struct Block {
  int64_t first, count, padded;
  int64_t lowest_group, highest_group;
  bool biased;                // some b is not 0, be it of the padding
  alignas(64) float b[MAX_BLOCK];      // −∞ for the padding
  alignas(64) float scale[MAX_BLOCK];  // of the scores, for products whose keys are not scaled themselves
  const float *across, *along;
};

struct Scratch {
  Buffer x, inverse, rows, across, along, scores;
};

// −∞ where the row may not see a key. Most blocks of NT-Xent or a queue hold no key of the row's group.
inline void hide_group(const Contrast& args, const Block& block, int64_t i, float* scores) {
  const int64_t mine = args.group[i], target = args.target[i] - block.first;
  if (mine < block.lowest_group || mine > block.highest_group) return;
  const bool has_target = target >= 0 && target < block.count;
  const float positive = has_target ? scores[target] : 0.f;
  const int64_t* groups = args.key_group + block.first;
  for (int64_t j = 0; j < block.count; ++j) scores[j] = groups[j] == mine ? -INF : scores[j];
  if (has_target) scores[target] = positive;
}

// scores[j] = s_ij of one row and block. Returns their maxima lane by lane, of numbers: a NaN shows in the sum of exponentials.
inline Vec finish_scores(const Contrast& args, const Block& block, int64_t i, float* scores) {
  if (block.biased)
    for (int64_t j = 0; j < block.padded; j += LANES) store(scores + j, load(scores + j) + load(block.b + j));
  if (args.group) hide_group(args, block, i, scores);
  Vec best[NV];  // in turns: a maximum waits four cycles for the one before it
  std::fill(best, best + NV, splat(LOWEST));
  for (int64_t j = 0; j < block.padded; j += NR)
    for (int v = 0; v < NV; ++v) best[v] = larger(load(scores + j + v * LANES), best[v]);
  return larger(best[0], best[1]);
}

// Σ e^{s−before} (s − before) of exponentials that add up to sum, with another maximum in place of before.
inline float spread_below(float spread, float sum, float before, float max) {
  const float share = std::exp(before - max);
  return share == 0 ? 0.f : (spread + sum * (before - max)) * share;  // no −∞ · 0
}

// Entropy and top1 want more of a block than the loss does. target: its place in the block, if it has one.
inline void add_stats(const Block& block, const float* scores, int64_t target, float before, float max, int64_t i,
                      Segment& segment) {
  float spread = spread_below(segment.spread[i], segment.sum[i], before, max);
  for (int64_t j = 0; j < block.count; ++j) {
    if (scores[j] == -INF) continue;
    const float below = scores[j] - max, e = std::exp(below);
    if (j != target && e != 0) spread += e * below;
    if (scores[j] > segment.best[i]) {
      segment.best[i] = scores[j];
      segment.top1[i] = block.first + j;
    }
  }
  segment.spread[i] = spread;
}

// One row's scores of a block become e^{s−max}, the target's 0. It comes last: beside it the sum of the others would lose its
// digits, and with it a small loss and 1 − p_t. Returns their sums lane by lane.
inline Vec exponentials(const Contrast& args, const Block& block, int64_t i, float before, float max, float* scores,
                        Segment& segment) {
  const int64_t target = args.target[i] - block.first;
  const bool has_target = target >= 0 && target < block.count;
  if (has_target) segment.positive[i] = scores[target];
  if (segment.spread) add_stats(block, scores, target, before, max, i, segment);
  if (has_target) scores[target] = -INF;
  Vec total{};
  for (int64_t j = 0; j < block.padded; j += LANES) {
    const Vec e = exp(load(scores + j) - max);
    total += e;
    store(scores + j, e);
  }
  return total;
}

// A tile of a chunk's rows through one block.
template <int M, typename Product>
void row_tile(const Contrast& args, const Block& block, int64_t first, const float* x, const float* inverse, Product& product,
              float* scores, Segment& segment) {
  constexpr int64_t LD = Product::LD;
  compute_scores<M>(product, x, block.across, block.padded, args.D, scores);
  constexpr int PADDED = (M + LANES - 1) / LANES * LANES;
  alignas(64) float before[PADDED] = {}, max[PADDED], shrink[PADDED], sum[PADDED];
  Vec lanes[M];
  for (int m = 0; m < M; ++m) {
    if (Product::SCALE_SCORES) scale_scores(scores + m * LD, block.scale, inverse[m], block.padded);
    lanes[m] = finish_scores(args, block, first + m, scores + m * LD);
  }
  fold_rows(lanes, larger, max);
  std::copy_n(segment.max + first, M, before);
  for (int m = 0; m < PADDED; m += LANES) {
    store(max + m, larger(load(max + m), load(before + m)));
    store(shrink + m, exp(load(before + m) - load(max + m)));
  }
  for (int m = 0; m < M; ++m) {
    lanes[m] = exponentials(args, block, first + m, before[m], max[m], scores + m * LD, segment);
    if (segment.acc) product.finish_weights(scores + m * LD, block.scale, block.padded);
  }
  fold_rows(lanes, [](Vec a, Vec b) { return a + b; }, sum);
  for (int m = 0; m < M; ++m) segment.sum[first + m] = segment.sum[first + m] * shrink[m] + sum[m];
  std::copy_n(max, M, segment.max + first);
  if (segment.acc)
    product.template sums<M>(scores, block.along, block.padded, args.D, segment.acc + first * round_up(args.D, NR), shrink);
}

template <typename Product>
void task(const Contrast& args, int64_t row_begin, int64_t row_end, int64_t key_begin, int64_t key_end,
          Segment segment) {
  constexpr int64_t KEYS = Product::BLOCK;
  thread_local Scratch scratch;
  Product product(args.N);
  const int64_t rows = row_end - row_begin;
  float* loaded = scratch.rows.take(std::max(KEYS, rows) * args.D);
  float* x = scratch.x.take(round_up(rows, Product::ROWS) * Product::left_size(args.D));
  float* across = scratch.across.take(Product::across_size(args.D));
  float* along = segment.acc ? scratch.along.take(Product::along_size(args.D)) : nullptr;
  float* scores = Product::scores_in(scratch.scores.take(Product::SCORES_SIZE));
  float* inverse = scratch.inverse.take(rows);
  for (int64_t i = 0; i < rows; ++i)
    inverse[i] = load_factor_x<Product::SCALE_SCORES>(args, row_begin + i, loaded + i * args.D);
  product.pack_left(loaded, rows, args.D, x);
  for (int64_t first = key_begin; first < key_end; first += KEYS) {
    Block block;
    block.first = first;
    block.count = std::min(KEYS, key_end - first);
    block.padded = round_up(block.count, NR);
    block.biased = args.b || block.count < block.padded;
    for (int64_t j = 0; j < block.count; ++j) {
      block.b[j] = args.b ? args.b[first + j] : 0.f;
      block.scale[j] = load_factor_y<Product::SCALE_SCORES>(args, first + j, loaded + j * args.D);
    }
    std::fill(block.b + block.count, block.b + block.padded, -INF);
    std::fill(block.scale + block.count, block.scale + block.padded, 0.f);
    if (args.group) {
      const auto [low, high] = std::minmax_element(args.key_group + first, args.key_group + first + block.count);
      block.lowest_group = *low, block.highest_group = *high;
    }
    product.pack_block(loaded, block.count, block.padded, args.D, across, along);
    block.across = across;
    block.along = along;
    Product::for_tiles(rows, [&](auto M, int64_t i) {
      const float* left = x + i * Product::left_size(args.D);
      row_tile<M.value>(args, block, row_begin + i, left, inverse + i, product, scores, segment);
    });
  }
}

// Merges a row's segments in their order and writes what was asked for.
void finish_row(const Contrast& args, const std::vector<Segment>& segments, int64_t i) {
  const int64_t width = round_up(args.D, NR), target = args.target[i];
  float max = LOWEST, sum = 0, positive = -INF, spread = 0, best = -INF;
  int64_t top1 = -1;
  for (const Segment& segment : segments) max = std::max(max, segment.max[i]);
  for (const Segment& segment : segments) {
    const float share = std::exp(segment.max[i] - max);
    sum += segment.sum[i] * share;
    if (segment.positive[i] != -INF) positive = segment.positive[i];
    if (!segment.spread) continue;
    spread += spread_below(segment.spread[i], segment.sum[i], segment.max[i], max);
    if (segment.best[i] > best) best = segment.best[i], top1 = segment.top1[i];
  }
  const bool counted = target >= 0;
  // Not lse − s: the difference of two large numbers would lose the digits of a small loss.
  const float rest = sum, own = std::exp(positive - max);
  sum += own;
  const float log_sum = positive == max ? std::log1p(rest) : std::log(sum), lse = counted ? max + log_sum : 0.f;
  args.loss[i] = counted ? (max - positive) + log_sum : 0.f;
  args.lse(i) = lse;
  args.factor(i) = counted ? std::exp(lse - max - log_sum) : 1.f;
  if (args.entropy) {
    if (own > 0) spread += own * (positive - max);
    // Neither term is negative: log Σ e^{s−max}, and Σ p (max − s).
    args.entropy[i] = counted ? log_sum - spread / sum : 0.f;
    args.top1[i] = counted ? top1 : target;
    args.positive[i] = counted ? positive : 0.f;
  }
  if (!args.dx) return;
  const float weight = static_cast<float>(1 / args.divisor);
  float* dx = args.dx + i * args.D;
  std::fill(dx, dx + args.D, 0.f);
  if (!counted) return;
  for (const Segment& segment : segments) {
    const float share = std::exp(segment.max[i] - max) / sum * weight;
    for (int64_t d = 0; d < args.D; ++d) dx[d] += segment.acc[i * width + d] * share;
  }
  thread_local std::vector<float> row;
  row.resize(args.D);
  load_key(args, target, row.data());
  const float q = std::expm1(-args.loss[i]) * weight;
  for (int64_t d = 0; d < args.D; ++d) dx[d] += q * row[d];
  if (args.normalize) through_length(args.D, row.data(), load_feature(args, i, row.data()), dx);
}

template <typename Product>
void every_row(const Contrast& args, int threads) {
  constexpr int64_t ROWS = Product::ROWS, KEYS = Product::BLOCK;
  if (args.N == 0) return;
  // Few rows are little work for every key that is packed: split the keys, into no more segments than hold the
  // accumulators of 1024 rows.
  const int64_t blocks = (args.K + KEYS - 1) / KEYS;
  const int64_t wanted = std::max<int64_t>(1, std::min(1024 / args.N, blocks));
  const int64_t keys = (blocks + wanted - 1) / wanted * KEYS;
  const int64_t segment_count = (args.K + keys - 1) / keys;
  const int64_t width = round_up(args.D, NR);
  // As many chunks of rows as keep every thread busy to the end.
  int64_t chunks = (args.N + MAX_ROWS - 1) / MAX_ROWS;
  while (chunks * segment_count < 4 * threads && chunks * segment_count % threads != 0 && chunks * ROWS < args.N) ++chunks;
  const int64_t rows = round_up((args.N + chunks - 1) / chunks, ROWS);
  chunks = (args.N + rows - 1) / rows;

  const int64_t floats = args.N * (3 + (args.entropy ? 2 : 0) + (args.dx ? width : 0));
  std::vector<float> state(segment_count * floats, 0.f);
  std::vector<int64_t> top1(args.entropy ? segment_count * args.N : 0, 0);
  std::vector<Segment> segments(segment_count);
  for (int64_t s = 0; s < segment_count; ++s) {
    float* next = state.data() + s * floats;
    auto take = [&](int64_t count) { float* p = next; next += count; return p; };
    segments[s] = {take(args.N), take(args.N), take(args.N), nullptr, nullptr, nullptr, nullptr};
    std::fill(segments[s].max, segments[s].max + args.N, LOWEST);
    std::fill(segments[s].positive, segments[s].positive + args.N, -INF);
    if (args.entropy) {
      segments[s].spread = take(args.N);
      segments[s].best = take(args.N);
      segments[s].top1 = top1.data() + s * args.N;
      std::fill(segments[s].best, segments[s].best + args.N, -INF);
    }
    if (args.dx) segments[s].acc = take(args.N * width);
  }
  parallel_for(chunks * segment_count, threads, [&](int64_t t) {
    const int64_t row = t / segment_count * rows, key = t % segment_count * keys;
    task<Product>(args, row, std::min(row + rows, args.N), key, std::min(key + keys, args.K), segments[t % segment_count]);
  });
  parallel_for((args.N + 63) / 64, threads, [&](int64_t block) {
    for (int64_t i = block * 64; i < std::min(args.N, block * 64 + 64); ++i) finish_row(args, segments, i);
  });
}

}  // namespace

void contrast_fwd(const Contrast& given, int threads) {
  Contrast args = given;
  args.loss = &given.target_minus_one(0);  // where the losses wait to become p_t − 1
  if (contrast_is_bounded(args) && !args.dx && !args.entropy) contrast_fwd_symmetric(args, threads);
  else with_product(args, [&](auto chosen) { every_row<typename decltype(chosen)::Product>(args, threads); });
  if (given.reduced) *given.loss = static_cast<float>(std::accumulate(args.loss, args.loss + args.N, 0.0) / given.divisor);
  else std::copy(args.loss, args.loss + args.N, given.loss);
  parallel_for((args.N + 1023) / 1024, threads, [&](int64_t block) {
    for (int64_t i = block * 1024; i < std::min(args.N, block * 1024 + 1024); ++i) args.loss[i] = std::expm1(-args.loss[i]);
  });
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
