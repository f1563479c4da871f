// __half for the tests of CUDA kernels on a CPU.
#pragma once

#include "csrc/common/dtype.h"

struct __half : fastproto::Half {
  __half() = default;
  __half(fastproto::Half value) : Half(value) {}
};
inline __half __float2half_rn(float x) { return fastproto::from_float<fastproto::Half>(x); }
inline float __half2float(__half x) { return fastproto::to_float(static_cast<fastproto::Half>(x)); }
