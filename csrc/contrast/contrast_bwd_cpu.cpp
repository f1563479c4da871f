// Backward into the keys: q_ij = g_i (p_ij − [j = t(i)]), dy_j = a_j Σ_i q_ij x_i, db_j = Σ_i q_ij. The scores are computed
// again, 2 · 2 · N · K · D operations, and with the saved log-sum-exp p; no N × K matrix. p_t − 1 is that of the forward:
// exp(s_t − lse) − 1 would have the rounding of two large numbers where little is left of it.
//
// The forward with the roles exchanged: a task owns a chunk of keys and walks all rows in blocks, so that no two tasks
// write the same place. Rows are summed in their order, thousands of them in float64, and apart from the others those whose
// target a key is: a term is rounded beside all that it is added to. The same bits for any number of threads.
#include "contrast.h"

#include <algorithm>
#include <cmath>
#include <limits>
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

constexpr int64_t MAX_KEYS = 64 * MR;  // of a chunk: y and its gradient at D = 128 take 2 · 448 KB (AVX2: 2 · 192)
constexpr int64_t FLUSH = 8;           // blocks whose sums float32 takes, 2048 rows
constexpr float INF = std::numeric_limits<float>::infinity();

// A row of the block whose target is one of the task's keys.
struct Hit {
  int64_t key, row;
};

inline bool by_key(Hit a, Hit b) { return a.key < b.key; }

// Per block: rows that count, padded to whole vectors with rows that do not (lse = ∞ gives p = 0).
struct Block {
  int64_t first, count, padded;
  int64_t lowest_group, highest_group;
  std::vector<Hit> hits;  // by key, then row
  alignas(64) float lse[MAX_BLOCK];
  alignas(64) float weight[MAX_BLOCK];  // see weight_of
  alignas(64) float scale[MAX_BLOCK];   // of the scores, for products whose rows are not scaled themselves
  const float *across, *along;
};

struct Scratch {
  Buffer y, scale, rows, across, along, scores;
  std::vector<float> dy;
  std::vector<double> total, sums, db;  // (keys, D), (D,), (keys,)
  std::vector<Hit> hits;  // of all rows
};

// What exp(s_ij − lse_i) is multiplied by to be g_i p_ij.
inline float weight_of(const Contrast& args, int64_t i) { return args.factor(i) * row_grad(args, i); }
// q_{i,t(i)}
inline float target_gradient(const Contrast& args, int64_t i) { return args.target_minus_one(i) * row_grad(args, i); }

// scores[i] of one key and block become q_ij, of targets 0. Returns their sum where db is wanted. hit … end are the rows whose
// target the key is.
inline float gradient_row(const Contrast& args, const Block& block, int64_t j, const Hit* hit, const Hit* end,
                          float* scores) {
  const float b = args.b ? args.b[j] : 0.f;
  for (int64_t i = 0; i < block.padded; i += LANES)
    store(scores + i, exp(load(scores + i) + b - load(block.lse + i)) * load(block.weight + i));
  if (args.group && args.key_group[j] >= block.lowest_group && args.key_group[j] <= block.highest_group) {
    const int64_t* groups = args.group + block.first;
    for (int64_t i = 0; i < block.count; ++i) scores[i] = groups[i] == args.key_group[j] ? 0.f : scores[i];
  }
  for (; hit < end; ++hit) scores[hit->row] = 0.f;
  if (!args.db) return 0.f;
  Vec total{};
  for (int64_t i = 0; i < block.padded; i += LANES) total += load(scores + i);
  return sum(total);
}

// Rows and keys are the same: scores[i] become q_ij + q_ji, what row j has from i as its key and as one of its own keys, but
// for targets.
inline void symmetric_row(const Contrast& args, const Block& block, int64_t j, const Hit* hit, const Hit* end,
                          float* scores) {
  const float lse_j = args.lse(j), weight_j = weight_of(args, j);
  // A group hides both ways.
  const bool grouped = args.group && args.group[j] >= block.lowest_group && args.group[j] <= block.highest_group;
  const int64_t* groups = args.group ? args.group + block.first : nullptr;
  const int64_t mine = args.target[j] - block.first;
  const bool has_mine = mine >= 0 && mine < block.count;
  const auto without_targets = [&](int64_t i) {
    if (grouped && groups[i] == args.group[j]) return 0.f;
    const float as_key = args.target[block.first + i] == j ? 0.f : std::exp(scores[i] - block.lse[i]) * block.weight[i];
    return i == mine ? as_key : as_key + std::exp(scores[i] - lse_j) * weight_j;
  };
  float of_hits[MAX_BLOCK];
  for (const Hit* h = hit; h < end; ++h) of_hits[h - hit] = without_targets(h->row);
  const float of_mine = has_mine ? without_targets(mine) : 0.f;
  for (int64_t i = 0; i < block.padded; i += LANES) {
    const Vec s = load(scores + i);
    store(scores + i, exp(s - load(block.lse + i)) * load(block.weight + i) + exp(s - lse_j) * weight_j);
  }
  if (grouped)
    for (int64_t i = 0; i < block.count; ++i) scores[i] = groups[i] == args.group[j] ? 0.f : scores[i];
  std::fill(scores + block.count, scores + block.padded, 0.f);
  for (const Hit* h = hit; h < end; ++h) scores[h->row] = of_hits[h - hit];
  if (has_mine) scores[mine] = of_mine;
}

template <int M, typename Product>
void key_tile(const Contrast& args, const Block& block, int64_t first, const float* y, const float* scale, Product& product,
              float* scores, float* dy, double* db) {
  compute_scores<M>(product, y, block.across, block.padded, args.D, scores);
  float keep[M];
  const Hit *hit = block.hits.data(), *const last = hit + block.hits.size();
  while (hit < last && hit->key < first) ++hit;
  for (int m = 0; m < M; ++m) {
    const Hit* end = hit;
    while (end < last && end->key == first + m) ++end;
    float* row = scores + m * Product::LD;
    if (Product::SCALE_SCORES) scale_scores(row, block.scale, scale[m], block.padded);
    if (args.symmetric)
      symmetric_row(args, block, first + m, hit, end, row);
    else
      db[m] += gradient_row(args, block, first + m, hit, end, row);
    product.finish_weights(row, block.scale, block.padded);
    hit = end;
    keep[m] = 1.f;
  }
  product.template sums<M>(scores, block.along, block.padded, args.D, dy, keep);
}

template <typename Product>
void task(const Contrast& args, int64_t begin, int64_t end) {
  constexpr int64_t ROWS = Product::BLOCK;
  thread_local Scratch scratch;
  Product product(args.N);
  const int64_t width = round_up(args.D, NR), keys = end - begin;
  float* loaded = scratch.rows.take(std::max(ROWS, keys) * args.D);
  float* y = scratch.y.take(round_up(keys, Product::ROWS) * Product::left_size(args.D));
  float* across = scratch.across.take(Product::across_size(args.D));
  float* along = scratch.along.take(Product::along_size(args.D));
  float* scores = Product::scores_in(scratch.scores.take(Product::SCORES_SIZE));
  scratch.dy.assign(keys * width, 0.f);
  scratch.db.assign(keys, 0.);
  const bool many = args.N > FLUSH * ROWS;
  scratch.total.assign(many ? keys * args.D : 0, 0.);
  scratch.sums.resize(args.D);
  scratch.hits.clear();
  float* dy = scratch.dy.data();
  double *db = scratch.db.data(), *total = scratch.total.data(), *sums = scratch.sums.data();
  float* scale = scratch.scale.take(keys);
  for (int64_t j = 0; j < keys; ++j)
    scale[j] = load_factor_y<Product::SCALE_SCORES>(args, begin + j, loaded + j * args.D);
  product.pack_left(loaded, keys, args.D, y);
  for (int64_t first = 0; first < args.N; first += ROWS) {
    Block block;
    block.first = first;
    block.count = std::min(ROWS, args.N - first);
    block.padded = round_up(block.count, NR);
    for (int64_t i = 0; i < block.count; ++i) {
      const int64_t target = args.target[first + i];
      if (target < begin || target >= end) continue;
      block.hits.push_back({target, i});
      scratch.hits.push_back({target, first + i});
    }
    std::stable_sort(block.hits.begin(), block.hits.end(), by_key);
    if (args.group) {
      const auto [low, high] = std::minmax_element(args.group + first, args.group + first + block.count);
      block.lowest_group = *low, block.highest_group = *high;
    }
    for (int64_t i = 0; i < block.padded; ++i) {
      const bool counted = i < block.count && args.target[first + i] >= 0;
      block.lse[i] = counted ? args.lse(first + i) : INF;
      block.weight[i] = counted ? weight_of(args, first + i) : 0.f;
      float* row = loaded + i * args.D;
      // An ignored row is emptied, so that not even a NaN in it reaches the keys.
      block.scale[i] = counted ? load_factor_x<Product::SCALE_SCORES>(args, first + i, row) : 0.f;
      if (!counted && i < block.count) std::fill(row, row + args.D, 0.f);
    }
    product.pack_block(loaded, block.count, block.padded, args.D, across, along);
    block.across = across;
    block.along = along;
    Product::for_tiles(keys, [&](auto M, int64_t j) {
      const float* left = y + j * Product::left_size(args.D);
      key_tile<M.value>(args, block, begin + j, left, scale + j, product, scores, dy + j * width, db + j);
    });
    if (!many || (first / ROWS + 1) % FLUSH != 0) continue;
    for (int64_t j = 0; j < keys; ++j)
      for (int64_t d = 0; d < args.D; ++d) total[j * args.D + d] += dy[j * width + d];
    std::fill(dy, dy + keys * width, 0.f);
  }
  const auto add_target = [&](int64_t i, int64_t row) {  // q_{i,t(i)} times a row
    add_feature(args, target_gradient(args, i) * factor_of_row(args), row, loaded, sums);
  };
  std::stable_sort(scratch.hits.begin(), scratch.hits.end(), by_key);
  const Hit *hit = scratch.hits.data(), *const last = hit + scratch.hits.size();
  for (int64_t j = begin; j < end; ++j) {
    float *from = dy + (j - begin) * width, *to = args.dy + j * args.D;
    std::copy(from, from + args.D, sums);
    for (int64_t d = 0; many && d < args.D; ++d) sums[d] += total[(j - begin) * args.D + d];
    for (; hit < last && hit->key == j; ++hit) {
      add_target(hit->row, hit->row);
      db[j - begin] += target_gradient(args, hit->row);
    }
    if (args.symmetric) add_target(j, args.target[j]);
    std::copy(sums, sums + args.D, from);
    const float* key = read_row(args.y, args.y_dtype, j * args.stride_y, args.D, loaded);
    const float inverse = args.normalize ? inverse_length(key, args.D) : 1.f;
    scale_row(key, args.D, inverse, loaded);
    if (args.da) args.da[j] = dot(from, loaded, args.D);
    if (args.db) args.db[j] = static_cast<float>(db[j - begin]);
    const float a = factor_of_key(args, j);
    for (int64_t d = 0; d < args.D; ++d) to[d] = a * from[d];
    if (args.normalize) through_length(args.D, loaded, inverse, to);
  }
}

}  // namespace

void contrast_bwd_keys(const Contrast& args, int threads) {
  if (contrast_is_bounded(args)) return contrast_bwd_symmetric(args, threads);
  with_product(args, [&](auto chosen) {
    typedef typename decltype(chosen)::Product Product;
    const int64_t even = (args.K + threads - 1) / threads;
    const int64_t keys = std::max<int64_t>(Product::ROWS, std::min(MAX_KEYS, round_up(even, Product::ROWS)));
    parallel_for((args.K + keys - 1) / keys, threads,
                 [&](int64_t t) { task<Product>(args, t * keys, std::min(args.K, t * keys + keys)); });
  });
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
