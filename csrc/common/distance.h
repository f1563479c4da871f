// Distances in float64, for what float32 cannot tell apart, and the point that they are taken from in float32.
// Included by *_cpu.cpp only, inside whose instruction set it lives.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "vec.h"

namespace fastproto {
namespace FASTPROTO_ISA {

// Any point amid the vectors (K, D) makes their products small. The median of a few: no single far one moves it.
inline std::vector<float> choose_origin(const float* vectors, int64_t K, int64_t D) {
  const int64_t count = std::min<int64_t>(K, 63);
  std::vector<float> origin(D), column(count);
  for (int64_t d = 0; d < D; ++d) {
    for (int64_t i = 0; i < count; ++i) column[i] = vectors[i * K / count * D + d];
    std::nth_element(column.begin(), column.begin() + count / 2, column.end());
    origin[d] = column[count / 2];
  }
  return origin;
}

typedef float HalfVec __attribute__((vector_size(LANES * 2)));
typedef double DoubleVec __attribute__((vector_size(LANES * 4)));

inline DoubleVec load_double(const float* p) {
  HalfVec v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, DoubleVec);
}

// How far two vectors are apart, less being nearer: ||x − c||², or −<x, c>. In float64.
inline double exact_gap(const float* x, const float* c, int64_t D, bool inner) {
  constexpr int64_t WIDTH = LANES / 2;
  DoubleVec sums[2] = {};
  int64_t d = 0;
  for (; d + 2 * WIDTH <= D; d += 2 * WIDTH)
    for (int w = 0; w < 2; ++w) {
      const DoubleVec a = load_double(x + d + w * WIDTH), b = load_double(c + d + w * WIDTH);
      sums[w] += inner ? -a * b : (a - b) * (a - b);
    }
  double total = 0;
  for (int l = 0; l < WIDTH; ++l) total += sums[0][l] + sums[1][l];
  for (; d < D; ++d) {
    const double a = x[d], b = c[d];
    total += inner ? -a * b : (a - b) * (a - b);
  }
  return total;
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
