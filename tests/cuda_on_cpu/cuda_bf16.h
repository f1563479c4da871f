// __nv_bfloat16 for the tests of CUDA kernels on a CPU.
#pragma once

#include "csrc/common/dtype.h"

struct __nv_bfloat16 : fastproto::BFloat16 {
  __nv_bfloat16() = default;
  __nv_bfloat16(fastproto::BFloat16 value) : BFloat16(value) {}
};
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return fastproto::from_float<fastproto::BFloat16>(x); }
inline float __bfloat162float(__nv_bfloat16 x) { return fastproto::to_float(static_cast<fastproto::BFloat16>(x)); }
