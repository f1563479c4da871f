// Rows against themselves, of length 1 (NT-Xent): s_ij = a <x_i, x_j> = s_ji, so that a pair of rows needs one score and one
// exponential for both. Forward half a product, backward one and a half, where rows and keys that differ take two each.
// docs/math/contrast.md derives the gradients.
//
//   e_ij = exp(s_ij − |a|)   R_i = Σ_{j ∈ A(i), j ≠ t(i)} e_ij   L_i = log1p(R_i / e_it)   lse_i = |a| + log(R_i + e_it)
//   dx_j = a Σ_i (q_ij + q_ji) x_i    q_ij = e_ij w_i, of the target −R_i w_i    w_i = g_i exp(|a| − lse_i)
//
// |s| ≤ |a| ≤ MAX_SCALE takes the place of a running maximum: no e_ij leaves float32.
//
// Rows stand in blocks. A task takes a pair of blocks and adds to the sums or gradients of both; a round is a set of pairs
// that share no block, as in a tournament. A pair waits until both its blocks have been through the rounds before, so no two
// tasks write the same place at once, and each is written in the order of the rounds. Blocks and rounds depend on N alone:
// the same bits for any number of threads.
#include "contrast.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <thread>
#include <vector>

#include "../common/float_rows.h"
#include "../common/pack.h"
#include "../common/parallel.h"
#include "../common/tile.h"
#include "../common/vec.h"
#include "rows.h"

namespace fastproto {
namespace FASTPROTO_ISA {
namespace {

constexpr float MAX_SCALE = 20;
// Columns of a pair of blocks at most: full panels of NR, and nearly full tiles of MR rows (126 of 128, 56 or 60 of 64). Small
// batches take small blocks, for enough pairs to share among threads.
constexpr int64_t WIDE = 128, NARROW = 64;
constexpr int64_t LD = WIDE + LANES;  // of W: a power of two would map a column to few of the L1's sets

struct Blocks {
  int64_t N, D, rows, columns, count, width;
  Buffer tall, across, along;  // per block: a x̂ as left factor, x̂ as right factor of scores, and of gradients
  std::vector<int64_t> lowest_group, highest_group;  // (count,)
  std::vector<int64_t> by_target, first_by_target;   // rows ordered by their target, and where those of a target begin

  int64_t begin(int64_t block) const { return block * rows; }
  int64_t size(int64_t block) const { return std::min(N, begin(block) + rows) - begin(block); }
  int64_t padded(int64_t block) const { return round_up(size(block), NR); }  // at most `columns`
  const float* tall_of(int64_t block) const { return tall.data() + block * rows * D; }
  const float* across_of(int64_t block) const { return across.data() + block * columns * D; }
  const float* along_of(int64_t block) const { return along.data() + block * columns * width; }
};

void pack(const Contrast& args, int threads, Blocks& blocks) {
  blocks.N = args.N, blocks.D = args.D, blocks.width = round_up(args.D, NR);
  blocks.columns = args.N < 8 * WIDE ? NARROW : WIDE;
  blocks.rows = blocks.columns / MR * MR;
  blocks.count = (args.N + blocks.rows - 1) / blocks.rows;
  blocks.tall.take(blocks.count * blocks.rows * args.D);
  blocks.across.take(blocks.count * blocks.columns * args.D);
  blocks.along.take(blocks.count * blocks.columns * blocks.width);
  blocks.lowest_group.resize(blocks.count), blocks.highest_group.resize(blocks.count);
  parallel_for(blocks.count, threads, [&](int64_t b) {
    thread_local Buffer rows;
    const int64_t begin = blocks.begin(b), size = blocks.size(b);
    float* x = rows.take(size * args.D);
    for (int64_t i = 0; i < size; ++i) load_feature(args, begin + i, x + i * args.D);
    pack_across(x, size, args.D, blocks.across.data() + b * blocks.columns * args.D);
    pack_along(x, size, args.D, blocks.columns, blocks.along.data() + b * blocks.columns * blocks.width);
    scale_row(x, size * args.D, inverse_temperature(args, 0), x);
    pack_tall(x, size, args.D, blocks.tall.data() + b * blocks.rows * args.D);
    if (!args.group) return;
    const auto [low, high] = std::minmax_element(args.group + begin, args.group + begin + size);
    blocks.lowest_group[b] = *low, blocks.highest_group[b] = *high;
  });
  blocks.first_by_target.assign(args.N + 1, 0);
  for (int64_t i = 0; i < args.N; ++i) ++blocks.first_by_target[args.target[i] + 1];
  for (int64_t i = 0; i < args.N; ++i) blocks.first_by_target[i + 1] += blocks.first_by_target[i];
  std::vector<int64_t> next(blocks.first_by_target.begin(), blocks.first_by_target.end() - 1);
  blocks.by_target.resize(args.N);
  for (int64_t i = 0; i < args.N; ++i) blocks.by_target[next[args.target[i]]++] = i;
}

// A block's turn in a round: waits for its rounds before, and ends also where a task throws.
class Round {
 public:
  Round(std::atomic<int64_t>& rounds, int64_t round) : rounds_(rounds), round_(round) {
    while (rounds_.load(std::memory_order_acquire) < round_) std::this_thread::yield();
  }
  ~Round() { rounds_.store(round_ + 1, std::memory_order_release); }
  Round(const Round&) = delete;
  Round& operator=(const Round&) = delete;

 private:
  std::atomic<int64_t>& rounds_;
  const int64_t round_;
};

// Every pair of blocks once: in the first round each with itself, then all stand in a circle around the last, turn by one
// seat a round, and each faces its opposite, or nobody.
template <typename Task> void for_pairs(int64_t count, int threads, Task task) {
  const int64_t seats = count + count % 2, circle = seats - 1, pairs = seats / 2;
  std::vector<std::atomic<int64_t>> rounds(count);  // that a block has been through
  // Tasks begin in the order of their numbers, and wait for lower ones alone.
  parallel_for(count + (count > 1 ? circle * pairs : 0), threads, [&](int64_t number) {
    const bool alone = number < count;
    const int64_t turn = (number - count) / pairs, pair = (number - count) % pairs;
    const int64_t one = alone ? number : (turn + pair) % circle;
    const int64_t other = alone ? number : pair == 0 ? circle : (turn + circle - pair) % circle;
    const int64_t I = std::min(one, other), J = std::max(one, other), round = alone ? 0 : turn + 1;
    Round of_one(rounds[I], round);
    if (J == I) return task(I, I);
    if (J == count) return;
    Round of_other(rounds[J], round);
    task(I, J);
  });
}

// e (M rows of block I from `first` on, columns of block J), LD apart.
template <int M>
void exponentials(const Blocks& blocks, float shift, int64_t I, int64_t J, int64_t first, float* e) {
  const int64_t columns = blocks.padded(J);
  for (int64_t column = 0; column < columns; column += NR)
    tile_product<M, 1, MR>(blocks.tall_of(I) + first * blocks.D, blocks.across_of(J) + column * blocks.D, blocks.D,
                           e + column, LD, nullptr);
  for (int m = 0; m < M; ++m)
    for (int64_t j = 0; j < columns; j += LANES) store(e + m * LD + j, exp(load(e + m * LD + j) - shift));
}

// Calls visit(j, whether i's target is j, whether j's target is i, whether their group hides them) for row i and those rows j
// of block J that a target or a group sets apart.
template <typename Visit>
void for_special(const Contrast& args, const Blocks& blocks, int64_t i, int64_t J, Visit visit) {
  const int64_t begin = blocks.begin(J), end = begin + blocks.size(J), t = args.target[i];
  const int64_t mine = args.group ? args.group[i] : 0;
  const bool near = args.group && mine >= blocks.lowest_group[J] && mine <= blocks.highest_group[J];
  const auto hidden = [&](int64_t j) { return near && args.group[j] == mine; };
  for (int64_t j = begin; near && j < end; ++j)
    if (hidden(j)) visit(j, j == t, args.target[j] == i, true);
  if (t >= begin && t < end && !hidden(t)) visit(t, true, args.target[t] == i, false);
  for (int64_t at = blocks.first_by_target[i]; at < blocks.first_by_target[i + 1]; ++at) {
    const int64_t j = blocks.by_target[at];
    if (j >= begin && j < end && j != t && !hidden(j)) visit(j, false, true, false);
  }
}

// Without the targets, which stand apart: beside a target's e the sum of the others would lose its digits, and with it a
// small loss and 1 − p_t.
struct Sums {
  std::vector<float> rest, positive;  // (N,) R_i and e_{i,t(i)}
};

// A pair of rows that a target or a group sets apart: its place in a tile, and what stands there instead of its e.
struct Special {
  float* at;
  float weight;
};

// Adds e (M rows of block I from `first` on, columns of block J) to the sums of both blocks. Specials become 0, and `keep`
// is told of each: row i, row j, whether i and j see it among the others, its place. What `change`(m, j, e) makes of the
// other vectors takes their place.
template <int M, typename Keep, typename Change>
void sum_rows(const Contrast& args, const Blocks& blocks, int64_t I, int64_t J, int64_t first, float* e, Sums& sums,
              Keep keep, Change change) {
  const int64_t size = blocks.size(J), columns = blocks.padded(J), at = blocks.begin(J), i = blocks.begin(I) + first;
  const bool both = I != J;
  float *rest_i = sums.rest.data() + i, *rest_j = sums.rest.data() + at;
  for (int m = 0; m < M; ++m) {
    float* row = e + m * LD;
    std::fill(row + size, row + columns, 0.f);
    for_special(args, blocks, i + m, J, [&](int64_t j, bool i_to_j, bool j_to_i, bool hidden) {
      const float value = row[j - at];
      const bool i_sees = !i_to_j && !hidden, j_sees = !j_to_i && !hidden;
      if (i_to_j) sums.positive[i + m] = value;
      if (j_to_i && both) sums.positive[j] = value;
      if (i_sees) rest_i[m] += value;
      if (j_sees && both) rest_j[j - at] += value;
      keep(i + m, j, i_sees, j_sees, row + j - at);
      row[j - at] = 0;
    });
  }
  Vec totals[M] = {};
  for (int64_t j = 0; j < columns; j += LANES) {
    Vec total{};
#pragma GCC unroll 14
    for (int m = 0; m < M; ++m) {
      const Vec v = load(e + m * LD + j);
      totals[m] += v, total += v;
      change(m, j, v);
    }
    if (!both) continue;
    if (j + LANES <= size) store(rest_j + j, load(rest_j + j) + total);
    else for (int64_t l = 0; l < size - j; ++l) rest_j[j + l] += total[l];
  }
#pragma GCC unroll 14
  for (int m = 0; m < M; ++m) rest_i[m] += sum(totals[m]);
}

// What rows i of block I and j of block J have of each other, q_ij + q_ji = e_ij (w_i + w_j) but for groups and without
// targets: large terms, which come last, so that the many small ones are not rounded beside them.
template <int M>
void weigh_rows(const Contrast& args, const Blocks& blocks, const float* w, int64_t I, int64_t J, int64_t first, float* e,
                Sums& sums) {
  thread_local std::vector<Special> specials;
  specials.clear();
  const float *w_i = w + blocks.begin(I) + first, *w_j = w + blocks.begin(J);
  const auto keep = [&](int64_t i, int64_t j, bool i_sees, bool j_sees, float* place) {
    specials.push_back({place, *place * ((i_sees ? w[i] : 0.f) + (j_sees ? w[j] : 0.f))});
  };
  sum_rows<M>(args, blocks, I, J, first, e, sums, keep,
              [&](int m, int64_t j, Vec v) { store(e + m * LD + j, v * (w_i[m] + load(w_j + j))); });
  for (const Special& special : specials) *special.at = special.weight;
}

// C (M rows from `first` on) += left · along.
template <int M, int STRIDE_M, int STRIDE_K>
void add_product(const Blocks& blocks, const float* left, int64_t block, int64_t depth, float* C) {
  float keep[M];
  std::fill(keep, keep + M, 1.f);
  for (int64_t column = 0; column < blocks.width; column += NR)
    tile_product<M, STRIDE_M, STRIDE_K>(left, blocks.along_of(block) + column * blocks.columns, depth, C + column,
                                        blocks.width, keep);
}

}  // namespace

bool contrast_is_bounded(const Contrast& args) {
  return args.symmetric && args.normalize && args.N > 0 && std::abs(inverse_temperature(args, 0)) <= MAX_SCALE;
}

void contrast_fwd_symmetric(const Contrast& args, int threads) {
  Blocks blocks;
  pack(args, threads, blocks);
  Sums sums{std::vector<float>(args.N, 0.f), std::vector<float>(args.N, 0.f)};
  const float bound = std::abs(inverse_temperature(args, 0));
  for_pairs(blocks.count, threads, [&](int64_t I, int64_t J) {
    thread_local Buffer scratch;
    float* e = scratch.take(MR * LD);
    for_tiles(blocks.size(I), [&](auto M, int64_t first) {
      exponentials<M.value>(blocks, bound, I, J, first, e);
      sum_rows<M.value>(args, blocks, I, J, first, e, sums, [](auto...) {}, [](auto...) {});
    });
  });
  for (int64_t i = 0; i < args.N; ++i) {
    args.loss[i] = std::log1p(sums.rest[i] / sums.positive[i]);
    const float log_sum = std::log(sums.rest[i] + sums.positive[i]);
    args.lse(i) = bound + log_sum;
    args.factor(i) = std::exp(args.lse(i) - bound - log_sum);
  }
}

void contrast_bwd_symmetric(const Contrast& args, int threads) {
  Blocks blocks;
  pack(args, threads, blocks);
  std::vector<float> w(args.N + WIDE, 0.f), dx(args.N * blocks.width, 0.f);
  Sums sums{std::vector<float>(args.N, 0.f), std::vector<float>(args.N, 0.f)};
  const float bound = std::abs(inverse_temperature(args, 0));
  for (int64_t i = 0; i < args.N; ++i) w[i] = row_grad(args, i) * std::exp(bound - args.lse(i)) * args.factor(i);
  for_pairs(blocks.count, threads, [&](int64_t I, int64_t J) {
    thread_local Buffer scratch;
    float* weights = scratch.take(blocks.rows * LD);
    float *dx_i = dx.data() + blocks.begin(I) * blocks.width, *dx_j = dx.data() + blocks.begin(J) * blocks.width;
    for_tiles(blocks.size(I), [&](auto M, int64_t first) {
      float* tile = weights + first * LD;
      exponentials<M.value>(blocks, bound, I, J, first, tile);
      weigh_rows<M.value>(args, blocks, w.data(), I, J, first, tile, sums);
      add_product<M.value, LD, 1>(blocks, tile, J, blocks.padded(J), dx_i + first * blocks.width);
    });
    if (I == J) return;
    for_tiles(blocks.size(J), [&](auto M, int64_t first) {
      add_product<M.value, 1, LD>(blocks, weights + first, I, blocks.size(I), dx_j + first * blocks.width);
    });
  });
  parallel_for(blocks.count, threads, [&](int64_t b) {
    std::vector<float> unit(args.D), other(args.D);
    for (int64_t i = blocks.begin(b); i < blocks.begin(b) + blocks.size(b); ++i) {
      const float inverse = load_feature(args, i, unit.data());
      float *from = dx.data() + i * blocks.width, *to = args.dy + i * args.D;
      // g (p − 1) = −g R / (R + e), of the row and of those whose target it is.
      add_feature(args, -w[i] * sums.rest[i], args.target[i], other.data(), from);
      for (int64_t at = blocks.first_by_target[i]; at < blocks.first_by_target[i + 1]; ++at) {
        const int64_t j = blocks.by_target[at];
        add_feature(args, -w[j] * sums.rest[j], j, other.data(), from);
      }
      for (int64_t d = 0; d < args.D; ++d) to[d] = inverse_temperature(args, 0) * from[d];
      through_length(args.D, unit.data(), inverse, to);
    }
  });
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
