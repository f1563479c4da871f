// Products on Intel's AMX: C (M × NR) = A (M × depth) · B (depth × NR), of bfloat16 numbers, in float32. Of bytes: the tiles
// and instructions alone, for k-means' screen.
//
// A tile register holds 16 rows of 64 bytes; tdpbf16ps adds a product of 16 × 32 and 32 × 16 numbers to 16 × 16 sums in as
// many cycles as its left factor has rows: 16 times the rate of float32 FMAs. Of the eight tiles four hold 32 × 32 sums, two a
// stretch of A and two of B, so that 4 loads of 8 cycles feed 4 products of 16.
//   A: rows of words, two numbers along the depth to a word     B: panels of such words, NR columns wide, as in tile.h
//
// Float32 factors are the sums of three bfloat16 pieces (8 + 8 + 8 bits: exact), and a product is six of bfloat16:
//   <a, b> = a₀b₀ + (a₀b₁ + a₁b₀) + (a₀b₂ + a₁b₁ + a₂b₀)     docs/math/contrast.md bounds what is left out
// All but the first are summed first, while the sums are small: a tile product adds 16 pairs, summed by themselves, in one step.
// Included by *_cpu.cpp only.
#pragma once

#include <algorithm>
#include <cstdint>

#include "isa.h"
#include "tile.h"
#include "vec.h"

namespace fastproto {
namespace FASTPROTO_ISA {

#if FASTPROTO_AMX && defined(__AVX512F__)

// A word of two numbers for every lane, of each piece: those of `low`, then those of `high`. A piece is the leading bits of
// what those before it have left.
template <int PIECES> inline void store_pieces(Vec low, Vec high, float* out, int64_t piece_stride) {
  for (int p = 0; p < PIECES; ++p) {
    const bool last = p + 1 == PIECES;
    const Vec p_low = last ? low : leading_bits(low), p_high = last ? high : leading_bits(high);
    store(out + p * piece_stride, narrow(p_low, p_high));
    low -= p_low, high -= p_high;
  }
}

// Rows of floats (count × D) as rows of `words` words, zero beyond D: of every stretch of 16 words its pieces.
template <int PIECES>
inline void to_pieces(const float* rows, int64_t count, int64_t D, int64_t words, float* out, int64_t row_stride,
                      int64_t stretch_stride, int64_t piece_stride) {
  for (int64_t r = 0; r < count; ++r, rows += D, out += row_stride)
    for (int64_t d = 0; d < 2 * words; d += NR) {
      alignas(64) float padded[NR] = {};
      if (d + NR > D) std::copy(rows + d, rows + D, padded);
      const float* from = d + NR > D ? padded : rows + d;
      store_pieces<PIECES>(load(from), load(from + LANES), out + d / NR * stretch_stride, piece_stride);
    }
}

constexpr int TILE_ROWS = 16;
static_assert(LANES == TILE_ROWS && NR == 2 * TILE_ROWS && MR <= TILE_ROWS);

// Holds the tiles of a thread while it lives: a thread that leaves them in use has them saved at every switch of context.
class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() {
    if (rows_) __asm__ volatile("tilerelease");
  }
  // Left factors and sums of this many rows from now on.
  void configure(int rows) {
    if (rows == rows_) return;
    rows_ = rows;
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) config.bytes[tile] = 64, config.rows[tile] = tile < 6 ? rows : TILE_ROWS;
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
  }

 private:
  int rows_ = 0;
};

// The instructions as assembly, since this file is compiled for all CPUs with AVX-512.
template <int TILE> inline void tile_zero() { __asm__ volatile("tilezero %%tmm%c0" : : "i"(TILE)); }
template <int TILE> inline void tile_load(const float* from, int64_t ld) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(ld * sizeof(float)), "i"(TILE) : "memory");
}
template <int TILE> inline void tile_store(float* to, int64_t ld) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(ld * sizeof(float)), "i"(TILE) : "memory");
}
template <int C, int A, int B> inline void tile_add_product() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
// Of bytes, four to a word.
template <int C, int A, int B> inline void tile_add_product_of_bytes() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

// Tiles 0 and 1 are the sums of the first 16 rows, 2 and 3 of the next; 4 and 5 hold those rows of A, 6 and 7 the columns of B.
template <int M> struct AmxTile {
  static constexpr bool TALL = M > TILE_ROWS;
  static void load_left(const float* A, int64_t lda) {
    tile_load<4>(A, lda);
    if constexpr (TALL) tile_load<5>(A + TILE_ROWS * lda, lda);
  }
  static void load_right(const float* B) {
    tile_load<6>(B, NR);
    tile_load<7>(B + LANES, NR);
  }
  static void zero() {
    tile_zero<0>(), tile_zero<1>();
    if constexpr (TALL) tile_zero<2>(), tile_zero<3>();
  }
  static void multiply() {
    tile_add_product<0, 4, 6>(), tile_add_product<1, 4, 7>();
    if constexpr (TALL) tile_add_product<2, 5, 6>(), tile_add_product<3, 5, 7>();
  }
  static void store_sums(float* C, int64_t ldc) {
    tile_store<0>(C, ldc), tile_store<1>(C + LANES, ldc);
    if constexpr (TALL) tile_store<2>(C + TILE_ROWS * ldc, ldc), tile_store<3>(C + TILE_ROWS * ldc + LANES, ldc);
  }
};

// Depth in words, a multiple of 16. Of A's rows, lda words apart, every stretch of 16 words has its pieces beside it; those of
// B are piece_stride words apart.
template <int M, int PIECES>
void amx_product(Tiles& tiles, const float* A, int64_t lda, const float* B, int64_t piece_stride, int64_t depth, float* C,
                 int64_t ldc) {
  typedef AmxTile<M> Tile;
  tiles.configure(std::min(M, TILE_ROWS));
  Tile::zero();
  if constexpr (PIECES == 3)
    for (int64_t k = 0; k < depth; k += TILE_ROWS) {
      const float *a = A + 3 * k, *b = B + k * NR;
      Tile::load_left(a, lda), Tile::load_right(b + 2 * piece_stride), Tile::multiply();
      Tile::load_right(b + piece_stride), Tile::multiply();
      Tile::load_left(a + TILE_ROWS, lda), Tile::multiply();
      Tile::load_right(b), Tile::multiply();
      Tile::load_left(a + 2 * TILE_ROWS, lda), Tile::multiply();
    }
  for (int64_t k = 0; k < depth; k += TILE_ROWS)
    Tile::load_left(A + PIECES * k, lda), Tile::load_right(B + k * NR), Tile::multiply();
  Tile::store_sums(C, ldc);
}

#endif

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
