// crop_resize on the CPU. One task per crop: tap tables once, then per channel and output row the vertical sum over the
// crop's width (contiguous, vectorised), the horizontal sum, and scale, offset and cast in the store.
//
// Work per crop and channel: h · taps_y · width + h · w · taps_x multiply-adds; output stores bound it from below.
// Scratch per thread: one line of floats and the two tap tables. Same bits for any number of threads.
#include "crop_resize.h"

#include <type_traits>
#include <vector>

#include "../common/dtype.h"
#include "../common/parallel.h"

namespace fastproto {
namespace FASTPROTO_ISA {
namespace {

// The window of every output position of one side, and its weights, which sum to 1.
template <typename T> struct Taps {
  std::vector<Window<T>> windows;
  std::vector<T> weights;  // (out_side, stride)
  int stride = 0;

  // A window is computed once and kept: another rounding of the same expression could begin one pixel earlier.
  void build(int side, int out_side, bool antialias) {
    windows.clear();
    stride = 0;
    for (int i = 0; i < out_side; ++i) {
      windows.push_back(window<T>(i, side, out_side, antialias));
      if (windows[i].count > stride) stride = windows[i].count;
    }
    weights.resize(static_cast<size_t>(out_side) * stride);
    for (int i = 0; i < out_side; ++i) {
      T* row = weights.data() + static_cast<size_t>(i) * stride;
      T sum = 0;
      for (int k = 0; k < windows[i].count; ++k) sum += row[k] = window_weight(windows[i], k);
      for (int k = 0; k < windows[i].count; ++k) row[k] /= sum;
    }
  }
};

// line[x] = Σ_k weights[k] · pixels[k, x]
template <typename T>
void vertical(const uint8_t* pixels, int64_t stride_h, int64_t stride_w, const T* weights, int taps, int width, T* line) {
  for (int x = 0; x < width; ++x) line[x] = 0;
  for (int k = 0; k < taps; ++k, pixels += stride_h) {
    const T weight = weights[k];
    if (stride_w == 1) {
      for (int x = 0; x < width; ++x) line[x] += weight * static_cast<T>(pixels[x]);
    } else {
      for (int x = 0; x < width; ++x) line[x] += weight * static_cast<T>(pixels[x * stride_w]);
    }
  }
}

template <typename T, typename Out> void one_crop(const CropResize& args, int64_t r) {
  thread_local Taps<T> rows, columns;
  thread_local std::vector<T> line;
  const int32_t* crop = args.crops + 4 * r;
  const int height = crop[2], width = crop[3];
  const Image image = args.images[args.image_of(r)];
  const bool mirrored = args.flip && args.flip[r];
  rows.build(height, static_cast<int>(args.h), args.antialias);
  columns.build(width, static_cast<int>(args.w), args.antialias);
  line.resize(width);
  for (int64_t c = 0; c < args.C; ++c) {
    const uint8_t* origin = image.data + c * image.stride_c + crop[0] * image.stride_h + crop[1] * image.stride_w;
    const T scale = args.scale[c], offset = args.offset[c];
    for (int64_t i = 0; i < args.h; ++i) {
      vertical(origin + rows.windows[i].first * image.stride_h, image.stride_h, image.stride_w,
               rows.weights.data() + i * rows.stride, rows.windows[i].count, width, line.data());
      Out* out = static_cast<Out*>(args.out) + r * args.stride_r + c * args.stride_c + i * args.stride_h;
      for (int64_t j = 0; j < args.w; ++j) {
        const int64_t source = mirrored ? args.w - 1 - j : j;
        const T* weights = columns.weights.data() + source * columns.stride;
        const T* pixels = line.data() + columns.windows[source].first;
        T sum = 0;
        for (int k = 0; k < columns.windows[source].count; ++k) sum += weights[k] * pixels[k];
        if constexpr (std::is_same_v<Out, double>) {
          out[j * args.stride_w] = sum * scale + offset;
        } else {
          out[j * args.stride_w] = from_float<Out>(sum * scale + offset);
        }
      }
    }
  }
}

}  // namespace

void crop_resize(const CropResize& args, int threads) {
  with_dtype(args.out_dtype, [&](auto zero) {
    using Out = decltype(zero);
    using T = std::conditional_t<std::is_same_v<Out, double>, double, float>;
    parallel_for(args.R, threads, [&](int64_t r) { one_crop<T, Out>(args, r); });
  });
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
