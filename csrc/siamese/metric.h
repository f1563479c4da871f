// The metric in registers: <w, |x_i − x_j|> for tiles of pairs, channels along the lanes, and M by its logit.
//
// A subtraction, a bit mask and a multiply-add per pair and channel. A tile of TILE × TILE pairs needs 2 · TILE + 1 loads
// for 3 · TILE² operations: 16 accumulators with AVX-512 (32 registers), 9 otherwise (16 registers). Rows stand in
// blocks, widened to float32 and padded with zeros to whole vectors: |0 − 0| adds nothing.
// Included by *_cpu.cpp only, inside whose instruction set it lives.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/vec.h"

namespace fastproto {
namespace FASTPROTO_ISA {

#if defined(__AVX512F__)
constexpr int TILE = 4;
#else
constexpr int TILE = 3;
#endif
constexpr int64_t BLOCK = 24;  // rows, a multiple of every TILE; two blocks of C = 2048 take 2 · 192 KB

inline Vec magnitude(Vec v) { return (Vec)((IntVec)v & 0x7fffffff); }

// logits[i · BLOCK + j] = <w, |x_i − y_j|> of TI × TJ rows.
template <int TI, int TJ>
inline void metric_tile(const float* x, const float* y, const float* w, int64_t width, float* logits) {
  Vec acc[TI][TJ]{};
  for (int64_t k = 0; k < width; k += LANES) {
    const Vec weight = load(w + k);
    Vec b[TJ];
    for (int j = 0; j < TJ; ++j) b[j] = load(y + j * width + k);
    for (int i = 0; i < TI; ++i) {
      const Vec a = load(x + i * width + k);
      for (int j = 0; j < TJ; ++j) acc[i][j] += magnitude(a - b[j]) * weight;
    }
  }
  for (int i = 0; i < TI; ++i)
    for (int j = 0; j < TJ; ++j) logits[i * BLOCK + j] = sum(acc[i][j]);
}

// Logits (without β) of two blocks of rows. Where both are one block, only tiles that reach below its diagonal.
inline void metric_block(const float* x, int64_t rows_x, const float* y, int64_t rows_y, bool diagonal, const float* w,
                         int64_t width, float* logits) {
  for (int64_t i = 0; i < rows_x; i += TILE)
    for (int64_t j = 0; j < (diagonal ? i + 1 : rows_y); j += TILE)
      metric_tile<TILE, TILE>(x + i * width, y + j * width, w, width, logits + i * BLOCK + j);
}

// M and dM/dz. e^−|z| is at most 1, so nothing overflows, and a small M keeps its digits.
struct Loss {
  float value, slope;
};
inline Loss loss_of(float z) {
  const float e = std::exp(-std::abs(z));
  return {(z > 0 ? z : 0.f) + std::log1p(e), (z > 0 ? 1.f : e) / (1.f + e)};
}

// w, padded with zeros to whole vectors.
inline std::vector<float> padded(const float* w, int64_t C) {
  std::vector<float> out(round_up(C, LANES), 0.f);
  std::copy(w, w + C, out.begin());
  return out;
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
