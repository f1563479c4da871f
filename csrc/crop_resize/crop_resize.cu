// crop_resize on a GPU: one thread per output pixel, all channels.
//
// Floor: the output written once and the crops read once. Neighbouring threads read overlapping windows, which the L1
// holds; a thread does taps_y · taps_x · C multiply-adds (2 × 2 × 3 when enlarging, 5 × 5 × 3 when halving).
#include "crop_resize.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace fastproto {
namespace {

constexpr int kThreads = 256;

template <typename Out> __device__ Out cast(float x) { return static_cast<Out>(x); }
template <> __device__ __half cast<__half>(float x) { return __float2half_rn(x); }
template <> __device__ __nv_bfloat16 cast<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

template <typename Out> __global__ void __launch_bounds__(kThreads) crop_resize_kernel(const CropResize args) {
  const int64_t pixel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t j = pixel % args.w, i = pixel / args.w % args.h, r = pixel / (args.w * args.h);
  if (r >= args.R) return;
  const int32_t* crop = args.crops + 4 * r;
  const int64_t source = args.flip && args.flip[r] ? args.w - 1 - j : j;
  const Window<float> rows = window<float>(i, crop[2], args.h, args.antialias);
  const Window<float> columns = window<float>(source, crop[3], args.w, args.antialias);
  const Image image = args.images[args.image_of(r)];
  const uint8_t* origin =
      image.data + (crop[0] + rows.first) * image.stride_h + (crop[1] + columns.first) * image.stride_w;

  float sum[kMaxChannels] = {0.f, 0.f, 0.f, 0.f}, weight_sum = 0.f;
  for (int y = 0; y < rows.count; ++y) {
    const float weight_y = window_weight(rows, y);
    for (int x = 0; x < columns.count; ++x) {
      const float weight = weight_y * window_weight(columns, x);
      weight_sum += weight;
#pragma unroll
      for (int c = 0; c < kMaxChannels; ++c) {
        if (c < args.C) sum[c] += weight * origin[c * image.stride_c + y * image.stride_h + x * image.stride_w];
      }
    }
  }
  Out* out = static_cast<Out*>(args.out) + r * args.stride_r + i * args.stride_h + j * args.stride_w;
#pragma unroll
  for (int c = 0; c < kMaxChannels; ++c) {
    if (c < args.C) out[c * args.stride_c] = cast<Out>(sum[c] / weight_sum * args.scale[c] + args.offset[c]);
  }
}

template <typename Out> void launch(const CropResize& args, cudaStream_t stream) {
  const int64_t blocks = (args.R * args.h * args.w + kThreads - 1) / kThreads;
  crop_resize_kernel<Out><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(args);
}

}  // namespace

void crop_resize_cuda(const CropResize& args, uintptr_t stream_handle) {
  if (args.R * args.C * args.h * args.w == 0) return;
  const cudaStream_t stream = reinterpret_cast<cudaStream_t>(stream_handle);
  switch (args.out_dtype) {  // the numbers of common/dtype.h
    case 0: launch<float>(args, stream); break;
    case 1: launch<double>(args, stream); break;
    case 2: launch<__half>(args, stream); break;
    case 3: launch<__nv_bfloat16>(args, stream); break;
    default: throw std::invalid_argument("unknown dtype number");
  }
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("crop_resize: ") + cudaGetErrorString(error));
}

}  // namespace fastproto
