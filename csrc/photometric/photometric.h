// Colour jitter, gray, Gaussian blur, solarisation, normalisation and cast: what the CPU and the CUDA kernel take.
//
//   brightness  clamp(f x)                            luma x = 0.2989 r + 0.587 g + 0.114 b
//   contrast    clamp(f x + (1 − f) mean(luma x))
//   saturation  clamp(f x + (1 − f) luma x)
//   hue         the hue of x turned by f of the circle, its HSV saturation and value kept
//   gray        luma x in all channels
//   blur        x ∗ exp(−i² / 2σ²) / Σ over |i| ≤ radius along both axes, mirrored at the edges
//   solarise    1 − x where x ≥ t
//   normalise   scale_c x + offset_c
//
// N images of C channels (1 or 3) and H × W pixels, each with parameters of its own.
#pragma once

#include <cstdint>

#include "../common/host_device.h"
#include "../common/isa.h"

namespace fastproto {

struct Photometric {
  int64_t N, C, H, W;
  const void* images;      // (N, C, H, W) of in_dtype, not float64
  int in_dtype;
  int64_t in_strides[4];
  const float* jitter;     // (N, 4): brightness, contrast, saturation, hue; null: none
  const int64_t* order;    // (N, 4): which of the four comes first, second, …
  const bool* gray;        // (N,); null: none
  const float* sigma;      // (N,); null: none
  int64_t radius;          // of the blur, below H and W; 0: none
  const float* threshold;  // (N,); null: none
  float scale[3], offset[3];
  void* out;               // (N, C, H, W) of out_dtype, not float64; may be images
  int out_dtype;
  int64_t out_strides[4];
  float* work;             // (N, C, H, W), contiguous: on a GPU, where sigma is given
};

// The place inside a side that stands for place i, mirrored at the edges. In 32 bits on a GPU, where 64 cost more.
template <typename Int> FASTPROTO_HD inline Int mirrored(Int i, Int side) {
  return i < 0 ? -i : i < side ? i : 2 * (side - 1) - i;
}

FASTPROTO_PER_ISA(void photometric(const Photometric& args, int threads);)

// Launches on a CUDA stream; throws std::runtime_error where the launch fails.
void photometric_cuda(const Photometric& args, uintptr_t stream);

}  // namespace fastproto
