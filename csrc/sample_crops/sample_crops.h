// Crops whose centre lies in a box, and whether they are mirrored: what the CPU and the CUDA kernel take, and one row of it.
//
//   A = H W U(scale),  r = exp U(log ratio),  w = round sqrt(A r),  h = round sqrt(A / r)
//   the first of 10 tries with 0 < w <= W and 0 < h <= H, after 10 failures RandomResizedCrop's centre crop
//   top = a0 + int((a1 - a0) u),  a0, a1 = clamp(int(H box) - h/2, 0, H - h),  u ~ Beta(alpha, alpha);  left likewise
//
// The same bits as fastproto/reference/sample_crops.py everywhere: every operation is correctly rounded, and as no product
// of floats is added to anything, there is nothing that a compiler could fuse.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/host_device.h"
#include "../common/philox.h"

namespace fastproto {

constexpr uint32_t kTries = 10;

struct SampleCrops {
  Samples samples;
  const int64_t* sizes;  // (N, 2): height, width; null: `height` and `width` for all
  int64_t height, width;
  const void* boxes;     // (N, 4): h0, w0, h1, w1, float64 or float32; null: `box` for all
  bool boxes_are_double;
  double box[4];
  const int64_t *shares, *aspects, *places;  // quantile tables of fastproto/_random.py
  double ratio[2];
  int32_t* crops;        // (V·N, 4): top, left, height, width
  bool* flip;            // (V·N,)

  FASTPROTO_HD double box_side(int64_t n, int side) const {
    if (!boxes) return box[side];
    return boxes_are_double ? static_cast<const double*>(boxes)[4 * n + side] : static_cast<const float*>(boxes)[4 * n + side];
  }
};

// A draw of a table's distribution, linear between its 4097 nodes, which are in units of 2^-24.
FASTPROTO_HD inline double quantile(uint32_t bits, const int64_t* table) {
  const int64_t place = bits & 0xFFFFF, low = table[bits >> 20], high = table[(bits >> 20) + 1];
  return static_cast<double>((low << 20) + (high - low) * place) * 0x1p-44;
}

FASTPROTO_HD inline int64_t clamped(int64_t x, int64_t high) { return x < 0 ? 0 : x > high ? high : x; }

// First row (or column) of a crop whose centre is drawn between two fractions of the length.
FASTPROTO_HD inline int64_t crop_start(int64_t length, int64_t crop, double box0, double box1, double draw) {
  const double whole = static_cast<double>(length);
  const int64_t low = clamped(static_cast<int64_t>(whole * box0) - crop / 2, length - crop);
  const int64_t high = clamped(static_cast<int64_t>(whole * box1) - crop / 2, length - crop);
  return low + static_cast<int64_t>(static_cast<double>(high - low) * draw);
}

FASTPROTO_HD inline int64_t rounded(double x) { return static_cast<int64_t>(rint(x)); }

FASTPROTO_HD inline void sample_crop(const SampleCrops& args, int64_t view, int64_t n) {
  const int64_t row = view * args.samples.N + n;
  const int64_t height = args.sizes ? args.sizes[2 * n] : args.height, width = args.sizes ? args.sizes[2 * n + 1] : args.width;
  const Draws draws(args.samples, n, view, Stream::crop);
  const double image = static_cast<double>(height * width);
  int64_t top, left, h = 0, w = 0;
  bool fits = false;
  for (uint32_t t = 0; t < kTries && !fits; ++t) {
    const double area = image * quantile(draws[t], args.shares), aspect = quantile(draws[kTries + t], args.aspects);
    w = rounded(sqrt(area * aspect));
    h = rounded(sqrt(area / aspect));
    fits = 0 < w && w <= width && 0 < h && h <= height;
  }
  if (fits) {
    static_assert(2 * kTries % 4 == 0, "both draws of the place are the first two of a block");
    const Words place = draws.block(2 * kTries / 4);
    top = crop_start(height, h, args.box_side(n, 0), args.box_side(n, 2), quantile(place.word[0], args.places));
    left = crop_start(width, w, args.box_side(n, 1), args.box_side(n, 3), quantile(place.word[1], args.places));
  } else {
    const double aspect = static_cast<double>(width) / static_cast<double>(height);
    h = height, w = width;
    if (aspect < args.ratio[0]) h = rounded(static_cast<double>(width) / args.ratio[0]);
    if (aspect > args.ratio[1]) w = rounded(static_cast<double>(height) * args.ratio[1]);
    h = h < 1 ? 1 : h, w = w < 1 ? 1 : w;
    top = (height - h) / 2, left = (width - w) / 2;
  }
  int32_t* crop = args.crops + 4 * row;
  crop[0] = static_cast<int32_t>(top), crop[1] = static_cast<int32_t>(left);
  crop[2] = static_cast<int32_t>(h), crop[3] = static_cast<int32_t>(w);
  args.flip[row] = Draws(args.samples, n, view, Stream::flip)[0] < 1u << 31;
}

void sample_crops(const SampleCrops& args, int threads);

// Launches on a CUDA stream; throws std::runtime_error where the launch fails.
void sample_crops_cuda(const SampleCrops& args, uintptr_t stream);

}  // namespace fastproto
