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
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

#include "dtype.h"

namespace fastproto {
namespace FASTPROTO_ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16, MR = 14, NV = 2;
#elif defined(__AVX2__)
constexpr int LANES = 8, MR = 6, NV = 2;
#else
constexpr int LANES = 4, MR = 6, NV = 2;
#endif
constexpr int NR = NV * LANES;

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
// Of numbers: of a NaN and a number the second.
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
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

// C[m, :] = C[m, :] · alpha[m] + Σ_k A[m, k] · B[k, :], m < M, A[m, k] at A[m · STRIDE_M + k · STRIDE_K], depth and strides in
// words; alpha null: C is not read. Never inlined: what the caller keeps in registers would push accumulators out of them.
template <int M, int STRIDE_M, int STRIDE_K, typename Number = float>
__attribute__((noinline)) void tile_product(const float* A, const float* B, int64_t depth, float* C, int64_t ldc,
                                            const float* alpha) {
  // All loops over registers are unrolled by order: one that is not puts them into memory.
  Vec acc[M][NV];
#pragma GCC unroll 14
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < NV; ++v) acc[m][v] = alpha ? load(C + m * ldc + v * LANES) * alpha[m] : Vec{};
#pragma GCC unroll 1
  for (int64_t k = 0; k < depth; ++k) {
    Vec b[NV];
    for (int v = 0; v < NV; ++v) b[v] = load(B + k * NR + v * LANES);
#pragma GCC unroll 14
    for (int m = 0; m < M; ++m) {
      const Vec a = splat(A[m * STRIDE_M + k * STRIDE_K]);
      for (int v = 0; v < NV; ++v) acc[m][v] = multiply_add<Number>(acc[m][v], a, b[v]);
    }
  }
#pragma GCC unroll 14
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < NV; ++v) store(C + m * ldc + v * LANES, acc[m][v]);
}

// Calls run(M, first) for tiles of MR rows, and for the rest: one tile of it, or tiles of half as many, and so on.
template <int M = MR, bool HALVES = false, typename Run>
inline void for_tiles(int64_t count, Run run, int64_t first = 0) {
  for (; first + M <= count; first += M) run(std::integral_constant<int, M>{}, first);
  if constexpr (M > 1) for_tiles<HALVES ? M / 2 : M - 1, HALVES>(count, run, first);
}

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

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A row of `size` numbers of any dtype as floats.
inline void load_row(const void* data, int dtype, int64_t offset, int64_t size, float* out) {
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::float32: std::memcpy(out, static_cast<const float*>(data) + offset, size * sizeof(float)); break;
    case Dtype::float16: {
      const Half* row = static_cast<const Half*>(data) + offset;
      for (int64_t i = 0; i < size; ++i) out[i] = to_float(row[i]);
      break;
    }
    case Dtype::bfloat16: {
      const BFloat16* row = static_cast<const BFloat16*>(data) + offset;
      for (int64_t i = 0; i < size; ++i) out[i] = to_float(row[i]);
      break;
    }
    default: throw std::invalid_argument("float64 is for the reference");
  }
}

// Such a row where it lies, or from `out` if it has to be widened. A copy read at once would wait for its stores.
inline const float* read_row(const void* data, int dtype, int64_t offset, int64_t size, float* out) {
  if (static_cast<Dtype>(dtype) == Dtype::float32) return static_cast<const float*>(data) + offset;
  load_row(data, dtype, offset, size, out);
  return out;
}

// Memory that starts at a cache line: a vector that crosses two costs two loads.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(); }

  // At least `size` floats of any value.
  float* take(int64_t size) {
    if (size > size_) {
      release();
      data_ = static_cast<float*>(::operator new(size * sizeof(float), ALIGNMENT));
      size_ = size;
    }
    return data_;
  }
  float* data() const { return data_; }

 private:
  static constexpr std::align_val_t ALIGNMENT{64};
  void release() {
    if (data_) ::operator delete(data_, ALIGNMENT);
    data_ = nullptr, size_ = 0;
  }
  float* data_ = nullptr;
  int64_t size_ = 0;
};

inline float dot(const float* a, const float* b, int64_t size) {
  Vec total{};
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) total += load(a + i) * load(b + i);
  float rest = sum(total);
  for (; i < size; ++i) rest += a[i] * b[i];
  return rest;
}
// 1 / |row|; of a zero row a large number, which leaves it zero.
inline float inverse_length(const float* row, int64_t size) {
  return 1.f / std::max(std::sqrt(dot(row, row, size)), 1e-12f);
}
// out = row · factor; out may be the row.
inline void scale_row(const float* row, int64_t size, float factor, float* out) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) store(out + i, load(row + i) * factor);
  for (; i < size; ++i) out[i] = row[i] * factor;
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
