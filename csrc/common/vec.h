// Vectors of float32 and int32 as wide as the instruction set's: loads, folds over the lanes, exp, transposes.
// Included by *_cpu.cpp only, inside whose instruction set it lives.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace fastproto {
namespace FASTPROTO_ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t IntVec __attribute__((vector_size(LANES * 4)));

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
// Not Vec{} + x, which the compiler must compute for the sake of −0; x − 0 is x.
inline Vec splat(float x) { return x - Vec{}; }

// Every lane l combined with lane l ^ HALF, then with ever smaller halves: log2(LANES) steps, and the same in every lane.
template <int... L> inline Vec swap_lanes(Vec v, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(v, v, L...);
}
template <int HALF, int... L> inline Vec swap_halves(Vec v, std::integer_sequence<int, L...>) {
  return swap_lanes(v, std::integer_sequence<int, (L ^ HALF)...>{});
}
template <int HALF = LANES / 2, typename Step> inline float fold(Vec v, Step step) {
  v = step(v, swap_halves<HALF>(v, std::make_integer_sequence<int, LANES>{}));
  if constexpr (HALF > 1) return fold<HALF / 2>(v, step);
  else return v[0];
}
inline float sum(Vec v) {
  return fold(v, [](Vec a, Vec b) { return a + b; });
}
// a > b ? a : b, and a < b ? a : b: of a NaN and a number the second. By the instructions that do just that: where one of the
// two is known, g++ 12 makes four of a comparison and masks.
#if defined(__AVX512F__)  // with a mask of all: the plain form makes g++ 12 warn of its own header
inline Vec larger(Vec a, Vec b) { return (Vec)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b); }
inline Vec smaller(Vec a, Vec b) { return (Vec)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b); }
#elif defined(__AVX2__)
inline Vec larger(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
inline Vec smaller(Vec a, Vec b) { return (Vec)_mm256_min_ps((__m256)a, (__m256)b); }
#elif defined(__SSE2__)
inline Vec larger(Vec a, Vec b) { return (Vec)_mm_max_ps((__m128)a, (__m128)b); }
inline Vec smaller(Vec a, Vec b) { return (Vec)_mm_min_ps((__m128)a, (__m128)b); }
#else
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
inline Vec smaller(Vec a, Vec b) { return a < b ? a : b; }
#endif
// NaN where any lane is.
inline float largest(Vec v) {
  return fold(v, [](Vec a, Vec b) { return (b > a) | (b != b) ? b : a; });
}

// Of two vectors, halves of HALF lanes: the lower of each pair of them, of a then of b, and the upper.
template <int HALF, int... L> inline Vec lower_halves(Vec a, Vec b, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(a, b, (L & HALF ? L - HALF + LANES : L)...);
}
template <int HALF, int... L> inline Vec upper_halves(Vec a, Vec b, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(a, b, (L & HALF ? L + LANES : L + HALF)...);
}
// Every row's fold, in the order of its own: for LANES rows at once a fourth of the steps, and none waits for the one before.
template <int HALF, typename Step> inline Vec fold_lanes(Vec (&rows)[LANES], Step step) {
  constexpr auto lanes = std::make_integer_sequence<int, LANES>{};
#pragma GCC unroll 8
  for (int r = 0; r < HALF; ++r)
    rows[r] = step(lower_halves<HALF>(rows[r], rows[r + HALF], lanes), upper_halves<HALF>(rows[r], rows[r + HALF], lanes));
  if constexpr (HALF > 1) return fold_lanes<HALF / 2>(rows, step);
  else return rows[0];
}
// out[m] for the M rows, and for as many more as fill its last vector.
template <int M, typename Step> inline void fold_rows(const Vec (&rows)[M], Step step, float* out) {
  for (int first = 0; first < M; first += LANES) {
    Vec some[LANES];
    for (int r = 0; r < LANES; ++r) some[r] = first + r < M ? rows[first + r] : Vec{};
    store(out + first, fold_lanes<LANES / 2>(some, step));
  }
}

// exp to about 1 ulp. x = n·ln 2 + r, |r| ≤ ln 2 / 2; e^r by the polynomial 1 + r + r² q(r) of degree 6 with the least
// relative error (3.1e-9, found by Remez exchange), 2^n in the exponent bits. Below −87.33 (the smallest normal number) 0,
// whatever the rest made of it; above 88.7 the caller has subtracted too little; NaN stays NaN.
inline Vec exp(Vec x) {
  const Vec magic = splat(12582912.f);  // 1.5 · 2^23: adding it rounds to an integer, which stands in the low 9 bits
  const Vec shifted = x * 1.44269504088896341f + magic;
  const Vec n = shifted - magic;
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = splat(0.001381459878757596f);
  p = p * r + 0.008368716575205326f;
  p = p * r + 0.04166838899254799f;
  p = p * r + 0.1666652113199234f;
  p = p * r + 0.4999999403953552f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const IntVec power = ((IntVec)shifted << 23) + (127 << 23);
  return x < splat(-87.33f) ? Vec{} : p * (Vec)power;
}

// v rounded to bfloat16's 8 bits, ties away from 0.
inline Vec leading_bits(Vec v) { return (Vec)(((IntVec)v + 0x8000) & ~0xffff); }

// Two vectors of floats as one of bfloat16, first `low`, then `high`; ties to even.
inline Vec narrow(Vec low, Vec high) {
#if defined(__AVX512F__)
  Vec out;
  __asm__("vcvtne2ps2bf16 %2, %1, %0" : "=v"(out) : "v"(high), "v"(low));
  return out;
#else
  return low + high;  // no product of bfloat16 is chosen here
#endif
}

// v[r] becomes column r of the LANES rows: log2(LANES) shuffles a vector.
template <int HALF = LANES / 2> inline void transpose_registers(Vec (&v)[LANES]) {
  constexpr auto lanes = std::make_integer_sequence<int, LANES>{};
#pragma GCC unroll 16
  for (int r = 0; r < LANES; ++r) {
    if (r & HALF) continue;
    const Vec a = v[r], b = v[r + HALF];
    v[r] = lower_halves<HALF>(a, b, lanes), v[r + HALF] = upper_halves<HALF>(a, b, lanes);
  }
  if constexpr (HALF > 1) transpose_registers<HALF / 2>(v);
}
// out[d, r] = rows[r, d], d, r < LANES: log2(LANES) shuffles a vector.
inline void transpose_square(const float* rows, int64_t ld, float* out, int64_t out_ld) {
  Vec v[LANES];
#pragma GCC unroll 16
  for (int r = 0; r < LANES; ++r) v[r] = load(rows + r * ld);
  transpose_registers(v);
#pragma GCC unroll 16
  for (int r = 0; r < LANES; ++r) store(out + r * out_ld, v[r]);
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
