// The nearest centre of every row: a screen in 16-bit integers, and an exact look at what it cannot exclude.
//
// A task is a chunk of rows, in panels of NR along the lanes. Centres stand in tiles of MR, GROUP tiles to a group (which
// the L1 holds at D = 128: 8 · 6 · 256 B on AVX2). The screen keeps one number per row and tile, the best score of the
// tile's centres; with the bound on its error that tells which tiles can hold the nearest centre. Their centres are then
// compared exactly: one tile per row where centres are apart. 2 · N · K · D operations in integers; no N × K matrix.
// The result of a row does not depend on its chunk, nor on what bounds exclude: the same bits for any number of threads.
#include "assign.h"

#include <vector>

#include "../common/parallel.h"
#include "screen.h"
#include "settle.h"

namespace fastproto {
namespace FASTPROTO_ISA {
namespace {

constexpr int64_t GROUP = (48 + MR - 1) / MR;  // tiles: of 48 centres, 56 with AVX-512; bounds exclude fewer larger groups
constexpr int64_t STRETCH = 16;    // groups between two looks at the scores: 16 · 8 · 128 rows · 4 B = 64 KB
constexpr int64_t ROWS = 128;      // of a chunk at most: 64 KB of floats and 32 KB of integers at D = 128
constexpr int64_t WAITING = 32;    // tiles that a row may have waiting for the exact look
constexpr float TOO_LONG = 1e15f;  // squares and products of longer rows might leave float32

// All centres as the screen takes them.
struct Centers {
  int64_t tiles, groups, pairs;
  std::vector<float> origin, shift;             // (D,) subtracted from centres, and from rows: for products nothing
  std::vector<int64_t> order;                   // (tiles · MR,) which centre stands where; −1 where padded
  std::vector<int64_t> group_of;                // (K,)
  Buffer packed;                                // (tiles, pairs, MR) pairs of 16 bits
  std::vector<float> scale, bias;               // (tiles · MR,) the padding has bias ∞
  std::vector<float> length, residual, offset;  // (tiles,) the largest |c|, |c − t r| and bias of a tile
  float longest = 0;                            // max_k |c_k| as they came
  bool screened = true;                         // false: some centre is too long, or not finite
};

// Any point amid the data makes the products small. The median of a few centres: no single far one moves it.
std::vector<float> choose_origin(const Assign& args) {
  const int64_t count = std::min<int64_t>(args.K, 63);
  std::vector<float> origin(args.D), column(count);
  for (int64_t d = 0; d < args.D; ++d) {
    for (int64_t i = 0; i < count; ++i) column[i] = args.centers[i * args.K / count * args.D + d];
    std::nth_element(column.begin(), column.begin() + count / 2, column.end());
    origin[d] = column[count / 2];
  }
  return origin;
}

void pack_tile(const Assign& args, Centers& centers, int64_t tile) {
  thread_local std::vector<float> row;
  thread_local Buffer integers;
  row.assign(2 * centers.pairs, 0.f);
  float* packed = integers.take(MR * centers.pairs);
  std::memset(packed, 0, MR * centers.pairs * sizeof(float));
  for (int m = 0; m < MR; ++m) {
    const int64_t at = tile * MR + m, k = centers.order[at];
    if (k < 0) continue;
    double squares = 0;
    for (int64_t d = 0; d < args.D; ++d) {
      row[d] = args.centers[k * args.D + d] - centers.origin[d];
      squares += double(row[d]) * row[d];
    }
    const Quantized c = quantize(row.data(), args.D, packed + m * centers.pairs);
    centers.scale[at] = c.scale;
    centers.bias[at] = args.inner ? 0.f : static_cast<float>(squares / 2);
    centers.length[tile] = std::max(centers.length[tile], c.length);
    centers.residual[tile] = std::max(centers.residual[tile], c.residual);
    centers.offset[tile] = std::max(centers.offset[tile], centers.bias[at]);
  }
  pack_tall(packed, MR, centers.pairs, centers.packed.data() + tile * centers.pairs * MR);
}

void pack_centers(const Assign& args, Centers& centers, int threads) {
  centers.tiles = (args.K + MR - 1) / MR;
  centers.groups = (centers.tiles + GROUP - 1) / GROUP;
  centers.pairs = round_up(args.D, LANES) / 2;
  centers.origin = choose_origin(args);
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
  if (!centers.screened) return;
  centers.packed.take(centers.tiles * centers.pairs * MR);
  centers.scale.assign(centers.tiles * MR, 0.f);
  centers.bias.assign(centers.tiles * MR, INF);
  for (auto* of_tile : {&centers.length, &centers.residual, &centers.offset}) of_tile->assign(centers.tiles, 0.f);
  parallel_for(centers.tiles, threads, [&](int64_t tile) { pack_tile(args, centers, tile); });
}

// A chunk of rows: as the screen takes them, in panels of NR, and what is known of each.
struct Chunk {
  int64_t begin, count, panels;
  std::vector<const float*> row;                 // (rows,) each (D,) as it came, in float32
  Buffer copies;                                 // (rows, D) of those that came in half precision
  Buffer packed, scores;                         // (panels, pairs, NR) pairs of 16 bits; (STRETCH · GROUP, rows)
  std::vector<float> scale, length, doubt;       // (rows,) s, |s q| or more, and what a centre's length adds to the error
  std::vector<float> certain;                    // (rows,) a score that some centre surely reaches
  std::vector<char> screened;                    // (rows,)
  std::vector<int32_t> waiting;                  // (rows, WAITING) tiles that may hold the nearest centre
  std::vector<float> hope;                       // (rows, WAITING) what their centres reach at best
  std::vector<int> waiting_count;                // (rows,)
  std::vector<Nearest> nearest;                  // (rows,)
  std::vector<char> skipped;                     // (panels, groups)
  // With bounds: |x|² or less; distance to the own centre or more; (panels, groups) the least distance to a centre of the
  // group less `own`, over the panel's rows, or less.
  std::vector<float> square, own, miss;

  int64_t size() const { return panels * NR; }
};

void load_chunk(const Assign& args, const Centers& centers, Chunk& chunk) {
  thread_local std::vector<float> shifted;
  thread_local Buffer integers;
  const int64_t D = args.D, size = chunk.size();
  const bool copied = args.x_dtype != static_cast<int>(Dtype::float32);
  shifted.assign(2 * centers.pairs, 0.f);
  float* packed = integers.take(size * centers.pairs);
  float* copies = copied ? chunk.copies.take(size * D) : nullptr;
  chunk.row.clear();
  chunk.nearest.clear();
  chunk.nearest.reserve(size);
  for (auto* of_row : {&chunk.scale, &chunk.length, &chunk.doubt, &chunk.square}) of_row->assign(size, 0.f);
  chunk.certain.assign(size, -INF);
  chunk.screened.assign(size, 0);
  chunk.waiting.resize(size * WAITING);
  chunk.hope.resize(size * WAITING);
  chunk.waiting_count.assign(size, 0);
  auto place = [&](int64_t i) {
    return (args.row_order ? args.row_order[chunk.begin + i] : chunk.begin + i) * args.stride_x;
  };
  const int64_t item = copied ? 2 : 4;
  for (int64_t i = 0; i < chunk.count; ++i) {
    // Rows out of order are what the CPU cannot foresee.
    if (args.row_order && i + 4 < chunk.count)
      for (int64_t b = 0; b < D * item; b += 64)
        __builtin_prefetch(static_cast<const char*>(args.x) + place(i + 4) * item + b);
    const int64_t at = place(i);
    if (copied) load_row(args.x, args.x_dtype, at, D, copies + i * D);
    const float* row = copied ? copies + i * D : static_cast<const float*>(args.x) + at;
    for (int64_t d = 0; d < D; ++d) shifted[d] = row[d] - centers.shift[d];
    const Quantized x = quantize(shifted.data(), D, packed + i * centers.pairs);
    chunk.row.push_back(row);
    chunk.nearest.emplace_back(args, row, std::max(x.length, SHORTEST) * std::max(centers.longest, SHORTEST));
    chunk.screened[i] = centers.screened && x.length <= TOO_LONG;
    chunk.scale[i] = x.scale;
    // Not exact, the scores are believed.
    chunk.length[i] = args.exact ? x.length + x.residual : 0.f;
    chunk.doubt[i] = args.exact ? x.residual + ROUNDING * x.length : 0.f;
    if (x.length > SHORTEST) chunk.square[i] = x.length * x.length * (1 - 4 * ROUNDING - D * 0x1p-22f / LANES);
  }
  std::memset(packed + chunk.count * centers.pairs, 0, (size - chunk.count) * centers.pairs * sizeof(float));
  pack_across(packed, size, centers.pairs, chunk.packed.take(size * centers.pairs));
  chunk.scores.take(STRETCH * GROUP * size);
}

template <bool VNNI>
void screen(const Centers& centers, Chunk& chunk, int64_t group, float* scores) {
  const int64_t last = std::min(centers.tiles, (group + 1) * GROUP), pairs = centers.pairs;
  const int32_t* packed_centers = reinterpret_cast<const int32_t*>(centers.packed.data());
  const int32_t* packed_rows = reinterpret_cast<const int32_t*>(chunk.packed.data());
  for (int64_t panel = 0; panel < chunk.panels; ++panel) {
    if (chunk.skipped[panel * centers.groups + group]) continue;
    for (int64_t tile = group * GROUP; tile < last; ++tile)
      screen_tile<VNNI>(packed_centers + tile * pairs * MR, packed_rows + panel * pairs * NR, pairs,
                        centers.scale.data() + tile * MR, centers.bias.data() + tile * MR,
                        chunk.scale.data() + panel * NR, scores + (tile - group * GROUP) * chunk.size() + panel * NR);
  }
}

// Shows a row the centres of the tiles that wait, unless a better one has turned up since.
void look(const Centers& centers, Chunk& chunk, int64_t i) {
  for (int w = 0; w < chunk.waiting_count[i]; ++w) {
    if (chunk.hope[i * WAITING + w] < chunk.certain[i]) continue;
    const int64_t* tile = centers.order.data() + int64_t(chunk.waiting[i * WAITING + w]) * MR;
    for (int m = 0; m < MR && tile[m] >= 0; ++m) chunk.nearest[i].show(tile[m]);
  }
  chunk.waiting_count[i] = 0;
}

void wait(const Centers& centers, Chunk& chunk, int64_t i, int64_t tile, float hope) {
  int& count = chunk.waiting_count[i];
  if (count == WAITING) {
    int kept = 0;
    for (int w = 0; w < count; ++w) {
      if (chunk.hope[i * WAITING + w] < chunk.certain[i]) continue;
      chunk.hope[i * WAITING + kept] = chunk.hope[i * WAITING + w];
      chunk.waiting[i * WAITING + kept++] = chunk.waiting[i * WAITING + w];
    }
    count = kept;
    if (count == WAITING) look(centers, chunk, i);
  }
  chunk.waiting[i * WAITING + count] = static_cast<int32_t>(tile);
  chunk.hope[i * WAITING + count++] = hope;
}

// How far the LANES rows from `first` on miss a group whose scores are at most `scores`.
void keep_miss(const Chunk& chunk, int64_t first, Vec scores, float& miss) {
  for (int l = 0; l < LANES && first + l < chunk.count; ++l) {
    // ||x − c||² = |x|² − 2 (<x, c> − |c|² / 2)
    const float distance = std::sqrt(std::max(0.f, chunk.square[first + l] - 2 * scores[l]));
    miss = std::min(miss, distance - chunk.own[first + l]);
  }
}

// Takes in the scores of some groups for LANES rows from `first` on: which tiles can hold the nearest centre?
void judge(const Assign& args, const Centers& centers, Chunk& chunk, int64_t first, int64_t group_begin,
           int64_t group_end) {
  const int64_t panel = first / NR, size = chunk.size();
  const char* skipped = chunk.skipped.data() + panel * centers.groups;
  const float* scores = chunk.scores.data() + first - group_begin * GROUP * size;
  const float *lengths = centers.length.data(), *residuals = centers.residual.data(), *offsets = centers.offset.data();
  const Vec length = load(chunk.length.data() + first), doubt = load(chunk.doubt.data() + first);
  const float rounding = args.exact ? ROUNDING : 0.f;
  auto error = [=](int64_t tile) { return doubt * lengths[tile] + length * residuals[tile] + rounding * offsets[tile]; };
  Vec certain = load(chunk.certain.data() + first);
  Vec nearest[STRETCH];
  for (int64_t group = group_begin; group < group_end; ++group) {
    Vec hope = splat(-INF);
    const int64_t last = skipped[group] ? 0 : std::min(centers.tiles, (group + 1) * GROUP);
    for (int64_t tile = group * GROUP; tile < last; ++tile) {
      const Vec score = load(scores + tile * size), doubted = error(tile);
      certain = max(certain, score - doubted);
      hope = max(hope, score + doubted);
    }
    nearest[group - group_begin] = hope;
  }
  store(chunk.certain.data() + first, certain);
  unsigned valid = 0;
  for (int l = 0; l < LANES; ++l) valid |= unsigned(chunk.screened[first + l]) << l;
  for (int64_t group = group_begin; group < group_end; ++group) {
    if (skipped[group]) continue;
    if (args.slack) keep_miss(chunk, first, nearest[group - group_begin], chunk.miss[panel * centers.groups + group]);
    if (!(bits(nearest[group - group_begin] >= certain) & valid)) continue;
    for (int64_t tile = group * GROUP; tile < std::min(centers.tiles, (group + 1) * GROUP); ++tile) {
      const Vec hope = load(scores + tile * size) + error(tile);
      for (unsigned open = bits(hope >= certain) & valid; open; open &= open - 1)
        wait(centers, chunk, first + __builtin_ctz(open), tile, hope[__builtin_ctz(open)]);
    }
  }
}

// Groups whose centres are, for every row of a panel, farther than the row's own: by the slack of the call before, less
// how far the group's centres and the own one can have moved.
void skip_groups(const Assign& args, const Centers& centers, Chunk& chunk) {
  chunk.own.assign(chunk.size(), 0.f);
  chunk.miss.assign(chunk.panels * centers.groups, INF);
  for (int64_t panel = 0; panel < chunk.panels; ++panel) {
    const int64_t last = std::min(chunk.count, (panel + 1) * NR);
    float farther = -INF, longest = 0;
    bool known = true;
    for (int64_t i = panel * NR; i < last; ++i) {
      const int64_t n = args.row_order[chunk.begin + i];
      const float* c = args.centers + args.label[n] * args.D;
      const float share = (args.D / LANES + 16) * 0x1p-24f;
      chunk.own[i] = std::sqrt(squared_distance(chunk.row[i], c, args.D) * (1 + share)) * (1 + ROUNDING);
      farther = std::max(farther, chunk.own[i] - std::sqrt(args.distance[n]));
      longest = std::max(longest, chunk.own[i]);
      known &= chunk.screened[i] != 0;
    }
    const float* slack = args.slack + (chunk.begin / NR + panel) * centers.groups;
    for (int64_t group = 0; group < centers.groups; ++group)
      chunk.skipped[panel * centers.groups + group] =
          known && slack[group] - args.drift[group] - farther > ROUNDING * longest;
  }
}

// The slack that this call leaves, of the groups it skipped and of those it did not.
void keep_slack(const Assign& args, const Centers& centers, Chunk& chunk, const std::vector<float>& before) {
  for (int64_t panel = 0; panel < chunk.panels; ++panel) {
    const int64_t last = std::min(chunk.count, (panel + 1) * NR);
    float* slack = args.slack + (chunk.begin / NR + panel) * centers.groups;
    float nearer = INF, nearer_than_own = INF, longest = 0;
    bool known = true;
    for (int64_t i = panel * NR; i < last; ++i) {
      const float distance = std::sqrt(args.distance[args.row_order[chunk.begin + i]]);
      nearer = std::min(nearer, std::sqrt(before[i]) - distance);
      nearer_than_own = std::min(nearer_than_own, chunk.own[i] - distance);
      longest = std::max(longest, chunk.own[i]);
      known &= chunk.screened[i] != 0;
    }
    for (int64_t group = 0; group < centers.groups; ++group) {
      const int64_t at = panel * centers.groups + group;
      const float kept = chunk.skipped[at] ? slack[group] - args.drift[group] + nearer : chunk.miss[at] + nearer_than_own;
      slack[group] = known ? kept - ROUNDING * longest : -INF;
    }
    for (int64_t i = panel * NR; i < last; ++i)
      slack[centers.group_of[args.label[args.row_order[chunk.begin + i]]]] = -INF;
  }
}

// Returns how many pairs of a row and a centre it has computed.
int64_t task(const Assign& args, const Centers& centers, int64_t begin, int64_t end) {
  thread_local Chunk chunk;
  thread_local std::vector<float> before;
  chunk.begin = begin;
  chunk.count = end - begin;
  chunk.panels = (chunk.count + NR - 1) / NR;
  load_chunk(args, centers, chunk);
  chunk.skipped.assign(chunk.panels * centers.groups, !centers.screened);
  if (args.slack) skip_groups(args, centers, chunk);
  for (int64_t group = 0; group < centers.groups && centers.screened; group += STRETCH) {
    const int64_t last = std::min(centers.groups, group + STRETCH);
    for (int64_t g = group; g < last; ++g) {
      float* scores = chunk.scores.data() + (g - group) * GROUP * chunk.size();
      has_vnni() ? screen<true>(centers, chunk, g, scores) : screen<false>(centers, chunk, g, scores);
    }
    for (int64_t first = 0; first < chunk.count; first += LANES) judge(args, centers, chunk, first, group, last);
  }
  if (args.slack) {
    before.resize(chunk.count);
    for (int64_t i = 0; i < chunk.count; ++i) before[i] = args.distance[args.row_order[begin + i]];
  }
  for (int64_t i = 0; i < chunk.count; ++i) {
    const int64_t n = args.row_order ? args.row_order[begin + i] : begin + i;
    look(centers, chunk, i);
    Nearest& nearest = chunk.nearest[i];
    for (int64_t k = 0; k < args.K && !chunk.screened[i]; ++k) nearest.show(k);
    args.distance[n] = static_cast<float>(args.inner ? -nearest.gap() : nearest.gap());
    args.label[n] = nearest.label();
  }
  if (args.slack) keep_slack(args, centers, chunk, before);
  int64_t tried = args.slack ? chunk.count : 0;
  for (int64_t panel = 0; panel < chunk.panels; ++panel)
    for (int64_t group = 0; group < centers.groups; ++group)
      if (!chunk.skipped[panel * centers.groups + group])
        tried += std::min<int64_t>(NR, chunk.count - panel * NR) *
                 std::min(MR * GROUP, args.K - group * MR * GROUP);
  return tried;
}

}  // namespace

int64_t assign_panel_rows() { return NR; }
int64_t assign_group_centers() { return MR * GROUP; }

void assign(const Assign& args, int threads) {
  if (args.N == 0) return;
  Centers centers;
  pack_centers(args, centers, threads);
  // Floats and integers of a chunk take 6 bytes a number: 96 KB at most, so that the L2 holds them beside the scores.
  int64_t rows = std::min(ROWS, std::max<int64_t>(NR, 96 * 1024 / (6 * args.D) / NR * NR));
  while (rows > NR && (args.N + rows - 1) / rows < 4 * threads) rows -= NR;
  const int64_t chunks = (args.N + rows - 1) / rows;
  std::atomic<int64_t> tried{0};
  parallel_for(chunks, threads, [&](int64_t t) {
    tried += task(args, centers, t * rows, std::min(args.N, (t + 1) * rows));
  });
  if (args.tried) *args.tried = tried;
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
