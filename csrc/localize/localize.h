// The box of the warm part of a feature map: what the CPU and the CUDA kernel take.
//
//   heat = sum over C of the map, min-max to [0, 1], bilinear to H x W (align_corners False)
//   box  = (first row, first column, last row, last column with a value above the threshold) / (H, W, H, W)
//
// All in float64, so that an edge does not hang on the order of the sums. A map without a warm part, a constant one and one
// with NaN or infinity keep the whole image.
#pragma once

#include <cstdint>

#include "../common/host_device.h"
#include "../common/isa.h"

namespace fastproto {

struct Localize {
  int64_t N, C, h, w;
  const void* map;  // (N, C, h, w) of dtype
  int dtype;
  int64_t strides[4];
  double threshold;
  int64_t H, W;
  float* boxes;     // (N, 4)

  FASTPROTO_HD void write(int64_t n, bool whole, int64_t top, int64_t left, int64_t bottom, int64_t right) const {
    const double height = static_cast<double>(H), width = static_cast<double>(W);
    float* box = boxes + 4 * n;
    box[0] = whole ? 0.f : static_cast<float>(static_cast<double>(top) / height);
    box[1] = whole ? 0.f : static_cast<float>(static_cast<double>(left) / width);
    box[2] = whole ? 1.f : static_cast<float>(static_cast<double>(bottom) / height);
    box[3] = whole ? 1.f : static_cast<float>(static_cast<double>(right) / width);
  }
};

// The places of a map's side between which place i of the image's side lies, and the second one's weight.
struct Neighbours {
  int first, second;
  double weight;
};

// ratio: the map's side over the image's
FASTPROTO_HD inline Neighbours neighbours(int64_t i, int64_t side, double ratio) {
  const double at = (static_cast<double>(i) + 0.5) * ratio - 0.5, place = at > 0 ? at : 0;
  const int first = static_cast<int>(place);
  return {first, first + 1 < side ? first + 1 : first, place - first};
}

FASTPROTO_HD inline double mixed(double first, double second, double weight) {
  return first * (1 - weight) + second * weight;
}

FASTPROTO_PER_ISA(void localize(const Localize& args, int threads);)

// Launches on a CUDA stream; throws std::runtime_error where the launch fails.
void localize_cuda(const Localize& args, uintptr_t stream);

}  // namespace fastproto
