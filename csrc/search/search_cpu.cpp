// The nearest few of many vectors for every row: a screen, and an exact look at what it cannot exclude.
//
// A task is a chunk of rows, in panels of NR along the lanes. It takes the vectors a tile at a time, packs them and multiplies
// them with all its panels: nothing of size K is held. With an origin o amid the vectors
//   l2      s = <x − o, v − o> − |v − o|² / 2      (|x − o|² − ||x − v||²) / 2 but for rounding
//   inner   s = <x, v − o>
// is larger for a nearer vector, and a bound e on its error is known. A vector can be among the nearest if s + e reaches what
// `count` vectors surely reach. Those that can are a row's candidates, of which there is room for twice as many as are
// wanted; they are ranked by their distances in float64 at the end, or where rounding hides so many that the room is full.
//
// Where the CPU multiplies bfloat16 faster, the screen is in it first, as long as that excludes enough of the vectors.
#include "search.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "../common/bits.h"
#include "../common/distance.h"
#include "../common/factors.h"
#include "../common/float_rows.h"
#include "../common/parallel.h"
#include "../common/vec.h"

namespace fastproto {
namespace FASTPROTO_ISA {
namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr int64_t ROWS = 1024;        // of a chunk: to pack a tile on AMX takes 0.6 µs where its products take 32 · 0.13
constexpr int64_t BYTES = 32 << 20;   // of a chunk that is more than a panel: many neighbours for fewer rows at a time
constexpr float TOO_LONG = 1e15f;     // products of longer rows might leave float32

// The bound, with u = 2^-24 and lengths |x|, |v| from the origin. A sum of D products is off by (D + 1) u |x| |v| (that of two
// roundings each, without multiply-adds), rounding x − o and v − o adds 2 u |x| |v|, rounding |v|² / 2 and the score
// 2 u (|x| |v| + |v|² / 2). To tell distances that float32 makes equal from farther ones takes 2^-24 ||x − v||² ≤
// 2 u (|x|² + |v|²), or 2 u |<x, v>|. Twice the rounding leaves room for that of the bound itself.
//
// Rows and vectors that are rounded to bfloat16, x' and v', add by Cauchy and Schwarz |x − o − x'| |v| + |x'| |v − o − v'|,
// where the residuals are measured: some 0.0016 of a length.
constexpr float UNIT = 0x1p-24f;
constexpr float LEAST = 1e-36f;  // below normal numbers there is no relative error

// A point amid the vectors.
struct Origin {
  std::vector<float> at, shift;  // (D,) subtracted from vectors, and from rows: for the inner product nothing
  float length;

  explicit Origin(const Search& args)
      : at(choose_origin(args.vectors, args.K, args.D)), shift(args.inner ? std::vector<float>(args.D, 0.f) : at),
        length(static_cast<float>(std::sqrt(-exact_gap(at.data(), at.data(), args.D, true)))) {}
};

// |v − v'| of a vector rounded to bfloat16, or a little more. Of numbers below 1e-17 the squares vanish, of denormal ones
// products do: each is off by 2^-8 of itself or 2^-126.
inline float residual(const float* v, int64_t D, float length) {
  Vec squares{};
  float rest = 0;
  int64_t d = 0;
  for (; d + LANES <= D; d += LANES) {
    const Vec off = load(v + d) - leading_bits(load(v + d));
    squares += off * off;
  }
  for (; d < D; ++d) {
    const float off = v[d] - to_float(from_float<BFloat16>(v[d]));
    rest += off * off;
  }
  const float root = std::sqrt(static_cast<float>(D)), slack = 1 + (D / LANES + 2 * LANES) * UNIT;
  return std::min(std::sqrt(sum(squares) + rest) * slack + root * 1e-18f, length * 0x1.01p-8f + root * 0x1p-126f);
}

inline void subtract(const float* row, const float* shift, int64_t D, float* out) {
  int64_t d = 0;
  for (; d + LANES <= D; d += LANES) store(out + d, load(row + d) - load(shift + d));
  for (; d < D; ++d) out[d] = row[d] - shift[d];
}

// A chunk of rows and their candidates.
struct Chunk {
  int64_t begin, count, panels, room;
  int64_t ranked;                   // how often rounding hid too many
  Buffer shifted, packed;           // (rows, D); (panels, words, NR)
  std::vector<float> certain;       // (rows,) the score that `count` vectors surely reach; ∞ for the padding
  std::vector<float> length, doubt; // (rows,) |x − o|, and what the row itself adds to the error
  std::vector<float> residual;      // (rows,) of the rounded rows
  std::vector<double> base;         // (rows,) |x − o|² or −<x, o>: a score is this less the gap, or half of that
  std::vector<int64_t> held;        // (rows,) candidates
  std::vector<float> low, hope;     // (rows, room) bounds of their scores
  std::vector<int64_t> label;       // (rows, room)
};

int64_t room_of(const Search& args) { return round_up(std::min(args.K, 2 * args.count + 64), LANES); }
int64_t row_bytes(const Search& args) {
  return 2 * args.D * sizeof(float) + room_of(args) * (2 * sizeof(float) + sizeof(int64_t));
}

template <typename Factors> void load_chunk(const Search& args, const Origin& origin, Chunk& chunk) {
  const int64_t D = args.D, size = chunk.panels * NR;
  float* shifted = chunk.shifted.take(size * D);
  chunk.certain.assign(size, INF);
  chunk.length.assign(size, 0.f);
  chunk.doubt.assign(size, 0.f);
  chunk.residual.assign(size, 0.f);
  chunk.base.assign(size, 0.);
  chunk.held.assign(size, 0);
  chunk.ranked = 0;
  chunk.low.resize(chunk.count * chunk.room);
  chunk.hope.resize(chunk.count * chunk.room);
  chunk.label.resize(chunk.count * chunk.room);
  for (int64_t i = 0; i < chunk.count; ++i) {
    const float* row = args.x + (chunk.begin + i) * args.stride_x;
    subtract(row, origin.shift.data(), D, shifted + i * D);
    const double square = exact_gap(row, origin.shift.data(), D, false);
    chunk.base[i] = args.inner ? exact_gap(row, origin.at.data(), D, true) : square;
    chunk.length[i] = static_cast<float>(std::sqrt(square));
    chunk.certain[i] = -INF;
    // Where no score can be believed the error is infinite, and every vector is a candidate.
    chunk.doubt[i] = chunk.length[i] <= TOO_LONG ? LEAST + (args.inner ? 0.f : 2 * UNIT * static_cast<float>(square)) : INF;
    if (!Factors::ROUNDED) continue;
    chunk.residual[i] = residual(shifted + i * D, D, chunk.length[i]);
    chunk.doubt[i] += D * 0x1p-125f;  // denormal products are 0
  }
  std::fill(shifted + chunk.count * D, shifted + size * D, 0.f);
  Factors::pack_right(shifted, size, size, D, chunk.packed.take(size * Factors::words(D)));
}

struct Found {
  float gap;
  int64_t label;
};

// The nearest of a row's candidates, nearest first.
const std::vector<Found>& rank(const Search& args, const Chunk& chunk, int64_t i) {
  constexpr int64_t AHEAD = 4;
  thread_local std::vector<Found> found;
  const float* row = args.x + (chunk.begin + i) * args.stride_x;
  const int64_t *label = chunk.label.data() + i * chunk.room, held = chunk.held[i];
  found.clear();
  for (int64_t c = 0; c < held; ++c) {
    for (int64_t d = 0; c + AHEAD < held && d < args.D; d += 16)
      __builtin_prefetch(args.vectors + label[c + AHEAD] * args.D + d);
    const float gap = static_cast<float>(exact_gap(row, args.vectors + label[c] * args.D, args.D, args.inner));
    found.push_back({gap == gap ? gap : INF, label[c]});  // what is not a number comes last
  }
  std::sort(found.begin(), found.end(), [](const Found& a, const Found& b) {
    return a.gap != b.gap ? a.gap < b.gap : a.label < b.label;
  });
  found.resize(std::min<int64_t>(held, args.count));
  return found;
}

// A score that at least `count` of a row's candidates surely reach, and not many more: by halving the range they lie in.
float reached(const Search& args, Chunk& chunk, int64_t i) {
  float* low = chunk.low.data() + i * chunk.room;
  const int64_t held = round_up(chunk.held[i], LANES);
  std::fill(low + chunk.held[i], low + held, -INF);
  float least = *std::min_element(low, low + chunk.held[i]), most = *std::max_element(low, low + held);
  for (int step = 0; step < 16; ++step) {
    const float middle = least + (most - least) / 2;
    IntVec above{};
    for (int64_t c = 0; c < held; c += LANES) above -= load(low + c) >= splat(middle);
    int64_t count = 0;
    for (int l = 0; l < LANES; ++l) count += above[l];
    (count < args.count ? most : least) = middle;
    if (count >= args.count && 16 * count <= 17 * args.count) break;
  }
  return least;
}

// Makes room among a row's candidates: fewer can be among the nearest by now.
void make_room(const Search& args, Chunk& chunk, int64_t i) {
  float *low = chunk.low.data() + i * chunk.room, *hope = chunk.hope.data() + i * chunk.room;
  int64_t* label = chunk.label.data() + i * chunk.room;
  float& certain = chunk.certain[i];
  certain = std::max(certain, reached(args, chunk, i));
  int64_t kept = 0;
  for (int64_t c = 0; c < chunk.held[i]; ++c) {
    low[kept] = low[c], hope[kept] = hope[c], label[kept] = label[c];
    kept += !(hope[c] < certain);
  }
  chunk.held[i] = kept;
  if (4 * kept <= 3 * chunk.room) return;
  // Rounding hides too many of them.
  ++chunk.ranked;
  const std::vector<Found>& found = rank(args, chunk, i);
  float least = INF;
  for (int64_t c = 0; c < args.count; ++c) {
    const double gap = found[c].gap, score = (chunk.base[i] - gap) * (args.inner ? 1 : 0.5);
    const double error = 2 * UNIT * (std::abs(chunk.base[i]) + std::abs(gap));
    low[c] = std::isfinite(score) ? static_cast<float>(score - error) : -INF;
    hope[c] = INF;
    label[c] = found[c].label;
    least = std::min(least, low[c]);
  }
  chunk.held[i] = args.count;
  certain = std::max(certain, least);
}

// Vectors that are multiplied together; the last tile has fewer.
template <typename Factors> struct Tile {
  int64_t label;                // of the first
  int count;
  Buffer shifted, words;        // (ROWS, D), and packed
  float bias[Factors::ROWS];    // of the padding ∞
  float by_length, by_residual, by_itself;  // what they add to the error: for every |x|, for every |x − x'|, by themselves
};

template <typename Factors> void load_tile(const Search& args, const Origin& origin, int64_t label, Tile<Factors>& tile) {
  constexpr int ROWS = Factors::ROWS;
  const int64_t D = args.D;
  const float* at = origin.at.data();
  // The next tile's vectors, to arrive while this one is multiplied.
  const int64_t next = (label + ROWS) * D, end = std::min(next + ROWS * D, args.K * D);
  for (int64_t n = next; n < end; n += 16) __builtin_prefetch(args.vectors + n);
  tile.label = label;
  tile.count = static_cast<int>(std::min<int64_t>(ROWS, args.K - label));
  float *shifted = tile.shifted.take(ROWS * D), rest = 0;
  double longest = 0;
  for (int m = 0; m < tile.count; ++m) {
    const float* vector = args.vectors + (label + m) * D;
    subtract(vector, at, D, shifted + m * D);
    const double square = exact_gap(vector, at, D, false);
    tile.bias[m] = args.inner ? 0.f : static_cast<float>(square / 2);
    longest = std::max(longest, square);
    if (Factors::ROUNDED) rest = std::max(rest, residual(shifted + m * D, D, static_cast<float>(std::sqrt(square))));
  }
  std::fill(tile.bias + tile.count, tile.bias + ROWS, INF);
  std::fill(shifted + tile.count * D, shifted + ROWS * D, 0.f);
  Factors::pack_left(shifted, ROWS, D, tile.words.take(ROWS * Factors::left_size(D)));
  const float length = static_cast<float>(std::sqrt(longest));
  const float by_length = 2 * UNIT * ((D + 5) * length + (args.inner ? length + origin.length : 0.f)) + rest * 0x1.02p0f;
  tile.by_length = length <= TOO_LONG ? std::max(by_length, std::numeric_limits<float>::min()) : INF;  // not 0 of denormals
  tile.by_residual = length * 0x1.000002p0f;
  tile.by_itself = args.inner ? 0.f : 4 * UNIT * length * length;
}

// Vector `label` becomes a candidate of those rows from `first` on whose bits are set.
__attribute__((noinline)) void keep(const Search& args, Chunk& chunk, int64_t first, unsigned open, Vec score, Vec error,
                                    int64_t label) {
  const int64_t room = chunk.room;
  const Vec low = score - error, hope = score + error;
  for (; open; open &= open - 1) {
    const int lane = __builtin_ctz(open);
    const int64_t i = first + lane;
    if (chunk.held[i] == room) make_room(args, chunk, i);
    const int64_t at = i * room + chunk.held[i]++;
    const bool known = error[lane] < INF;
    chunk.low[at] = known ? low[lane] : -INF;
    chunk.hope[at] = known ? hope[lane] : INF;
    chunk.label[at] = label;
  }
}

// The scores of a tile for one panel of rows; vectors that can be among the nearest become candidates.
template <typename Factors>
void screen(const Search& args, Factors& factors, const Tile<Factors>& tile, Chunk& chunk, int64_t panel) {
  constexpr int ROWS = Factors::ROWS;
  alignas(64) float products[ROWS * NR];
  const int64_t D = args.D;
  const float* rows = chunk.packed.data() + panel * Factors::words(D) * NR;
  factors.template product<ROWS>(tile.words.data(), rows, chunk.panels * NR, D, products, NR);
  for (int v = 0; v < NV; ++v) {
    const int64_t first = panel * NR + v * LANES;
    const auto score = [&](int m) { return load(products + m * NR + v * LANES) - tile.bias[m]; };
    Vec error = load(chunk.length.data() + first) * tile.by_length + (load(chunk.doubt.data() + first) + tile.by_itself);
    if (Factors::ROUNDED) error += load(chunk.residual.data() + first) * tile.by_residual;
    const Vec least = load(chunk.certain.data() + first) - error;
    Vec best = score(0);
#pragma GCC unroll 32
    for (int m = 1; m < ROWS; ++m) best = larger(best, score(m));
    if (!bits(~(best < least))) continue;
    const unsigned held = chunk.count - first >= LANES ? ~0u : (1u << std::max<int64_t>(0, chunk.count - first)) - 1;
    for (int m = 0; m < tile.count; ++m) {
      const unsigned open = bits(~(score(m) < least)) & held;
      if (open) keep(args, chunk, first, open, score(m), error, tile.label + m);
    }
  }
}

// All vectors beside the rows of a chunk. Of rounded ones it gives up once a quarter of the time that float32 would take has
// gone into what rounding hides: a candidate's exact distance takes as long as some 64 products.
template <typename Factors> bool find_candidates(const Search& args, const Origin& origin, Chunk& chunk) {
  thread_local const std::unique_ptr<Tile<Factors>> owned = std::make_unique<Tile<Factors>>();
  Tile<Factors>& tile = *owned;  // the address of a thread's own variable would be asked for again and again
  Factors factors(args.K);
  load_chunk<Factors>(args, origin, chunk);
  for (int64_t label = 0; label < args.K; label += Factors::ROWS) {
    load_tile<Factors>(args, origin, label, tile);
    for (int64_t panel = 0; panel < chunk.panels; ++panel) screen(args, factors, tile, chunk, panel);
    if (Factors::ROUNDED && 256 * chunk.ranked * chunk.room > chunk.count * args.K) return false;
  }
  return true;
}

constexpr int64_t ROUNDED_D = 32;  // fewer products are no longer most of the time

// In bfloat16, if this CPU is faster in it; false where it is not, or where that excludes too few.
bool find_rounded([[maybe_unused]] const Search& args, [[maybe_unused]] const Origin& origin, [[maybe_unused]] Chunk& chunk) {
  if (args.D < ROUNDED_D) return false;
#if FASTPROTO_AMX && defined(__AVX512F__)
  if (has_amx()) return find_candidates<AmxFactors<1>>(args, origin, chunk);
#endif
#if defined(__AVX512F__)
  if (has_bf16()) return find_candidates<VectorFactors<BFloat16>>(args, origin, chunk);
#endif
  return false;
}

void task(const Search& args, const Origin& origin, std::atomic<bool>& rounded, int64_t begin, int64_t end) {
  thread_local std::unique_ptr<Chunk> owned;
  if (!owned) owned = std::make_unique<Chunk>();
  Chunk& chunk = *owned;
  chunk.begin = begin, chunk.count = end - begin;
  chunk.panels = (chunk.count + NR - 1) / NR;
  chunk.room = room_of(args);
  if (!rounded || !find_rounded(args, origin, chunk)) {
    rounded = false;  // nor for the chunks to come
    find_candidates<VectorFactors<float>>(args, origin, chunk);
  }
  for (int64_t i = 0; i < chunk.count; ++i) {
    if (chunk.held[i] > args.count) make_room(args, chunk, i);
    const std::vector<Found>& found = rank(args, chunk, i);
    for (int64_t c = 0; c < args.count; ++c) {
      args.label[(begin + i) * args.count + c] = found[c].label;
      args.distance[(begin + i) * args.count + c] = args.inner ? -found[c].gap : found[c].gap;
    }
  }
  if (row_bytes(args) * chunk.count > BYTES) owned.reset();  // not to be kept for the next call
}

}  // namespace

void search(const Search& args, int threads) {
  if (args.N == 0) return;
  const Origin origin(args);
  // As many chunks for every thread, of whole panels.
  const int64_t most = std::max<int64_t>(NR, std::min(ROWS, BYTES / row_bytes(args))) * threads;
  const int64_t rounds = (args.N + most - 1) / most;
  const int64_t rows = round_up((args.N + rounds * threads - 1) / (rounds * threads), NR);
  std::atomic<bool> rounded{true};
  parallel_for((args.N + rows - 1) / rows, threads, [&](int64_t t) {
    task(args, origin, rounded, t * rows, std::min(args.N, (t + 1) * rows));
  });
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
