// The two products of the contrast kernels, of a few rows on the left with a block of rows on the right:
//   scores (M × BLOCK) = left · rightᵀ        sums (M × D) = sums · alpha + weights · right,  weights made of the scores
// in float32 or bfloat16, by vectors or on AMX: one interface, of which with_product chooses an implementation.
// Included by *_cpu.cpp only.
#pragma once

#include <algorithm>

#include "../common/factors.h"
#include "../common/isa.h"
#include "../common/pack.h"
#include "../common/tile.h"
#include "../common/vec.h"
#include "rows.h"

namespace fastproto {
namespace FASTPROTO_ISA {

constexpr int64_t MAX_BLOCK = 256 / NR * NR;  // right rows at a time

// Factors in bfloat16 are multiplied as they came: the scores are scaled instead.
template <typename Number> struct VectorProduct : VectorFactors<Number> {
  typedef VectorFactors<Number> Factors;
  using Factors::Factors;
  static constexpr int64_t BLOCK = MAX_BLOCK;
  static constexpr int64_t LD = BLOCK;        // of the scores
  static constexpr bool SCALE_SCORES = Factors::ROUNDED;

  // Words that the right block across and the right block along take.
  static int64_t across_size(int64_t D) { return BLOCK * Factors::words(D); }
  static int64_t along_size(int64_t D) { return words_of<Number>(BLOCK) * round_up(D, NR); }
  static constexpr int64_t SCORES_SIZE = Factors::ROWS * LD;
  static float* scores_in(float* buffer) { return buffer; }

  // Packs rows of floats, which it may overwrite; `along` may be null.
  static void pack_block(float* rows, int64_t count, int64_t padded, int64_t D, float* across, float* along) {
    Factors::pack_right(rows, count, padded, D, across);
    if (along) pack_pairs_along<Number>(rows, count, D, padded, along);
  }

  // A row of scores has become one of weights: as the left factor takes it, times scale[j] where scores were scaled.
  void finish_weights(float* row, const float* scale, int64_t padded) const {
    if constexpr (SCALE_SCORES)
      for (int64_t j = 0; j < padded; j += 2 * LANES)
        store(row + j / 2, narrow(load(row + j) * load(scale + j), load(row + j + LANES) * load(scale + j + LANES)));
  }
  template <int M>
  void sums(const float* weights, const float* along, int64_t padded, int64_t D, float* sums, const float* alpha) {
    const int64_t width = round_up(D, NR), depth = words_of<Number>(padded);
    for (int64_t d = 0; d < width; d += NR)
      tile_product<M, LD, 1, Number>(weights, along + d * depth, depth, sums + d, width, alpha);
  }
};

#if FASTPROTO_AMX && defined(__AVX512F__)

template <int PIECES> struct AmxProduct : AmxFactors<PIECES> {
  typedef AmxFactors<PIECES> Factors;
  using Factors::Factors;
  // Of three pieces 128 keys: so 32 rows of weights, 24 KB, stay in the L1 while as much passes by of a panel.
  static constexpr int64_t BLOCK = PIECES == 3 ? 128 : MAX_BLOCK;
  // Weights take half a word for each piece, in place: scores of three pieces stand half a row further on, so that no weight
  // is written where a score has not been read.
  static constexpr int64_t AHEAD = PIECES == 3 ? BLOCK / 2 : 0;
  static constexpr int64_t LD = BLOCK + AHEAD;
  static constexpr bool SCALE_SCORES = Factors::ROUNDED;

  static int64_t across_size(int64_t D) { return PIECES * BLOCK * Factors::words(D); }
  static int64_t along_size(int64_t D) { return PIECES * BLOCK * Factors::words(D); }
  static constexpr int64_t SCORES_SIZE = Factors::ROWS * LD;
  static float* scores_in(float* buffer) { return buffer + AHEAD; }

  static void pack_block(const float* rows, int64_t count, int64_t padded, int64_t D, float* across, float* along) {
    const int64_t words = Factors::words(D);
    const float* pieces = Factors::pack_right(rows, count, padded, D, across);
    for (int p = 0; along && p < PIECES; ++p)
      pack_pairs_along<BFloat16>(pieces + p * count * words, count, 2 * words, padded, along + p * padded * words);
  }

  void finish_weights(float* row, const float* scale, int64_t padded) const {
    for (int64_t j = 0; j < padded; j += NR) {
      Vec low = load(row + j), high = load(row + j + LANES);
      if constexpr (SCALE_SCORES) low *= load(scale + j), high *= load(scale + j + LANES);
      store_pieces<PIECES>(low, high, row - AHEAD + PIECES * j / 2, LANES);
    }
  }
  template <int M>
  void sums(const float* weights, const float* along, int64_t padded, int64_t D, float* sums, const float* alpha) {
    const int64_t width = round_up(D, NR), depth = padded / 2;
    alignas(64) float some[M * NR];
    for (int64_t d = 0; d < width; d += NR) {
      amx_product<M, PIECES>(this->tiles_, weights - AHEAD, LD, along + d * depth, width * depth, depth, some, NR);
      for (int m = 0; m < M; ++m)
        for (int v = 0; v < NR; v += LANES) {
          float* to = sums + m * width + d + v;
          store(to, load(to) * alpha[m] + load(some + m * NR + v));
        }
    }
  }
};

#endif

// Scores of M left rows, LD apart.
template <int M, typename Product>
void compute_scores(Product& product, const float* left, const float* across, int64_t padded, int64_t D, float* scores) {
  for (int64_t j = 0; j < padded; j += NR)
    product.template product<M>(left, across + j * Product::words(D), padded, D, scores + j, Product::LD);
}

template <typename T> struct Chosen {
  typedef T Product;
};

// Calls run(Chosen<Product>{}) with the product for these rows and keys: the same for any number of threads.
template <typename Run> void with_product([[maybe_unused]] const Contrast& args, Run run) {
#if FASTPROTO_AMX && defined(__AVX512F__)
  // To pack a key, or for the keys' gradient a row, in pieces takes twice as long: below this size more than products save.
  const bool pieces_pay = std::min(args.N, args.K) >= 128 && args.D >= 64;
  if (has_amx() && both_bfloat16(args)) return run(Chosen<AmxProduct<1>>{});
  if (has_amx() && pieces_pay) return run(Chosen<AmxProduct<3>>{});
#endif
#if defined(__AVX512F__)
  if (has_bf16() && both_bfloat16(args)) return run(Chosen<VectorProduct<BFloat16>>{});
#endif
  run(Chosen<VectorProduct<float>>{});
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
