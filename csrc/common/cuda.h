// What the CUDA kernels share: elements to and from float, a switch over their types, and the check of a launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "dtype.h"

namespace fastproto {

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename Out> __device__ inline Out narrow(float x) { return static_cast<Out>(x); }
template <> __device__ inline __half narrow<__half>(float x) { return __float2half_rn(x); }
template <> __device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// with_dtype of common/dtype.h with CUDA's types. Without `doubles` no kernel is compiled for float64.
template <bool doubles = true, typename F> void with_cuda_dtype(int dtype, F&& f) {
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::float32: f(float{}); return;
    case Dtype::float64:
      if constexpr (doubles) return f(double{});
      else throw std::invalid_argument("float64 is for the reference");
    case Dtype::float16: f(__half{}); return;
    case Dtype::bfloat16: f(__nv_bfloat16{}); return;
  }
  throw std::invalid_argument("unknown dtype number");
}

// Throws where a launch before it has failed.
inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}

}  // namespace fastproto
