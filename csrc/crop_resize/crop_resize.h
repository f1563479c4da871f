// Crop, resize, flip, normalise and cast in one pass: what the CPU and the CUDA kernel take.
//
//   out[r, c, i, j] = scale_c · Σ_y Σ_x Wy[i, y] · Wx[j, x] · image[index_r][c, top_r + y, left_r + x] + offset_c
//
// R crops of height × width pixels, resized to h × w. W is the triangle filter of torchvision's (and Pillow's) bilinear
// resize: Wy[i, y] ∝ max(0, 1 − |y + ½ − (i + ½)·height/h| / s), s = max(height/h, 1) with antialiasing and 1 without.
#pragma once

#include <cstdint>

#include "../common/host_device.h"
#include "../common/isa.h"

namespace fastproto {

constexpr int kMaxChannels = 4;

struct Image {
  const uint8_t* data;
  int64_t height, width;
  int64_t stride_c, stride_h, stride_w;
};

// N images at equal distances in memory, or a table with one row (data, height, width, stride_c, stride_h, stride_w) each.
struct Images {
  Image first;
  int64_t stride_n;
  const int64_t* table;
  int64_t count;

  FASTPROTO_HD Image operator[](int64_t n) const {
    if (table) {
      const int64_t* row = table + 6 * n;
      return {reinterpret_cast<const uint8_t*>(row[0]), row[1], row[2], row[3], row[4], row[5]};
    }
    Image image = first;
    image.data += n * stride_n;
    return image;
  }
};

struct CropResize {
  Images images;
  const int32_t* crops;   // (R, 4): top, left, height, width
  const int64_t* index;   // (R,) image of each crop; null: r mod N
  const bool* flip;       // (R,) mirrored or not; null: none
  int64_t R, C, h, w;
  float scale[kMaxChannels], offset[kMaxChannels];
  bool antialias;
  void* out;              // (R, C, h, w) of out_dtype
  int out_dtype;
  int64_t stride_r, stride_c, stride_h, stride_w;

  FASTPROTO_HD int64_t image_of(int64_t r) const { return index ? index[r] : r % images.count; }
  // How many crops there are of each image, as far as one can tell. Kernels take them one after the other, so that an image
  // is read once.
  int64_t views() const { return !index && R % images.count == 0 ? R / images.count : 1; }
};

// Pixels first … first + count − 1 of a crop's side carry the weight of output position i, which falls by `slope` a pixel.
template <typename T> struct Window {
  T centre, slope;
  int first, count;
};

template <typename T> FASTPROTO_HD inline Window<T> window(int i, int side, int out_side, bool antialias) {
  const T ratio = static_cast<T>(side) / static_cast<T>(out_side);
  const T support = antialias && ratio > 1 ? ratio : 1;
  const T centre = (static_cast<T>(i) + T(0.5)) * ratio;
  const T low = centre - support + T(0.5), high = centre + support + T(0.5);
  const int first = low > 0 ? static_cast<int>(low) : 0;
  const int last = high < side ? static_cast<int>(high) : side;
  return {centre, 1 / support, first, last - first};
}

// Weight of pixel first + k, not yet divided by the sum of the window's weights; 0 outside of the window.
template <typename T> FASTPROTO_HD inline T window_weight(const Window<T>& window, int k) {
  const T distance = (static_cast<T>(window.first + k) + T(0.5) - window.centre) * window.slope;
  const T weight = 1 - (distance < 0 ? -distance : distance);
  return weight > 0 ? weight : 0;
}

FASTPROTO_PER_ISA(void crop_resize(const CropResize& args, int threads);)

// Launches on a CUDA stream; throws std::runtime_error where the launch fails.
void crop_resize_cuda(const CropResize& args, uintptr_t stream);

}  // namespace fastproto
