// The nearest centre of every row: a screen in integers of 16 or 8 bits, and an exact look at what it cannot exclude.
//
// A task is a chunk of rows, in panels of NR along the lanes. Centres stand in tiles of MR, GROUP tiles to a group (which
// the L1 holds at D = 128: 8 · 6 · 256 B on AVX2). The screen keeps one number per row and tile, the best score of the
// tile's centres; with the bound on its error that tells which tiles can hold the nearest centre. Their centres are then
// compared exactly: one tile per row where centres are apart. 2 · N · K · D operations in integers; no N × K matrix.
// With VNNI 8 bits are tried first, on panels from all over the rows; where they leave too much open, 16 bits go on.
// The result of a row does not depend on its chunk, nor on what bounds exclude: the same bits for any number of threads.
#include "assign.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "../common/parallel.h"
#include "../common/tile.h"
#include "../common/vec.h"
#include "bounds.h"

namespace fastproto {
namespace FASTPROTO_ISA {
namespace {

constexpr int64_t ROWS = 128;      // of a chunk at most: 64 KB of floats and 32 KB of integers at D = 128

// The scores of some groups of centres.
template <typename Number, bool VNNI>
void screen(const Centers& centers, Chunk& chunk, int64_t group_begin, int64_t group_end) {
  const int64_t words = centers.words;
#if FASTPROTO_AMX && defined(__AVX512F__)
  Tiles amx;
#endif
  for (int64_t group = group_begin; group < group_end; ++group)
    for (int64_t panel = 0; panel < chunk.panels; ++panel) {
      if (chunk.skipped[panel * centers.groups + group]) continue;
      const int64_t first = group * GROUP, last = std::min(centers.tiles, first + GROUP);
      const float *rows = chunk.packed.data() + panel * words * NR, *row_scale = chunk.scale.data() + panel * NR;
      float* best = chunk.scores.data() + (first - group_begin * GROUP) * chunk.size() + panel * NR;
#if FASTPROTO_AMX && defined(__AVX512F__)
      if (centers.amx) {
        for (int64_t tile = first; tile < last; tile += 2, best += 2 * chunk.size())
          screen_two_tiles(amx, centers.rows.data() + tile * words * MR, rows, words, centers.scale.data() + tile,
                           centers.bias.data() + tile * MR, row_scale, std::min<int64_t>(2, last - tile), best,
                           chunk.size());
        continue;
      }
#endif
      for (int64_t tile = first; tile < last; ++tile, best += chunk.size())
        screen_tile<Number, VNNI>(reinterpret_cast<const Word*>(centers.packed.data()) + tile * words * MR,
                                  centers.start.data() + tile * MR, reinterpret_cast<const Word*>(rows), words,
                                  centers.scale[tile], centers.bias.data() + tile * MR, row_scale, best);
    }
}

// Takes in the scores of some groups for LANES rows from `first` on: which tiles can hold the nearest centre?
template <typename Number, bool VNNI>
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
      certain = larger(certain, score - doubted);
      hope = larger(hope, score + doubted);
    }
    nearest[group - group_begin] = hope;
  }
  store(chunk.certain.data() + first, certain);
  unsigned valid = 0;
  for (int l = 0; l < LANES; ++l) valid |= unsigned(chunk.screened[first + l]) << l;
  for (int64_t group = group_begin; group < group_end; ++group) {
    if (skipped[group]) continue;
    if (args.slack) {
      float& least = chunk.miss[panel * centers.groups + group];
      least = std::min(least, miss(chunk, first, nearest[group - group_begin]));
    }
    if (!(bits(nearest[group - group_begin] >= certain) & valid)) continue;
    for (int64_t tile = group * GROUP; tile < std::min(centers.tiles, (group + 1) * GROUP); ++tile) {
      const Vec hope = load(scores + tile * size) + error(tile);
      for (unsigned open = bits(hope >= certain) & valid; open; open &= open - 1)
        wait<Number, VNNI>(args, centers, chunk, first + __builtin_ctz(open), tile, hope[__builtin_ctz(open)]);
    }
  }
}

// What the tasks of a call count together.
struct Effort {
  std::atomic<int64_t> tried{0};  // pairs of a row and a centre that were computed
  std::atomic<int64_t> looks{0};  // tiles that were shown to a row
};

template <typename Number, bool VNNI>
void task(const Assign& args, const Centers& centers, int64_t begin, int64_t end, Effort& effort) {
  // By a pointer: the address of a thread's own variable would be asked for again and again.
  thread_local const std::unique_ptr<Chunk> owned = std::make_unique<Chunk>();
  Chunk& chunk = *owned;
  thread_local std::vector<float> before;
  chunk.begin = begin;
  chunk.count = end - begin;
  chunk.panels = (chunk.count + NR - 1) / NR;
  chunk.looks = 0;
  load_chunk<Number>(args, centers, chunk);
  chunk.skipped.assign(chunk.panels * centers.groups, !centers.screened);
  if (args.slack) skip_groups(args, centers, chunk);
  for (int64_t group = 0; group < centers.groups && centers.screened; group += STRETCH) {
    const int64_t last = std::min(centers.groups, group + STRETCH);
    screen<Number, VNNI>(centers, chunk, group, last);
    for (int64_t first = 0; first < chunk.count; first += LANES)
      judge<Number, VNNI>(args, centers, chunk, first, group, last);
  }
  if (args.slack) {
    before.resize(chunk.count);
    for (int64_t i = 0; i < chunk.count; ++i) before[i] = args.distance[args.row_order[begin + i]];
  }
  fetch_tile(centers, chunk, 0);
  fetch_tile(centers, chunk, 1);
  fetch_centers<Number, VNNI>(args, centers, chunk, 0);
  for (int64_t i = 0; i < chunk.count; ++i) {
    const int64_t n = args.row_order ? args.row_order[begin + i] : begin + i;
    fetch_tile(centers, chunk, i + 2);
    fetch_centers<Number, VNNI>(args, centers, chunk, i + 1);
    look<Number, VNNI>(args, centers, chunk, i);
    Nearest& nearest = chunk.nearest[i];
    for (int64_t tile = 0; tile < centers.tiles && !chunk.screened[i]; ++tile)
      show(centers, chunk, i, tile, ALL_OPEN);
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
  effort.tried += tried;
  effort.looks += chunk.looks;
}

// Rows from `begin` to `end`, of whole panels.
struct Range {
  int64_t begin, end;
};

// Some panels from all over the rows, whose choice depends on N alone, and the rest of the rows in chunks.
struct Chunks {
  std::vector<Range> trials, rest;

  Chunks(const Assign& args, int threads) {
    // Floats and integers of a chunk take 6 bytes a number: 96 KB at most, so that the L2 holds them beside the scores.
    int64_t rows = std::min(ROWS, std::max<int64_t>(NR, 96 * 1024 / (6 * args.D) / NR * NR));
    while (rows > NR && (args.N + rows - 1) / rows < 4 * threads) rows -= NR;
    const int64_t panels = (args.N + NR - 1) / NR, count = std::min<int64_t>(8, (panels + 7) / 8);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const Range here{panel * NR, std::min(args.N, (panel + 1) * NR)};
      if (panel * count % panels < count) trials.push_back(here);
      else if (rest.empty() || rest.back().end != here.begin || here.end - rest.back().begin > rows) rest.push_back(here);
      else rest.back().end = here.end;
    }
  }
};

template <typename Number, bool VNNI>
void run(const Assign& args, const Centers& centers, const std::vector<Range>& ranges, int threads, Effort& effort) {
  parallel_for(ranges.size(), threads, [&](int64_t t) {
    task<Number, VNNI>(args, centers, ranges[t].begin, ranges[t].end, effort);
  });
}

// To look at a tile takes as long as to screen 8 in 8 bits, for which 16 bits take twice as long: 8 bits pay while they
// leave less than this share of the tiles open, beside the one that holds the nearest centre.
[[maybe_unused]] bool bytes_pay(const Effort& effort, int64_t rows) {
  return 8 * (effort.looks - rows) <= effort.tried / MR;
}

}  // namespace

int64_t assign_panel_rows() { return NR; }
int64_t assign_group_centers() { return MR * GROUP; }

void assign(const Assign& args, int threads) {
  if (args.N == 0) return;
  Centers centers;
  order_centers(args, centers);
  Chunks chunks(args, threads);
  Effort effort;
#if defined(__AVX512F__) || (defined(__AVX2__) && FASTPROTO_AVX_VNNI)
  if (has_vnni() && args.exact && centers.screened && args.D <= MAX_D_OF_BYTES) {
    pack_centers<int8_t>(args, centers, threads);
    run<int8_t, true>(args, centers, chunks.trials, threads, effort);
    const bool pays = bytes_pay(effort, std::min<int64_t>(chunks.trials.size() * NR, args.N));
    chunks.trials.clear();
    if (pays) {
      run<int8_t, true>(args, centers, chunks.rest, threads, effort);
      chunks.rest.clear();
    }
  }
#endif
  chunks.rest.insert(chunks.rest.end(), chunks.trials.begin(), chunks.trials.end());
  if (!chunks.rest.empty()) {
    pack_centers<int16_t>(args, centers, threads);
    const auto run_rest = has_vnni() ? run<int16_t, true> : run<int16_t, false>;
    run_rest(args, centers, chunks.rest, threads, effort);
  }
  if (args.tried) *args.tried = effort.tried;
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
