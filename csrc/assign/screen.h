// The screen: products of rows and centres in integers of 16 or 8 bits, with a bound on their error that is a proof.
//
// A row x stands as s · q with q integers, likewise a centre c as t · r. By Cauchy and Schwarz
//   |<x, c> − s t <q, r>| ≤ ||x − s q|| ||c|| + ||s q|| ||c − t r||,
// where the residuals are measured, not estimated. In 16 bits s is the smallest scale for which |q| ≤ 2^15.5, so that no
// sum of products leaves 32 bits: |<q, r>| ≤ |q| |r| < 2^31. At D = 128 the residual of a gaussian row is 7e-5 of it, in
// 8 bits 6e-3. A word of 32 bits holds two or four numbers, whose products and their sum are one instruction: pmaddwd and
// vpdpwssd at twice, vpdpbusd at four times the rate of a float32 multiply-add; a tile of AMX's at 32 times.
// Included by *_cpu.cpp only.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "../common/amx.h"
#include "../common/bits.h"
#include "../common/isa.h"
#include "../common/tile.h"
#include "../common/vec.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fastproto {
namespace FASTPROTO_ISA {

constexpr float INF = std::numeric_limits<float>::infinity();
// Covers what float32 adds: the rounding of x − origin, of the scores and of the biases, each of some 2^-24 of
// |x| |c| + |c|² / 2; their sum stays below this share of it.
constexpr float ROUNDING = 1.f / (1 << 20);

// vpdpbusd takes the rows without a sign: they stand as q + 128, and sums start from −128 Σ r. D · 255 · 127 < 2^31. AMX takes
// them with a sign.
constexpr int ROW_OFFSET = 128;
constexpr int64_t MAX_D_OF_BYTES = 1 << 16;
constexpr int64_t AMX_BYTES = 64;  // of a row in a tile

// acc + Σ c · x of the numbers in every word.
template <typename Number, bool VNNI>
inline IntVec dot_words(IntVec acc, IntVec c, IntVec x) {
  constexpr bool BYTES = sizeof(Number) == 1;
  static_assert(VNNI || !BYTES);
  // As assembly, since these files are compiled for all CPUs with AVX-512, or with AVX2.
#if defined(__AVX512F__)
  if constexpr (BYTES) __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(c));
  else if constexpr (VNNI) __asm__("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(c));
  else acc += (IntVec)_mm512_madd_epi16((__m512i)c, (__m512i)x);
#elif defined(__AVX2__) && FASTPROTO_AVX_VNNI
  if constexpr (BYTES) __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(x), "x"(c));
  else if constexpr (VNNI) __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(acc) : "x"(x), "x"(c));
  else acc += (IntVec)_mm256_madd_epi16((__m256i)c, (__m256i)x);
#elif defined(__AVX2__)
  acc += (IntVec)_mm256_madd_epi16((__m256i)c, (__m256i)x);
#elif defined(__SSE2__)
  acc += (IntVec)_mm_madd_epi16((__m128i)c, (__m128i)x);
#else
  for (int l = 0; l < LANES; ++l)
    acc[l] += int32_t(int16_t(c[l])) * int16_t(x[l]) + int32_t(int16_t(c[l] >> 16)) * int16_t(x[l] >> 16);
#endif
  return acc;
}

// Four bytes or two halves of rows that were packed in memory for floats.
typedef int32_t Word __attribute__((may_alias));

inline IntVec load_words(const void* p) {
  IntVec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// A row in integers.
struct Quantized {
  float scale;     // s; 0 for a row that stands as zeros
  float length;    // |x| or a little more
  float residual;  // |x − s q|
};

// The squares of shorter rows might vanish: their length counts as this. So does that of a residual, which covers a product
// of two scales that vanishes, too: 2^-126 |q| |r| < 2.5e-29.
constexpr float SHORTEST = 1e-14f;
constexpr float SMALLEST = 1e-30f;  // 1 / scale of smaller rows might be infinite: they stand as zeros

// The scale and length of a row, whose D is padded with zeros to whole vectors.
template <typename Number>
inline Quantized measure(const float* x, int64_t D) {
  Vec largest_abs{}, squared{};
  for (int64_t d = 0; d < D; d += LANES) {
    const Vec v = load(x + d);
    largest_abs = larger(largest_abs, larger(v, -v));
    squared += v * v;
  }
  const float largest = fastproto::FASTPROTO_ISA::largest(largest_abs);
  if (largest < SMALLEST) return {0, largest > 0 ? SHORTEST : 0.f, 0};
  // No shorter than the row: a sum of D / LANES squares per lane is that far off at most.
  const float length = std::sqrt(sum(squared)) * (1 + (D / LANES + 8) * 0x1p-24f);
  float scale = largest / std::numeric_limits<Number>::max();
  if constexpr (sizeof(Number) == 2) {
    // |q| ≤ |x| / s + √D / 2 ≤ 2^15.5, with room for the rounding of these floats.
    scale = std::max(scale, length / std::max(1.f, 46300.f - std::sqrt(static_cast<float>(D))));
  }
  return {scale, std::max(length, SHORTEST), 0};
}

// Writes a row that was measured as numbers of 8 or 16 bits, padded as the row is: with its own scale or a larger one.
template <typename Number>
inline void quantize(const float* x, int64_t D, Quantized& row, Number* out) {
  typedef Number NumberVec __attribute__((vector_size(LANES * sizeof(Number))));
  const float inverse = row.scale > 0 ? 1.f / row.scale : 0.f;
  Vec squared_rest{};
  for (int64_t d = 0; d < D; d += LANES) {
    const Vec v = load(x + d), rounded = (v * inverse + 12582912.f) - 12582912.f;  // 1.5 · 2^23: to the nearest integer
    const Vec rest = v - rounded * row.scale;
    squared_rest += rest * rest;
    const NumberVec q = __builtin_convertvector(__builtin_convertvector(rounded, IntVec), NumberVec);
    std::memcpy(out + d, &q, sizeof q);
  }
  row.residual = row.length > 0 ? std::max(std::sqrt(sum(squared_rest)), SHORTEST) : 0.f;
}

// Σ <x_n, c> in integers become best[n] = max over a tile's centres of <x_n, c> − bias, for LANES rows.
inline void best_of_tile(const IntVec (&sums)[MR], float scale, const float* bias, const float* row_scale, float* best) {
  const Vec factor = load(row_scale) * scale;
  Vec largest = splat(-INF);
#pragma GCC unroll 14
  for (int m = 0; m < MR; ++m) largest = larger(__builtin_convertvector(sums[m], Vec) * factor - bias[m], largest);
  store(best, largest);
}

// The best of one tile, (words, MR), with one scale, whose sums start from `start`, for a panel of rows, (words, NR). All loops
// over registers are unrolled by order: one that is not puts them into memory.
template <typename Number, bool VNNI>
inline void screen_tile(const Word* centers, const int32_t* start, const Word* rows, int64_t words,
                        float scale, const float* bias, const float* row_scale, float* best) {
  IntVec acc[NV][MR];
#pragma GCC unroll 14
  for (int m = 0; m < MR; ++m)
    for (int v = 0; v < NV; ++v) acc[v][m] = start[m] - IntVec{};
#pragma GCC unroll 1
  for (int64_t w = 0; w < words; ++w) {
    IntVec x[NV];
    for (int v = 0; v < NV; ++v) x[v] = load_words(rows + w * NR + v * LANES);
#pragma GCC unroll 14
    for (int m = 0; m < MR; ++m) {
      const IntVec c = centers[w * MR + m] - IntVec{};
      for (int v = 0; v < NV; ++v) acc[v][m] = dot_words<Number, VNNI>(acc[v][m], c, x[v]);
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < NV; ++v) best_of_tile(acc[v], scale, bias, row_scale + v * LANES, best + v * LANES);
}

#if FASTPROTO_AMX && defined(__AVX512F__)

// The same bits on AMX, two tiles at a time, of rows with a sign. Centres stand in rows, (2, MR, words), as many words as fill
// AMX's tiles; the best of the second tile is ld further on, and left out where `count` is 1.
inline void screen_two_tiles(Tiles& amx, const float* centers, const float* rows, int64_t words, const float* scale,
                             const float* bias, const float* row_scale, int64_t count, float* best, int64_t ld) {
  amx.configure(MR);
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  for (int64_t w = 0; w < words; w += TILE_ROWS) {
    tile_load<4>(centers + w, words), tile_load<5>(centers + MR * words + w, words);
    tile_load<6>(rows + w * NR, NR), tile_load<7>(rows + w * NR + LANES, NR);
    tile_add_product_of_bytes<0, 4, 6>(), tile_add_product_of_bytes<1, 4, 7>();
    tile_add_product_of_bytes<2, 5, 6>(), tile_add_product_of_bytes<3, 5, 7>();
  }
  alignas(64) float products[2][NV][MR * LANES];
  tile_store<0>(products[0][0], LANES), tile_store<1>(products[0][1], LANES);
  tile_store<2>(products[1][0], LANES), tile_store<3>(products[1][1], LANES);
  for (int64_t tile = 0; tile < count; ++tile)
    for (int v = 0; v < NV; ++v) {
      IntVec sums[MR];
#pragma GCC unroll 14
      for (int m = 0; m < MR; ++m) sums[m] = (IntVec)load(products[tile][v] + m * LANES);
      best_of_tile(sums, scale[tile], bias + tile * MR, row_scale + v * LANES, best + tile * ld + v * LANES);
    }
}

#endif

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
