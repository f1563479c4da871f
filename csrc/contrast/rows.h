// Rows and keys as the contrast kernels take them: float, scaled to length 1 where that is asked for.
// Included by *_cpu.cpp only.
#pragma once

#include <cmath>

#include "../common/dtype.h"
#include "../common/float_rows.h"
#include "../common/isa.h"
#include "../common/vec.h"
#include "contrast.h"

namespace fastproto {
namespace FASTPROTO_ISA {

// Rows and keys that both came in bfloat16 are multiplied in it where the CPU can (with_product). They stay as they came, exact, and lengths
// and temperatures scale the float32 scores: losses lose nothing. Rounded are the probabilities that the second product,
// of the gradients, takes: by 2^-9 each.
inline bool both_bfloat16(const Contrast& args) {
  constexpr int bfloat16 = static_cast<int>(Dtype::bfloat16);
  return args.x_dtype == bfloat16 && args.y_dtype == bfloat16;
}

// Row i of x, times a factor. Returns 1 / |x_i|, or 1 where it is taken as it is.
inline float load_feature(const Contrast& args, int64_t i, float* out, float factor = 1.f) {
  const float* row = read_row(args.x, args.x_dtype, i * args.stride_x, args.D, out);
  const float inverse = args.normalize ? inverse_length(row, args.D) : 1.f;
  scale_row(row, args.D, factor * inverse, out);
  return inverse;
}

// out += q times row i, which is left in `row`.
template <typename Sum> inline void add_feature(const Contrast& args, float q, int64_t i, float* row, Sum* out) {
  load_feature(args, i, row);
  for (int64_t d = 0; d < args.D; ++d) out[d] += q * row[d];
}

inline float inverse_temperature(const Contrast& args, int64_t j) { return args.a ? args.a[j] : args.a_all; }

// a_j as a factor of the key and one of the row: all of it the key's, so that it is paid once per key and not once per score.
// Where rows are the keys, half is either's, and s_ij has the bits of s_ji, of which lse_j was made.
inline float factor_of_key(const Contrast& args, int64_t j) {
  return args.symmetric ? std::sqrt(std::abs(args.a_all)) : inverse_temperature(args, j);
}
inline float factor_of_row(const Contrast& args) {
  return args.symmetric ? std::copysign(factor_of_key(args, 0), args.a_all) : 1.f;
}

// The upstream gradient of row i's own loss.
inline float row_grad(const Contrast& args, int64_t i) {
  return static_cast<float>(args.grad[i * args.grad_stride] / args.divisor);
}

// Key j as it came, from either of the two places; see read_row.
inline const float* read_key(const Contrast& args, int64_t j, float* out) {
  if (args.more && j >= args.K_first) return read_row(args.more, args.y_dtype, (j - args.K_first) * args.stride_more, args.D, out);
  return read_row(args.y, args.y_dtype, j * args.stride_y, args.D, out);
}

// Key j times its factor.
inline void load_key(const Contrast& args, int64_t j, float* out) {
  const float* key = read_key(args, j, out);
  const float a = factor_of_key(args, j);
  scale_row(key, args.D, args.normalize ? a * inverse_length(key, args.D) : a, out);
}

// Row i of x, and key j, as factors of a product: scaled, or (SCALE_SCORES) as they came. Return what is left to scale their
// scores with.
template <bool SCALE_SCORES> inline float load_factor_x(const Contrast& args, int64_t i, float* out) {
  if constexpr (!SCALE_SCORES) {
    load_feature(args, i, out, factor_of_row(args));
    return 1.f;
  }
  load_row(args.x, args.x_dtype, i * args.stride_x, args.D, out);
  return args.normalize ? factor_of_row(args) * inverse_length(out, args.D) : factor_of_row(args);
}
template <bool SCALE_SCORES> inline float load_factor_y(const Contrast& args, int64_t j, float* out) {
  if constexpr (!SCALE_SCORES) {
    load_key(args, j, out);
    return 1.f;
  }
  read_key(args, j, out);  // bfloat16, so it stands in `out`
  const float a = factor_of_key(args, j);
  return args.normalize ? a * inverse_length(out, args.D) : a;
}

// row[j] · scale[j] · factor for `count` floats, a multiple of LANES.
inline void scale_scores(float* row, const float* scale, float factor, int64_t count) {
  for (int64_t j = 0; j < count; j += LANES) store(row + j, load(row + j) * (load(scale + j) * factor));
}

// The gradient of a unit row becomes that of the row it was made from: (g − <g, u> u) / |row|, or of one too short, whose
// length does not count, g / SHORTEST_UNIT.
inline void through_length(int64_t D, const float* unit, float inverse, float* grad) {
  const float along = inverse < 1 / SHORTEST_UNIT ? dot(grad, unit, D) : 0.f;
  for (int64_t d = 0; d < D; ++d) grad[d] = (grad[d] - along * unit[d]) * inverse;
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
