// The centres as the screen takes them: in tiles of MR, GROUP tiles to a group, in integers, with what bounds their error.
// Included by *_cpu.cpp only.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "../common/distance.h"
#include "../common/float_rows.h"
#include "../common/pack.h"
#include "../common/parallel.h"
#include "../common/tile.h"
#include "../common/vec.h"
#include "assign.h"
#include "screen.h"

namespace fastproto {
namespace FASTPROTO_ISA {

constexpr int64_t GROUP = (48 + MR - 1) / MR;  // tiles: of 48 centres, 56 with AVX-512; bounds exclude fewer larger groups
constexpr float TOO_LONG = 1e15f;  // squares and products of longer rows might leave float32

// All centres as the screen takes them.
struct Centers {
  int64_t tiles, groups, words;
  std::vector<float> origin, shift;             // (D,) subtracted from centres, and from rows: for products nothing
  std::vector<int64_t> order;                   // (tiles · MR,) which centre stands where; −1 where padded
  std::vector<int64_t> group_of;                // (K,)
  Buffer packed;                                // (tiles, words, MR) words of two or four numbers
  bool amx = false;                             // bytes are screened on AMX, which wants them in
  Buffer rows;                                  // (tiles, MR, words)
  std::vector<int32_t> start;                   // (tiles · MR, …) where the sums of products start from
  std::vector<float> bias;                      // (tiles · MR, …) of the padding ∞
  // (tiles,) the scale t of all centres of a tile, the largest of their own, which costs nothing: the bound takes the largest
  // residual anyway. And the largest |c|, |c − t r| and bias.
  std::vector<float> scale, length, residual, offset;
  float longest = 0;                            // max_k |c_k| as they came
  bool screened = true;                         // false: some centre is too long, or not finite
};

template <typename Number>
void pack_tile(const Assign& args, Centers& centers, int64_t tile) {
  thread_local std::vector<float> rows;
  thread_local Buffer integers;
  const int64_t padded = centers.words * PER_WORD<Number>;
  rows.assign(MR * padded, 0.f);
  float* packed = integers.take(MR * centers.words);
  std::fill(packed, packed + MR * centers.words, 0.f);
  Quantized measured[MR];
  float scale = 0;
  for (int m = 0; m < MR; ++m) {
    const int64_t at = tile * MR + m, k = centers.order[at];
    if (k < 0) continue;
    float* row = rows.data() + m * padded;
    double squares = 0;
    for (int64_t d = 0; d < args.D; ++d) {
      row[d] = args.centers[k * args.D + d] - centers.origin[d];
      squares += double(row[d]) * row[d];
    }
    measured[m] = measure<Number>(row, round_up(args.D, LANES));
    scale = std::max(scale, measured[m].scale);
    centers.bias[at] = args.inner ? 0.f : static_cast<float>(squares / 2);
    centers.length[tile] = std::max(centers.length[tile], measured[m].length);
    centers.offset[tile] = std::max(centers.offset[tile], centers.bias[at]);
  }
  centers.scale[tile] = scale;
  for (int m = 0; m < MR; ++m) {
    const int64_t at = tile * MR + m;
    if (centers.order[at] < 0) continue;
    Number* numbers = reinterpret_cast<Number*>(packed + m * centers.words);
    measured[m].scale = scale;
    quantize(rows.data() + m * padded, padded, measured[m], numbers);
    if (sizeof(Number) == 1) centers.start[at] = -ROW_OFFSET * std::accumulate(numbers, numbers + padded, 0);
    centers.residual[tile] = std::max(centers.residual[tile], measured[m].residual);
  }
  pack_tall(packed, MR, centers.words, centers.packed.data() + tile * centers.words * MR);
  if (centers.amx) std::copy_n(packed, MR * centers.words, centers.rows.data() + tile * centers.words * MR);
}

inline void order_centers(const Assign& args, Centers& centers) {
  centers.tiles = (args.K + MR - 1) / MR;
  centers.groups = (centers.tiles + GROUP - 1) / GROUP;
  centers.origin = choose_origin(args.centers, args.K, args.D);
  centers.shift = args.inner ? std::vector<float>(args.D, 0.f) : centers.origin;
  centers.order.assign(centers.tiles * MR, -1);
  centers.group_of.resize(args.K);
  for (int64_t i = 0; i < args.K; ++i) {
    centers.order[i] = args.center_order ? args.center_order[i] : i;
    centers.group_of[centers.order[i]] = i / (MR * GROUP);
  }
  for (int64_t k = 0; k < args.K; ++k) {
    const float length = std::sqrt(dot(args.centers + k * args.D, args.centers + k * args.D, args.D));
    centers.screened &= length <= TOO_LONG;
    centers.longest = std::max(centers.longest, length);
  }
}

template <typename Number>
void pack_centers(const Assign& args, Centers& centers, int threads) {
  centers.amx = sizeof(Number) == 1 && has_amx() && args.D > AMX_BYTES / 2;  // vectors are as fast at fewer
  centers.words = round_up(args.D, centers.amx ? AMX_BYTES : LANES) / PER_WORD<Number>;
  if (!centers.screened) return;
  const int64_t size = centers.tiles * MR + LANES;  // the last tile is read as a whole vector
  centers.packed.take(size * centers.words);
  if (centers.amx) centers.rows.take((centers.tiles + 1) * MR * centers.words);  // tiles are read in pairs
  centers.start.assign(size, 0);
  centers.bias.assign(size, INF);
  for (auto* of_tile : {&centers.scale, &centers.length, &centers.residual, &centers.offset})
    of_tile->assign(centers.tiles, 0.f);
  parallel_for(centers.tiles, threads, [&](int64_t tile) { pack_tile<Number>(args, centers, tile); });
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
