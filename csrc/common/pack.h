// The layouts that factors of tile.h's products stand in: rows become panels, and floats words of two bfloat16 numbers.
// Included by *_cpu.cpp only, inside whose instruction set it lives.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "dtype.h"
#include "tile.h"
#include "vec.h"

namespace fastproto {
namespace FASTPROTO_ISA {

// Rows (count × D) of floats become rows of words (count × words_of(D)), in their own place.
template <typename Number> inline void to_words(float* rows, int64_t count, int64_t D) {
  if constexpr (sizeof(Number) == 2) {
    const int64_t words = words_of<Number>(D);
    for (int64_t r = 0; r < count; ++r) {
      const float* row = rows + r * D;
      float* to = rows + r * words;
      int64_t d = 0;
      for (; d + 2 * LANES <= D; d += 2 * LANES) store(to + d / 2, narrow(load(row + d), load(row + d + LANES)));
      for (; d < D; d += 2) {
        const BFloat16 pair[2] = {from_float<BFloat16>(row[d]), from_float<BFloat16>(d + 1 < D ? row[d + 1] : 0.f)};
        std::memcpy(to + d / 2, pair, sizeof pair);
      }
    }
  }
}

// A panel (D, WIDTH) of `count` rows, zero beyond them, from row R on: LANES rows and columns at a time are turned.
template <int WIDTH, int R = 0> inline void pack_panel(const float* rows, int64_t count, int64_t D, float* panel) {
  constexpr int USED = std::min(LANES, WIDTH - R);
  int64_t d = 0;
  for (; d + LANES <= D; d += LANES) {
    Vec v[LANES];
#pragma GCC unroll 16
    for (int r = 0; r < LANES; ++r) v[r] = r < USED && R + r < count ? load(rows + (R + r) * D + d) : Vec{};
    transpose_registers(v);
#pragma GCC unroll 16
    for (int l = 0; l < LANES; ++l) {
      float* to = panel + (d + l) * WIDTH + R;
      // A whole vector also where only part of it is the panel's: what it writes beyond, the next line writes again.
      if (USED == LANES || (R == 0 && d + l + 1 < D)) store(to, v[l]);
      else std::memcpy(to, &v[l], USED * sizeof(float));
    }
  }
  for (; d < D; ++d)
    for (int r = R; r < R + USED; ++r) panel[d * WIDTH + r] = r < count ? rows[r * D + d] : 0;
  if constexpr (R + USED < WIDTH) pack_panel<WIDTH, R + USED>(rows, count, D, panel);
}

// The layouts of a block of rows (count × D, words, leading dimension D) that the products need, zero where padded:
// the left factor tall (count' / MR, D, MR); the right factor across (count' / NR, D, NR), with the rows along the lanes,
// or along (D' / NR, count', NR), with D along the lanes.
template <int WIDTH> inline void pack_panels(const float* rows, int64_t count, int64_t D, float* panels) {
  for (int64_t first = 0; first < count; first += WIDTH, panels += D * WIDTH)
    pack_panel<WIDTH>(rows + first * D, std::min<int64_t>(WIDTH, count - first), D, panels);
}
inline void pack_tall(const float* rows, int64_t count, int64_t D, float* panels) {
  pack_panels<MR>(rows, count, D, panels);
}
inline void pack_across(const float* rows, int64_t count, int64_t D, float* panels) {
  pack_panels<NR>(rows, count, D, panels);
}
inline void pack_along(const float* rows, int64_t count, int64_t D, int64_t padded_count, float* panels) {
  for (int64_t first = 0; first < D; first += NR) {
    const int64_t width = std::min<int64_t>(NR, D - first);
    for (int64_t r = 0; r < padded_count; ++r, panels += NR) {
      if (r < count && width == NR) {
        for (int v = 0; v < NV; ++v) store(panels + v * LANES, load(rows + r * D + first + v * LANES));
      } else {
        for (int64_t d = 0; d < NR; ++d) panels[d] = r < count && d < width ? rows[r * D + first + d] : 0;
      }
    }
  }
}

// One of two rows' bfloat16 numbers beside the other's: out[d] = (row[d], next[d]) for the 2 LANES numbers of a vector each.
template <int... L> inline void pair_words(IntVec row, IntVec next, float* out, std::integer_sequence<int, L...>) {
  const IntVec even = (row & 0xffff) | (next << 16), odd = (row >> 16 & 0xffff) | (next & ~0xffff);
  store(out, (Vec)__builtin_shufflevector(even, odd, (L / 2 + L % 2 * LANES)...));
  store(out + LANES, (Vec)__builtin_shufflevector(even, odd, (L / 2 + LANES / 2 + L % 2 * LANES)...));
}

// The same of rows of words: those of a pair of rows along the depth, (D' / NR, padded_count / 2, NR).
template <typename Number>
inline void pack_pairs_along(const float* rows, int64_t count, int64_t D, int64_t padded_count, float* panels) {
  if constexpr (sizeof(Number) == 4) {
    pack_along(rows, count, D, padded_count, panels);
  } else {
    static_assert(NR == 2 * LANES);
    const int64_t words = words_of<Number>(D);
    for (int64_t first = 0; first < D; first += NR) {
      const int64_t size = std::min<int64_t>(NR, D - first) * sizeof(Number);
      const auto numbers = [&](int64_t r) {
        Vec v{};
        if (r >= count) return v;
        const float* row = rows + r * words + first / 2;
        if (size == sizeof v) v = load(row);
        else std::memcpy(&v, row, size);
        return v;
      };
      for (int64_t r = 0; r < padded_count; r += 2, panels += NR)
        pair_words((IntVec)numbers(r), (IntVec)numbers(r + 1), panels, std::make_integer_sequence<int, LANES>{});
    }
  }
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
