// A chunk of rows: as the screen takes them, and which tiles of centres it leaves open for each; the exact look at those.
// The steps of a task (assign_cpu.cpp): load_chunk; screen and judge, which lets tiles wait; then row after row fetch_tile and
// fetch_centers, ahead of it, and look.
// Included by *_cpu.cpp only.
#pragma once

#include <algorithm>
#include <vector>

#include "../common/float_rows.h"
#include "../common/pack.h"
#include "../common/tile.h"
#include "../common/vec.h"
#include "centers.h"
#include "settle.h"

namespace fastproto {
namespace FASTPROTO_ISA {

constexpr int64_t STRETCH = 320 / GROUP;  // groups between two looks at the scores: 320 tiles · 128 rows · 4 B = 160 KB
constexpr int64_t WAITING = 32;           // tiles that a row may have waiting for the exact look

// A chunk of rows: as the screen takes them, in panels of NR, and what is known of each.
struct Chunk {
  int64_t begin, count, panels;
  int64_t looks;                                 // tiles that were shown to a row
  std::vector<const float*> row;                 // (rows,) each (D,) as it came, in float32
  Buffer copies;                                 // (rows, D) of those that came in half precision
  Buffer packed, scores;                         // (panels, words, NR) words of numbers; (STRETCH · GROUP, rows)
  std::vector<float> scale, length, doubt;       // (rows,) s, |s q| or more, and what a centre's length adds to the error
  std::vector<float> certain;                    // (rows,) a score that some centre surely reaches
  std::vector<char> screened;                    // (rows,)
  std::vector<int32_t> waiting;                  // (rows, WAITING) tiles that may hold the nearest centre
  std::vector<float> hope;                       // (rows, WAITING) what their centres reach at best
  std::vector<int> waiting_count, first;         // (rows,) how many; the most hopeful of them
  std::vector<unsigned> open;                    // (rows,) and which of its centres can be the nearest
  std::vector<Nearest> nearest;                  // (rows,)
  std::vector<char> skipped;                     // (panels, groups)
  // With bounds: |x|² or less; distance to the own centre or more; (panels, groups) the least distance to a centre of the
  // group less `own`, over the panel's rows, or less.
  std::vector<float> square, own, miss;

  int64_t size() const { return panels * NR; }
};

template <typename Number>
void load_chunk(const Assign& args, const Centers& centers, Chunk& chunk) {
  thread_local std::vector<float> shifted;
  thread_local Buffer integers;
  const int64_t D = args.D, size = chunk.size(), padded = centers.words * PER_WORD<Number>;
  const bool copied = args.x_dtype != static_cast<int>(Dtype::float32);
  shifted.assign(padded, 0.f);
  float* packed = integers.take(size * centers.words);
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
  chunk.first.resize(size);
  chunk.open.resize(size);
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
    Number* numbers = reinterpret_cast<Number*>(packed + i * centers.words);
    Quantized x = measure<Number>(shifted.data(), round_up(D, LANES));
    quantize(shifted.data(), padded, x, numbers);
    if (sizeof(Number) == 1 && !centers.amx)
      for (int64_t d = 0; d < padded; ++d) numbers[d] ^= Number(-ROW_OFFSET);
    chunk.row.push_back(row);
    chunk.nearest.emplace_back(args, row, std::max(x.length, SHORTEST) * std::max(centers.longest, SHORTEST));
    chunk.screened[i] = centers.screened && x.length <= TOO_LONG;
    chunk.scale[i] = x.scale;
    // Not exact, the scores are believed.
    chunk.length[i] = args.exact ? x.length + x.residual : 0.f;
    chunk.doubt[i] = args.exact ? x.residual + ROUNDING * x.length : 0.f;
    if (x.length > SHORTEST) chunk.square[i] = x.length * x.length * (1 - 4 * ROUNDING - D * 0x1p-22f / LANES);
  }
  std::fill(packed + chunk.count * centers.words, packed + size * centers.words, 0.f);
  pack_across(packed, size, centers.words, chunk.packed.take(size * centers.words));
  chunk.scores.take(STRETCH * GROUP * size);
}

constexpr unsigned ALL_OPEN = (1u << MR) - 1;

// Which centres of a tile can be a row's nearest, one bit each: the same screen with the centres along the lanes.
template <typename Number, bool VNNI>
unsigned open_centers(const Assign& args, const Centers& centers, const Chunk& chunk, int64_t i, int64_t tile) {
  if (MR > LANES || !args.exact || !chunk.screened[i]) return ALL_OPEN;
  const int64_t words = centers.words;
  const Word* packed = reinterpret_cast<const Word*>(centers.packed.data()) + tile * words * MR;
  const Word* row = reinterpret_cast<const Word*>(chunk.packed.data()) + i / NR * words * NR + i % NR;
  IntVec even = load_words(centers.start.data() + tile * MR), odd{};
  // Of every byte: rows for AMX have theirs, vpdpbusd wants them without.
  const int32_t sign = centers.amx ? static_cast<int32_t>(0x01010101u * ROW_OFFSET) : 0;
  for (int64_t w = 0; w < words; w += 2) {  // their number is even: D is padded to LANES
    even = dot_words<Number, VNNI>(even, load_words(packed + w * MR), (row[w * NR] ^ sign) - IntVec{});
    odd = dot_words<Number, VNNI>(odd, load_words(packed + (w + 1) * MR), (row[(w + 1) * NR] ^ sign) - IntVec{});
  }
  const Vec product = __builtin_convertvector(even + odd, Vec) * (chunk.scale[i] * centers.scale[tile]);
  const Vec score = product - load(centers.bias.data() + tile * MR);
  const float error = chunk.doubt[i] * centers.length[tile] + chunk.length[i] * centers.residual[tile] +
                      ROUNDING * centers.offset[tile];
  return bits(score + error >= splat(chunk.certain[i])) & ALL_OPEN;
}

// Shows a row those centres of a tile whose bits are set.
inline void show(const Centers& centers, Chunk& chunk, int64_t i, int64_t tile, unsigned open) {
  int64_t shown[MR];
  int count = 0;
  for (; open; open &= open - 1) {
    shown[count] = centers.order[tile * MR + __builtin_ctz(open)];
    count += shown[count] >= 0;
  }
  chunk.nearest[i].show(shown, count);
  ++chunk.looks;
}

// What a row will need of the caches, in two steps: the most hopeful of the tiles that wait; then, screened anew, those
// of its centres that are open.
inline void fetch_tile(const Centers& centers, Chunk& chunk, int64_t i) {
  if (i >= chunk.count || chunk.waiting_count[i] == 0) return;
  const float* hope = chunk.hope.data() + i * WAITING;
  chunk.first[i] = static_cast<int>(std::max_element(hope, hope + chunk.waiting_count[i]) - hope);
  const int64_t size = centers.words * MR;
  const float* packed = centers.packed.data() + chunk.waiting[i * WAITING + chunk.first[i]] * size;
  for (int64_t w = 0; w < size; w += 16) __builtin_prefetch(packed + w);
}
template <typename Number, bool VNNI>
void fetch_centers(const Assign& args, const Centers& centers, Chunk& chunk, int64_t i) {
  if (i >= chunk.count || chunk.waiting_count[i] == 0) return;
  const int64_t tile = chunk.waiting[i * WAITING + chunk.first[i]];
  chunk.open[i] = open_centers<Number, VNNI>(args, centers, chunk, i, tile);
  for (unsigned open = chunk.open[i]; open; open &= open - 1) {
    const int64_t k = centers.order[tile * MR + __builtin_ctz(open)];
    for (int64_t d = 0; k >= 0 && d < args.D; d += 16) __builtin_prefetch(args.centers + k * args.D + d);
  }
}

// Looks at the tiles that wait: at the most hopeful, then at those that it has not excluded.
template <typename Number, bool VNNI>
void look(const Assign& args, const Centers& centers, Chunk& chunk, int64_t i) {
  if (chunk.waiting_count[i] == 0) return;
  const float* hope = chunk.hope.data() + i * WAITING;
  const int32_t* waiting = chunk.waiting.data() + i * WAITING;
  show(centers, chunk, i, waiting[chunk.first[i]], chunk.open[i]);
  // <x, c> − |c|² / 2 = (|x|² − ||x − c||²) / 2 of the nearest so far.
  if (!args.inner && args.exact)
    chunk.certain[i] = std::max(chunk.certain[i], (chunk.square[i] - chunk.nearest[i].at_most()) / 2);
  for (int w = 0; w < chunk.waiting_count[i]; ++w)
    if (w != chunk.first[i] && !(hope[w] < chunk.certain[i]))
      show(centers, chunk, i, waiting[w], open_centers<Number, VNNI>(args, centers, chunk, i, waiting[w]));
  chunk.waiting_count[i] = 0;
}

template <typename Number, bool VNNI>
void wait(const Assign& args, const Centers& centers, Chunk& chunk, int64_t i, int64_t tile, float hope) {
  int& count = chunk.waiting_count[i];
  if (count == WAITING) {
    int kept = 0;
    for (int w = 0; w < count; ++w) {
      if (chunk.hope[i * WAITING + w] < chunk.certain[i]) continue;
      chunk.hope[i * WAITING + kept] = chunk.hope[i * WAITING + w];
      chunk.waiting[i * WAITING + kept++] = chunk.waiting[i * WAITING + w];
    }
    count = kept;
    if (count == WAITING) {
      fetch_tile(centers, chunk, i);
      fetch_centers<Number, VNNI>(args, centers, chunk, i);
      look<Number, VNNI>(args, centers, chunk, i);
    }
  }
  chunk.waiting[i * WAITING + count] = static_cast<int32_t>(tile);
  chunk.hope[i * WAITING + count++] = hope;
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
