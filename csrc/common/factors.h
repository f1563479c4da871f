// Rows as the factors of a product: left (M rows at a time) and right, in panels of NR rows along the lanes:
//   product (M × NR) = left · panelᵀ
// in float32 or bfloat16, by vectors or on AMX: one interface.
// Included by *_cpu.cpp only.
#pragma once

#include <cstdint>

#include "amx.h"
#include "dtype.h"
#include "float_rows.h"
#include "isa.h"
#include "pack.h"
#include "tile.h"
#include "vec.h"

namespace fastproto {
namespace FASTPROTO_ISA {

// Number: float, or bfloat16, which stands two to a word.
template <typename Number> struct VectorFactors {
  static constexpr int ROWS = MR;                       // of a left tile
  static constexpr bool ROUNDED = sizeof(Number) == 2;  // to bfloat16
  // Words of a right row, and of a left one.
  static int64_t words(int64_t D) { return words_of<Number>(D); }
  static int64_t left_size(int64_t D) { return words(D); }

  // Of so many rows on either side: all products of them have the same bits.
  explicit VectorFactors(int64_t rows) : stretch_(stretch_words(rows)) {}

  // Calls run(M, first) for tiles of left rows.
  template <typename Run> static void for_tiles(int64_t count, Run run) { FASTPROTO_ISA::for_tiles(count, run); }

  // Packs rows of floats, which it may overwrite.
  static void pack_left(float* rows, int64_t count, int64_t D, float* left) {
    to_words<Number>(rows, count, D);
    pack_tall(rows, count, words(D), left);
  }
  static void pack_right(float* rows, int64_t count, int64_t /*padded*/, int64_t D, float* right) {
    to_words<Number>(rows, count, D);
    pack_across(rows, count, words(D), right);
  }
  // `padded`: how many rows the right factor has room for.
  template <int M>
  void product(const float* left, const float* panel, int64_t /*padded*/, int64_t D, float* out, int64_t ld) {
    tile_product<M, 1, MR, Number>(left, panel, words(D), out, ld, nullptr, stretch_);
  }

 private:
  int64_t stretch_;
};

#if FASTPROTO_AMX && defined(__AVX512F__)

// PIECES 1: bfloat16. PIECES 3: float32, in three pieces of bfloat16.
template <int PIECES> struct AmxFactors {
  static constexpr int ROWS = 2 * TILE_ROWS;
  static constexpr bool ROUNDED = PIECES == 1;
  static int64_t words(int64_t D) { return round_up(D, NR) / 2; }  // of a piece
  static int64_t left_size(int64_t D) { return PIECES * words(D); }

  explicit AmxFactors(int64_t /*rows*/) {}

  template <typename Run> static void for_tiles(int64_t count, Run run) {
    FASTPROTO_ISA::for_tiles<ROWS, true>(count, run);
  }

  static void pack_left(const float* rows, int64_t count, int64_t D, float* left) {
    to_pieces<PIECES>(rows, count, D, words(D), left, left_size(D), PIECES * LANES, LANES);
  }
  // Returns the rows of pieces, (PIECES, count, words(D)), which stay until the next call.
  static const float* pack_right(const float* rows, int64_t count, int64_t padded, int64_t D, float* right) {
    thread_local Buffer buffer;
    const int64_t size = count * words(D);
    float* pieces = buffer.take(PIECES * size);
    to_pieces<PIECES>(rows, count, D, words(D), pieces, words(D), LANES, size);
    for (int p = 0; p < PIECES; ++p) pack_across(pieces + p * size, count, words(D), right + p * padded * words(D));
    return pieces;
  }
  template <int M>
  void product(const float* left, const float* panel, int64_t padded, int64_t D, float* out, int64_t ld) {
    amx_product<M, PIECES>(tiles_, left, left_size(D), panel, padded * words(D), words(D), out, ld);
  }

 protected:
  Tiles tiles_;
};

#endif

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
