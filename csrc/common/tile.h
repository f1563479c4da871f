// Register-tiled float32 products for the CPU kernels: C (M × NR) = C · alpha + A (M × depth) · B (depth × NR).
//
// B stands in panels: NR columns wide, depth rows long, contiguous. A tile keeps MR × NV vectors of accumulators in
// registers and needs per step of the depth NV loads and MR broadcasts for MR · NV fused multiply-adds:
//   AVX-512 (32 registers of 16 floats): 14 × 2, so 28 accumulators and 16 loads for 28 FMA
//   AVX2    (16 registers of  8 floats): 6 × 2, so 12 accumulators and  8 loads for 12 FMA
// With the strides of A known at compile time one register addresses all of it: 97 % of the peak on Zen 3, else 80 %.
// With AVX512_BF16 factors may stand in bfloat16, two along the depth to a word of a float's size, at twice the rate.
// Included by *_cpu.cpp only, inside whose instruction set it lives.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "vec.h"

namespace fastproto {
namespace FASTPROTO_ISA {

#if defined(__AVX512F__)
constexpr int MR = 14, NV = 2;
#else
constexpr int MR = 6, NV = 2;
#endif
constexpr int NR = NV * LANES;

// How many numbers stand in a word of a float's size, and how many words a row of D numbers takes.
template <typename Number> constexpr int64_t PER_WORD = sizeof(float) / sizeof(Number);
template <typename Number> inline int64_t words_of(int64_t D) { return (D + PER_WORD<Number> - 1) / PER_WORD<Number>; }

// acc + a · b in every word.
template <typename Number> inline Vec multiply_add(Vec acc, Vec a, Vec b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Number) == 2) {
    // As assembly, since this file is compiled for all CPUs with AVX-512.
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
  }
#endif
  static_assert(sizeof(Number) == 4 || LANES == 16);
  return acc + a * b;
}

// Words that are added up by themselves: beside the sum of thousands every term would lose its digits. Of few rows shorter
// ones: MKL, by which one judges, multiplies those in several accumulators.
constexpr int64_t STRETCH_WORDS = 128, SHORT_STRETCH_WORDS = 32, FEW_ROWS = 8;
inline int64_t stretch_words(int64_t rows) { return rows < FEW_ROWS ? SHORT_STRETCH_WORDS : STRETCH_WORDS; }

// C[m, :] = C[m, :] · alpha[m] + Σ_k A[m, k] · B[k, :], m < M, A[m, k] at A[m · STRIDE_M + k · STRIDE_K], depth and strides in
// words; alpha null: C is not read. Never inlined: what the caller keeps in registers would push accumulators out of them.
template <int M, int STRIDE_M, int STRIDE_K, typename Number = float>
__attribute__((noinline)) void tile_product(const float* A, const float* B, int64_t depth, float* C, int64_t ldc,
                                            const float* alpha, int64_t stretch = STRETCH_WORDS) {
  int64_t k = 0;
  do {
    // All loops over registers are unrolled by order: one that is not puts them into memory.
    Vec acc[M][NV] = {};
    const bool first = k == 0;
    const int64_t end = std::min(depth, k + stretch);
#pragma GCC unroll 1
    for (; k < end; ++k) {
      Vec b[NV];
      for (int v = 0; v < NV; ++v) b[v] = load(B + k * NR + v * LANES);
#pragma GCC unroll 14
      for (int m = 0; m < M; ++m) {
        const Vec a = splat(A[m * STRIDE_M + k * STRIDE_K]);
        for (int v = 0; v < NV; ++v) acc[m][v] = multiply_add<Number>(acc[m][v], a, b[v]);
      }
    }
    if (!first || alpha) {
#pragma GCC unroll 14
      for (int m = 0; m < M; ++m) {
        const Vec scale = splat(first ? alpha[m] : 1.f);
        for (int v = 0; v < NV; ++v) acc[m][v] += load(C + m * ldc + v * LANES) * scale;
      }
    }
#pragma GCC unroll 14
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < NV; ++v) store(C + m * ldc + v * LANES, acc[m][v]);
  } while (k < depth);
}

// Calls run(M, first) for tiles of MR rows, and for the rest: one tile of it, or tiles of half as many, and so on.
template <int M = MR, bool HALVES = false, typename Run>
inline void for_tiles(int64_t count, Run run, int64_t first = 0) {
  for (; first + M <= count; first += M) run(std::integral_constant<int, M>{}, first);
  if constexpr (M > 1) for_tiles<HALVES ? M / 2 : M - 1, HALVES>(count, run, first);
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
