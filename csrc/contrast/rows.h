// Rows and keys as the contrast kernels take them: float, scaled to length 1 where that is asked for.
// Included by *_cpu.cpp only.
#pragma once

#include "../common/tile.h"
#include "contrast.h"

namespace fastproto {
namespace FASTPROTO_ISA {

// Row i of x. Returns 1 / |x_i|, or 1 where it is taken as it is.
inline float load_feature(const Contrast& args, int64_t i, float* out) {
  load_row(args.x, args.x_dtype, i * args.stride_x, args.D, out);
  if (!args.normalize) return 1.f;
  const float inverse = inverse_length(out, args.D);
  scale_row(out, args.D, inverse);
  return inverse;
}

// Key j times a_j: the scale is paid once per key, not once per score.
inline void load_key(const Contrast& args, int64_t j, float* out) {
  load_row(args.y, args.y_dtype, j * args.stride_y, args.D, out);
  scale_row(out, args.D, args.normalize ? args.a[j] * inverse_length(out, args.D) : args.a[j]);
}

// The gradient of a unit row becomes that of the row it was made from: (g − <g, u> u) / |row|.
inline void through_length(int64_t D, const float* unit, float inverse, float* grad) {
  const float along = dot(grad, unit, D);
  for (int64_t d = 0; d < D; ++d) grad[d] = (grad[d] - along * unit[d]) * inverse;
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
